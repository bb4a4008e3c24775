"""What a model-free student learns from: real and imagined moments, what Dreamer does there, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.real_states import (
    CHUNK,
    RealStates,
    dream_returns,
    imagined_observations,
    state_values,
    unpacked,
)
from sb3_dreamer.nets.distributions import ActionDistribution, Bits, BoundedNormal, OneHots


@dataclass
class Lessons:
    """N moments, real ones first. Actions are encoded as in ``sb3_dreamer.types``.

    :param obs: key -> (N, *shape) what the student sees.
    :param mean: (N, A) Dreamer's mean action, or the probability of each choice.
    :param std: (N, A) Dreamer's standard deviation; ones for choices.
    :param value: (N,) what Dreamer expects from there on, under the student's discount.
    :param taken: (N, A) an action that was taken there, really or in a dream.
    :param taken_value: (N,) what that was worth.
    """

    obs: dict[str, np.ndarray]
    mean: th.Tensor
    std: th.Tensor
    value: th.Tensor
    taken: th.Tensor
    taken_value: th.Tensor

    def __len__(self) -> int:
        return len(self.value)

    def seen_by(self, policy: BasePolicy, index: np.ndarray | slice) -> Any:
        """Observations as tensors for an SB3 policy: by key, or the only one."""
        chosen = {key: part[index] for key, part in self.obs.items()}
        is_dict = isinstance(policy.observation_space, spaces.Dict)
        return policy.obs_to_tensor(chosen if is_dict else chosen["obs"])[0]

    def batches(self, number: int, size: int) -> Iterator[np.ndarray]:
        """Indices (n,) of random moments, ``number`` times."""
        for _ in range(number):
            yield th.randint(len(self), (min(size, len(self)),)).numpy()


@th.no_grad()
def lessons_from(model: Dreamer, real: RealStates, gamma: float, on_latents: bool) -> Lessons:
    """Dreamer's answers to what really happened, and to as much that it imagines from there.

    :param model: the teacher.
    :param real: real moments.
    :param gamma: the student's discount.
    :param on_latents: the student sees the model's features instead of observations.
    """
    alive = np.flatnonzero(~real.is_last)
    parts = [_real_lessons(model, real, alive, gamma, on_latents)]
    # each dream brings H lessons, so that real and imagined ones are equally many
    starts = np.random.default_rng(len(real)).choice(alive, -(-len(alive) // model.imagination_horizon), replace=False)
    for i in range(0, len(starts), CHUNK):
        parts.append(_imagined_lessons(model, real, starts[i : i + CHUNK], gamma, on_latents))
    return Lessons(
        obs={key: np.concatenate([part.obs[key] for part in parts]) for key in parts[0].obs},
        **{
            name: th.cat([getattr(part, name) for part in parts])
            for name in ("mean", "std", "value", "taken", "taken_value")
        },
    )


def _real_lessons(model: Dreamer, real: RealStates, alive: np.ndarray, gamma: float, on_latents: bool) -> Lessons:
    values = state_values(model, real, gamma)
    answers = [answer(model, unpacked(model, part).features) for part in real.packed[alive].split(CHUNK)]
    return Lessons(
        obs=latent_observations(model, real.packed[alive])
        if on_latents
        else {k: v[alive] for k, v in real.obs.items()},
        mean=th.cat([mean for mean, _ in answers]),
        std=th.cat([std for _, std in answers]),
        value=values[alive],
        taken=real.action[alive],
        taken_value=real.reward[alive + 1] + gamma * values[alive + 1],  # a terminal entry is worth nothing
    )


def _imagined_lessons(model: Dreamer, real: RealStates, starts: np.ndarray, gamma: float, on_latents: bool) -> Lessons:
    """From the second state of each dream on: the first one is real and known."""
    dream, returns = dream_returns(model, unpacked(model, real.packed[starts]), gamma)
    features = dream.features[:, 1:-1].flatten(0, 1).float()
    mean, std = answer(model, features)
    if on_latents:
        obs = {"obs": features.cpu().numpy()}
    else:
        obs = imagined_observations(model, features)
    value = returns[:, 1:].flatten()
    taken = dream.action[:, 1:].flatten(0, 1).clamp(-1.0, 1.0)
    return Lessons(obs, mean, std, value, taken, value)


def latent_observations(model: Dreamer, packed: th.Tensor) -> dict[str, np.ndarray]:
    """Packed states (n, .) as observations for students on features."""
    return {"obs": unpacked(model, packed).features.float().cpu().numpy()}


def answer(model: Dreamer, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """What Dreamer does at features (n, F): means or probabilities (n, A), standard deviations (n, A)."""
    policy: ActionDistribution = model.policy.actor(features)
    if isinstance(policy, BoundedNormal):
        return policy.mean, policy.std
    assert isinstance(policy, OneHots | Bits)
    probs = th.cat(policy.probs, -1) if isinstance(policy, OneHots) else policy.prob
    return probs, th.ones_like(probs)
