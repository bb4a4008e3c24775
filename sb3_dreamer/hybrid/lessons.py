"""What a model-free student learns from: real and imagined moments, what Dreamer does there, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.real_states import (
    CHUNK,
    RealStates,
    dream_returns,
    imagined_observations,
    unpacked,
)
from sb3_dreamer.nets.distributions import ActionDistribution, Bernoulli, BoundedNormal, OneHotCategoricals
from sb3_dreamer.spaces import as_observation

JUDGED = 20_000  # moments at which actions are judged
NEAR = 0.1, 0.3  # from Dreamer's action: standard deviations of those that are judged beside it


@dataclass
class Moments:
    """N moments, real or imagined.

    :param obs: key -> (N, *shape) what the student sees.
    """

    obs: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.obs.values())))

    def seen_by(self, policy: BasePolicy, index: np.ndarray | slice) -> Any:
        """Observations as tensors for an SB3 policy: by key, or the only one."""
        chosen = {key: part[index] for key, part in self.obs.items()}
        return policy.obs_to_tensor(as_observation(policy.observation_space, chosen))[0]

    def batches(self, number: int, size: int) -> Iterator[np.ndarray]:
        """Indices (n,) of random moments, ``number`` times."""
        for _ in range(number):
            yield th.randint(len(self), (min(size, len(self)),)).numpy()


@dataclass
class Lessons(Moments):
    """What Dreamer does at N moments, real ones first. Actions are encoded as in ``sb3_dreamer.types``.

    :param mean: (N, A) Dreamer's mean action, or the probability of each choice.
    :param std: (N, A) Dreamer's standard deviation; ones for choices.
    :param value: (N,) what Dreamer expects from there on, under the student's discount.
    """

    mean: th.Tensor
    std: th.Tensor
    value: th.Tensor


@dataclass
class Verdicts(Moments):
    """What K actions are worth at each of N real moments, if Dreamer goes on from there.

    :param action: (N, K, A) in [-1, 1], Dreamer's own one first.
    :param value: (N, K) returns under the student's discount.
    """

    action: th.Tensor
    value: th.Tensor


@th.no_grad()
def verdicts_from(model: Dreamer, real: RealStates, gamma: float, on_latents: bool) -> Verdicts:
    """Judge Dreamer's action, two near it and one anywhere, at random real moments.

    The dreams know no chance, since two actions differ by a tenth of what two samples of the same dream differ by.

    :param model: the judge; its actions are continuous.
    :param real: real moments.
    :param gamma: the student's discount.
    :param on_latents: the student sees the model's features instead of observations.
    """
    moments = th.as_tensor(np.flatnonzero(~real.is_last))
    moments = moments[th.randperm(len(moments))[:JUDGED]]
    actions, values = [], []
    for packed in real.packed[moments].split(CHUNK):
        start = unpacked(model, packed)
        own, _ = answer(model, start.features)
        near = [(own + width * th.randn_like(own)).clamp(-1, 1) for width in NEAR]
        tried = [own, *near, 2 * th.rand_like(own) - 1]
        actions.append(th.stack(tried, 1))
        values.append(th.stack([dream_returns(model, start, gamma, a, sample=False)[1][:, 0] for a in tried], 1))
    return Verdicts(_seen(model, real, moments.numpy(), on_latents), th.cat(actions), th.cat(values))


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
    if (horizon := model.imagination_horizon) > 1:  # a dream of one step has nothing between its ends
        # each dream brings H lessons, so that real and imagined ones are equally many
        starts = alive[th.randperm(len(alive))[: -(-len(alive) // horizon)].numpy()]
        for i in range(0, len(starts), CHUNK):
            parts.append(_imagined_lessons(model, real, starts[i : i + CHUNK], gamma, on_latents))
    return Lessons(
        obs={key: np.concatenate([part.obs[key] for part in parts]) for key in parts[0].obs},
        mean=th.cat([part.mean for part in parts]),
        std=th.cat([part.std for part in parts]),
        value=th.cat([part.value for part in parts]),
    )


def _seen(model: Dreamer, real: RealStates, index: np.ndarray, on_latents: bool) -> dict[str, np.ndarray]:
    """What the student sees at some real moments."""
    if on_latents:
        return latent_observations(model, real.packed[index])
    return {key: part[index] for key, part in real.obs.items()}


def _real_lessons(model: Dreamer, real: RealStates, alive: np.ndarray, gamma: float, on_latents: bool) -> Lessons:
    answers = []
    for packed in real.packed[alive].split(CHUNK):
        start = unpacked(model, packed)
        answers.append((*answer(model, start.features), dream_returns(model, start, gamma)[1][:, 0]))
    mean, std, value = (th.cat(parts) for parts in zip(*answers, strict=True))
    return Lessons(_seen(model, real, alive, on_latents), mean, std, value)


def _imagined_lessons(model: Dreamer, real: RealStates, starts: np.ndarray, gamma: float, on_latents: bool) -> Lessons:
    """From the second state of each dream on: the first one is real and known."""
    dream, returns = dream_returns(model, unpacked(model, real.packed[starts]), gamma)
    features = dream.features[:, 1:-1].flatten(0, 1).float()
    mean, std = answer(model, features)
    if on_latents:
        obs = {"obs": features.cpu().numpy()}
    else:
        obs = imagined_observations(model, features)
    return Lessons(obs, mean, std, returns[:, 1:].flatten())


def latent_observations(model: Dreamer, packed: th.Tensor) -> dict[str, np.ndarray]:
    """Packed states (n, .) as observations for students on features."""
    return {"obs": unpacked(model, packed).features.float().cpu().numpy()}


def answer(model: Dreamer, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """What Dreamer does at features (n, F): means or probabilities (n, A), standard deviations (n, A)."""
    policy: ActionDistribution = model.policy.actor(features)
    if isinstance(policy, BoundedNormal):
        return policy.mean, policy.std
    assert isinstance(policy, OneHotCategoricals | Bernoulli)
    probs = th.cat(policy.probs, -1) if isinstance(policy, OneHotCategoricals) else policy.prob
    return probs, th.ones_like(probs)
