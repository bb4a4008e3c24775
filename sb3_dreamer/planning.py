"""Planning in latent space at decision time: the policy proposes a plan, dreams of other plans improve it."""

from __future__ import annotations

import numpy as np
import torch as th

from sb3_dreamer.acting import ActsWithDreamer, require_dreamer
from sb3_dreamer.behavior.imagination import imagine, imagine_actions, lambda_returns
from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.nets.distributions import BoundedNormal
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.policies import PolicyState
from sb3_dreamer.types import Observation
from sb3_dreamer.world_model.rssm import State


class Planner(ActsWithDreamer):
    """The cross-entropy method, as in PlaNet (Hafner et al. 2019), around the policy and with the critic at the end::

        the policy is dreamed `horizon` steps ahead      its actions and standard deviations are the first plan
        `iterations` times                               `n_candidates` plans are sampled around the plan, all are
                                                         dreamed, the mean of the `n_elites` best is the next plan
        the first action of the last plan is taken, or the policy's own if that plan has no higher return

    The return of a plan is the lambda-return of its dream, with which the policy was trained. Dreams are deterministic:
    two samples of one would differ by more than two plans do. A planner replaces a policy anywhere, for example in
    ``evaluate_policy``, and takes a multiple of its time (``benchmarks/README.md``).

    :param model: a trained Dreamer with a Box action space.
    :param horizon: steps of a plan.
    :param n_candidates: plans that are dreamed in an iteration, for each environment; one of them is the plan itself.
    :param n_elites: number of best candidates that make the next plan.
    :param iterations: number of iterations.
    :raises ValueError: for another action space, and invalid values.
    :raises TypeError: if the model is not a Dreamer.
    """

    def __init__(
        self, model: Dreamer, horizon: int = 5, n_candidates: int = 64, n_elites: int = 8, iterations: int = 2
    ) -> None:
        require_dreamer(model, "Planner")
        if model.policy.actions.spec.kind != "vector":
            raise ValueError(f"Planner needs a Box action space, this one is {model.action_space}")
        self.model = model
        self.horizon = as_whole("horizon", horizon, least=1)
        self.n_elites = as_whole("n_elites", n_elites, least=1)
        self.iterations = as_whole("iterations", iterations, least=1)
        self.n_candidates = as_whole("n_candidates", n_candidates, least=self.n_elites)

    def predict(
        self,
        observation: Observation,
        state: PolicyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PolicyState]:
        """As :meth:`sb3_dreamer.policies.DreamerPolicy.predict`; without ``deterministic``, the best elite's action."""
        policy = self.model.policy
        proposed, carried = policy.predict(observation, state, episode_start, deterministic)
        actions = policy.actions.decode(self.plan(carried[0], deterministic))
        return actions.reshape(proposed.shape), (carried[0], policy.actions.encode(actions))

    @th.inference_mode()
    def plan(self, packed: np.ndarray, deterministic: bool = True) -> np.ndarray:
        """The first action of the plan: packed states (n, P) -> encoded actions (n, A).

        A deterministic plan uses the same candidates each time, and leaves torch's default generator alone.
        """
        model, policy = self.model, self.model.policy
        now = th.as_tensor(packed, device=model.device)
        with mixed_precision(model.device):
            unpack = policy.world_model.rssm.unpack
            dream = imagine(policy.world_model, policy.actor, unpack(now), self.horizon, sample=False)
            proposal = policy.actor(dream.features[:, :-1])
            assert isinstance(proposal, BoundedNormal)
            mean, std = dream.action, proposal.std
            starts = unpack(now.repeat_interleave(self.n_candidates, 0))
            generator = th.Generator(now.device).manual_seed(0) if deterministic else None
            for _ in range(self.iterations):
                shape = 1, self.n_candidates, *mean.shape[1:]  # the same for all environments
                noise = th.randn(shape, device=now.device, generator=generator)
                noise[:, 0] = 0  # the plan itself
                plans = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)
                best = self.plan_returns(starts, plans.flatten(0, 1)).view(len(now), -1).topk(self.n_elites).indices
                elites = plans.gather(1, best[..., None, None].expand(-1, -1, *mean.shape[1:]))
                mean, std = elites.mean(1), elites.std(1, correction=0)
            plan = mean if deterministic else elites[:, 0]
            own = dream.action
            better = self.plan_returns(unpack(now), plan) > self.plan_returns(unpack(now), own)
        return th.where(better[:, None], plan[:, 0], own[:, 0]).float().cpu().numpy()

    def plan_returns(self, starts: State, plans: th.Tensor) -> th.Tensor:
        """The lambda-return of each plan: N states, actions (N, H, A) -> (N,)."""
        policy = self.model.policy
        dream = imagine_actions(policy.world_model, starts, plans, sample=False)
        values = policy.critic.value(dream.features)
        return lambda_returns(dream.reward, dream.discount, values, self.model.gae_lambda)[:, 0]
