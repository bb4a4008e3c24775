"""Trajectories from the world model, and what they are worth."""

from __future__ import annotations

import torch as th

from sb3_dreamer.behavior.actor_critic import Actor
from sb3_dreamer.nets.layers import compile_on_cuda
from sb3_dreamer.nets.running import RunningStatistics
from sb3_dreamer.types import Dream
from sb3_dreamer.world_model import WorldModel
from sb3_dreamer.world_model.rssm import State


def draw_starts(n_states: int, n: int | None, device: th.device) -> th.Tensor:
    """Indices of states from which dreams start: ``n`` of ``n_states`` without repetition; None: all."""
    if n is None or n >= n_states:
        return th.arange(n_states, device=device)
    return th.rand(n_states, device=device).argsort()[:n]


@th.no_grad()
def imagine(
    world_model: WorldModel,
    actor: Actor,
    start: State,
    horizon: int,
    first_action: th.Tensor | None = None,
    sample: bool = True,
    compiled: bool = False,
) -> Dream:
    """Let the actor act in the world model::

        state    s_0  s_1  ...  s_H       (N, H+1)
        action   a_0  a_1  ...            (N, H)      a_t is the actor's at s_t and leads to s_{t+1}
        reward   r_0  r_1  ...  r_H       (N, H+1)    r_t is the reward of being in s_t

    :param world_model: the model.
    :param actor: the policy on its features.
    :param start: N states.
    :param horizon: number H of actions.
    :param first_action: (N, A) actions to take at the start instead of the actor's.
    :param sample: sample latents and actions, else take the expected latents and the most likely actions.
    :param compiled: on a GPU, compile a step first: for many dreams of one size.
    """
    # a transformer's context grows with each step, and each length would be compiled separately
    compiled = compiled and not world_model.rssm.sequence.parallel
    move = compile_on_cuda(start.features.device)(_move) if compiled else _move
    states, actions = [start.to_autocast_dtype()], []
    for t in range(horizon):
        action, state = move(world_model, actor, states[t], first_action if t == 0 else None, sample)
        states.append(state)
        actions.append(action)
    return _dream(world_model, states, th.stack(actions, 1))


@th.no_grad()
def imagine_actions(world_model: WorldModel, start: State, action: th.Tensor, sample: bool = True) -> Dream:
    """Dream on with given actions, for example those that were really taken.

    :param world_model: the model.
    :param start: N states.
    :param action: (N, H, A) encoded; entry 0 is taken at the start.
    :param sample: sample latents, else take the expected ones.
    """
    states = [start.to_autocast_dtype()]
    for a in action.unbind(1):
        states.append(world_model.rssm.imagine_step(states[-1], a, sample))
    return _dream(world_model, states, action)


def _move(
    world_model: WorldModel, actor: Actor, state: State, action: th.Tensor | None, sample: bool
) -> tuple[th.Tensor, State]:
    """One step of N dreams: the action, the actor's if none is given, and the states that it leads to."""
    if action is None:
        policy = actor(state.features)
        action = policy.sample() if sample else policy.mode()
    return action, world_model.rssm.imagine_step(state, action, sample)


def _dream(world_model: WorldModel, states: list[State], action: th.Tensor) -> Dream:
    """N trajectories from their H+1 states, N each."""
    features = th.stack([state.features for state in states], 1)
    return Dream(
        features=features,
        action=action,
        reward=world_model.predict_reward(features),
        discount=world_model.predict_discount(features),
    )


def lambda_returns(
    reward: th.Tensor, discount: th.Tensor, bootstrap: th.Tensor, gae_lambda: float, is_last: th.Tensor | None = None
) -> th.Tensor:
    """Bootstrapped lambda-returns (paper, "Critic learning")::

        entry      t            t+1              t+2 ...
        R_t   =          r_{t+1} + d_{t+1} ((1 - lambda) v_{t+1} + lambda R_{t+1}),      R_end = v_end

    Where ``is_last`` at t+1 the recursion ends: R_t = r_{t+1} + d_{t+1} v_{t+1}.

    :param reward: (n, T) r_t, which came with entry t.
    :param discount: (n, T) gamma, or 0 where entry t is terminal; or the predicted continue.
    :param bootstrap: (n, T) value v_t.
    :param gae_lambda: lambda.
    :param is_last: (n, T) bool, where an episode is cut.
    :return: (n, T - 1), no gradient is stopped here.
    """
    trace = th.full_like(reward, gae_lambda)
    if is_last is not None:
        trace = trace * (~is_last).to(reward.dtype)
    here = reward + discount * (1 - trace) * bootstrap
    factor = discount * trace
    future, returns = bootstrap[:, -1], []
    for t in range(reward.shape[1] - 1, 0, -1):
        future = th.addcmul(here[:, t], factor[:, t], future)
        returns.append(future)
    return th.stack(returns[::-1], 1)


class ReturnScale(RunningStatistics):
    """Moving range of the returns, 5th to 95th percentile (paper, "Actor learning"); divides the advantage.

    :param rate: share of the newest range in the average.
    """

    low: th.Tensor
    high: th.Tensor
    quantiles: th.Tensor

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("low", th.zeros(()))
        self.register_buffer("high", th.zeros(()))
        self.register_buffer("quantiles", th.tensor([0.05, 0.95]), persistent=False)

    def update(self, returns: th.Tensor) -> th.Tensor:
        """Update the range with new returns (any shape); return the scale ()."""
        self.snapshot()
        low, high = th.quantile(returns.detach().flatten(), self.quantiles)
        self.low.lerp_(low, self.rate)
        self.high.lerp_(high, self.rate)
        return self.scale

    @property
    def scale(self) -> th.Tensor:
        """max(1, high - low): small returns are not amplified."""
        return (self.high - self.low).clamp(min=1.0)
