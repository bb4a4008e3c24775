"""What a model-free student learns: real and imagined states, Dreamer's policy there, and the values of actions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.real_states import (
    STATES_PER_CHUNK,
    RealStates,
    dream_returns,
    imagined_observations,
    unpacked,
)
from sb3_dreamer.nets.distributions import ActionDistribution, Bernoulli, BoundedNormal, OneHotCategoricals
from sb3_dreamer.spaces import as_observation

N_VALUED_STATES = 20_000  # states in which actions are valued
PROBE_STDS = 0.1, 0.3  # standard deviations of the actions that are valued next to Dreamer's

AnyTargets = TypeVar("AnyTargets", bound="Targets")


@dataclass
class Targets:
    """N real or imagined states; subclasses say what to learn there.

    :param obs: key -> (N, *shape) the student's observations.
    """

    obs: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.obs.values())))

    def obs_for(self, policy: BasePolicy, index: np.ndarray | slice) -> Any:
        """Some of the observations as the input of an SB3 policy."""
        chosen = {key: part[index] for key, part in self.obs.items()}
        return policy.obs_to_tensor(as_observation(policy.observation_space, chosen))[0]

    def to(self: AnyTargets, device: th.device) -> AnyTargets:
        """The same with its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: Any = {name: value.to(device) for name, value in values.items() if isinstance(value, th.Tensor)}
        return replace(self, **moved)

    def minibatches(self, number: int, size: int) -> Iterator[np.ndarray]:
        """Indices (size,) of random states, ``number`` times."""
        for _ in range(number):
            yield th.randint(len(self), (min(size, len(self)),)).numpy()


@dataclass
class DistillationTargets(Targets):
    """Dreamer's policy and values in N states, the real ones first. Actions are encoded as in ``sb3_dreamer.types``.

    :param mean: (N, A) Dreamer's mean action, or the probability of each choice.
    :param std: (N, A) Dreamer's standard deviation; ones for choices.
    :param value: (N,) Dreamer's return from there on, under the student's discount.
    """

    mean: th.Tensor
    std: th.Tensor
    value: th.Tensor


@dataclass
class ActionValues(Targets):
    """The values of K actions in each of N real states, if Dreamer acts after them.

    :param action: (N, K, A) in [-1, 1], Dreamer's own one first.
    :param value: (N, K) returns under the student's discount.
    """

    action: th.Tensor
    value: th.Tensor


@th.no_grad()
def action_values(model: Dreamer, real: RealStates, gamma: float, on_latents: bool) -> ActionValues:
    """Evaluate Dreamer's action, two near it and a uniformly random one, in random real states.

    Dreams are deterministic here: returns of two actions differ by a tenth of what two samples of one dream do.

    :param model: a Dreamer whose actions are continuous.
    :param real: real states.
    :param gamma: the student's discount.
    :param on_latents: the student observes the model's features.
    """
    chosen = th.as_tensor(np.flatnonzero(~real.is_last))
    chosen = chosen[th.randperm(len(chosen))[:N_VALUED_STATES]]
    actions, values = [], []
    for packed in real.packed[chosen].split(STATES_PER_CHUNK):
        start = unpacked(model, packed)
        own, _ = action_stats(model, start.features)
        near = [(own + std * th.randn_like(own)).clamp(-1, 1) for std in PROBE_STDS]
        candidates = [own, *near, 2 * th.rand_like(own) - 1]
        returns = [dream_returns(model, start, gamma, action, sample=False)[1][:, 0] for action in candidates]
        actions.append(th.stack(candidates, 1))
        values.append(th.stack(returns, 1))
    return ActionValues(_student_observations(model, real, chosen.numpy(), on_latents), th.cat(actions), th.cat(values))


@th.no_grad()
def distillation_targets(model: Dreamer, real: RealStates, gamma: float, on_latents: bool) -> DistillationTargets:
    """Dreamer's policy and values in the real states, and in as many that it imagines from there.

    :param model: the Dreamer to distill.
    :param real: real states.
    :param gamma: the student's discount.
    :param on_latents: the student observes the model's features.
    """
    alive = np.flatnonzero(~real.is_last)
    parts = [_real_targets(model, real, alive, gamma, on_latents)]
    if (horizon := model.imagination_horizon) > 1:  # a dream of one step has no state between its ends
        # a dream has H states, so real and imagined states are equally many
        starts = alive[th.randperm(len(alive))[: -(-len(alive) // horizon)].numpy()]
        for i in range(0, len(starts), STATES_PER_CHUNK):
            parts.append(_imagined_targets(model, real, starts[i : i + STATES_PER_CHUNK], gamma, on_latents))
    return DistillationTargets(
        obs={key: np.concatenate([part.obs[key] for part in parts]) for key in parts[0].obs},
        mean=th.cat([part.mean for part in parts]),
        std=th.cat([part.std for part in parts]),
        value=th.cat([part.value for part in parts]),
    )


def _student_observations(
    model: Dreamer, real: RealStates, index: np.ndarray, on_latents: bool
) -> dict[str, np.ndarray]:
    """The student's observations of some real states."""
    if on_latents:
        return latent_observations(model, real.packed[index])
    return {key: part[index] for key, part in real.obs.items()}


def _real_targets(
    model: Dreamer, real: RealStates, alive: np.ndarray, gamma: float, on_latents: bool
) -> DistillationTargets:
    chunks = []
    for packed in real.packed[alive].split(STATES_PER_CHUNK):
        start = unpacked(model, packed)
        chunks.append((*action_stats(model, start.features), dream_returns(model, start, gamma)[1][:, 0]))
    mean, std, value = (th.cat(parts) for parts in zip(*chunks, strict=True))
    return DistillationTargets(_student_observations(model, real, alive, on_latents), mean, std, value)


def _imagined_targets(
    model: Dreamer, real: RealStates, starts: np.ndarray, gamma: float, on_latents: bool
) -> DistillationTargets:
    """Without the first state of each dream, which is real."""
    dream, returns = dream_returns(model, unpacked(model, real.packed[starts]), gamma)
    features = dream.features[:, 1:-1].flatten(0, 1).float()
    mean, std = action_stats(model, features)
    if on_latents:
        obs = {"obs": features.cpu().numpy()}
    else:
        obs = imagined_observations(model, features)
    return DistillationTargets(obs, mean, std, returns[:, 1:].flatten())


def latent_observations(model: Dreamer, packed: th.Tensor) -> dict[str, np.ndarray]:
    """Packed states (n, P) as observations for students that observe features."""
    return {"obs": unpacked(model, packed).features.float().cpu().numpy()}


def action_stats(model: Dreamer, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Dreamer's policy at features (n, F): means or probabilities (n, A), standard deviations (n, A)."""
    policy: ActionDistribution = model.policy.actor(features)
    if isinstance(policy, BoundedNormal):
        return policy.mean, policy.std
    assert isinstance(policy, OneHotCategoricals | Bernoulli)
    probs = th.cat(policy.probs, -1) if isinstance(policy, OneHotCategoricals) else policy.prob
    return probs, th.ones_like(probs)
