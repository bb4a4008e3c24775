"""Imitation of a teacher: its answers, by entry of the replay, and how long the actor listens to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from sb3_dreamer.behavior.actor_critic import Actor
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.progress import Advance, unseen
from sb3_dreamer.types import Batch

REHEARSALS = 500  # updates of the actor alone, at most
REHEARSAL_RATE = 1e-3  # its learning rate at the beginning of them; it falls to zero


@dataclass
class Cloning:
    """The actor imitates the teacher wherever it was asked; this fades, and its own aims take over::

        weight   1 |-------------.
                   |  (only the   `-.
                   |   teacher)      `-.
                 0 |                    `-----------   (only its own)
                      warm_start   learn()             updates

    :param answers: what the teacher would do.
    :param fade_from: count of updates at which the weight begins to fall.
    :param fade_updates: updates until it is zero.
    :param steps_left: environment steps that are yet to be taken.
    :param rehearsals: updates of the actor alone at the end, see :func:`rehearse`.
    :param asked: what ``warm_start`` was asked for.
    :param rehearsed: how many of these have been made.
    """

    answers: Answers
    fade_from: int
    fade_updates: int
    steps_left: int
    rehearsals: int
    asked: tuple[Any, ...]
    rehearsed: int = 0

    def left(self, n_updates: int) -> int:
        """Steps, updates and rehearsals of the warm start that are left to do, after some updates."""
        return max(self.steps_left, 0) + max(self.fade_from - n_updates, 0) + self.rehearsals - self.rehearsed

    def weight(self, n_updates: int) -> float:
        """Share of the teacher after some updates."""
        return float(np.clip(1 - (n_updates - self.fade_from) / max(self.fade_updates, 1), 0.0, 1.0))

    def mix(self, own: th.Tensor, actor: Actor, features: th.Tensor, batch: Batch, n_updates: int) -> th.Tensor:
        """The actor's loss: its own (), and the negative log-likelihood of the teacher's answers.

        :param own: loss of the actor in its dreams, ().
        :param actor: the actor.
        :param features: (B, T, F) of the batch.
        :param batch: sequences.
        :param n_updates: updates so far.
        """
        weight = self.weight(n_updates)
        return own if weight == 0.0 else (1 - weight) * own + weight * self.loss(actor, features, batch)

    def loss(self, actor: Actor, features: th.Tensor, batch: Batch) -> th.Tensor:
        """Negative log-likelihood of the teacher's answers, mean over those there are: (B, T, F) -> ()."""
        answers = self.answers.at(batch.index[:, :1], batch.index[:, 1:] + np.arange(batch.reward.shape[1]))
        answer = th.as_tensor(answers, device=features.device)
        asked = ~answer[..., 0].isnan()
        error = -actor(features.detach()).log_prob(answer.nan_to_num())
        return (error * asked).sum() / asked.sum().clamp(min=1)


class Answers:
    """Encoded actions of the teacher, by environment and number of the entry; NaN where it was not asked.

    :param first: (n_envs,) numbers of the entries to come.
    :param width: A.
    """

    def __init__(self, first: np.ndarray, width: int) -> None:
        self.first = first
        self.table = np.full((len(first), 1024, width), np.nan, np.float32)

    def note(self, number: np.ndarray, answer: np.ndarray) -> None:
        """At an entry of each environment (n_envs,): the answers (n_envs, A)."""
        column = number - self.first
        while column.max() >= self.table.shape[1]:
            self.table = np.concatenate([self.table, np.full_like(self.table, np.nan)], 1)
        self.table[np.arange(len(column)), column] = answer

    def at(self, env: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Environments (B, 1), entries (B, T) -> answers (B, T, A)."""
        column, known = number - self.first[env], self.table.shape[1]
        inside = (column >= 0) & (column < known)
        return np.where(inside[..., None], self.table[env, column.clip(0, known - 1)], np.float32(np.nan))


def rehearse(model: Dreamer, cloning: Cloning, advance: Advance = unseen) -> None:
    """Let the actor imitate alone, on the features of a world model that stands still.

    While the model learns its features move, and an actor that learns slowly enough to keep its policy lags behind.
    """
    actor, world_model = model.policy.actor, model.policy.world_model
    optimizer = th.optim.Adam(actor.parameters())
    while cloning.rehearsed < cloning.rehearsals:
        optimizer.param_groups[0]["lr"] = REHEARSAL_RATE * (1 - cloning.rehearsed / cloning.rehearsals)
        batch = model.replay_buffer.sample(model.batch_size, env=model.get_vec_normalize_env())
        with th.no_grad():
            states, _ = world_model.observe(batch)
        optimizer.zero_grad()
        cloning.loss(actor, states.features, batch).backward()
        optimizer.step()
        cloning.rehearsed += 1
        advance(1)
