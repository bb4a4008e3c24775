"""Imitation of a teacher: its answers, by entry of the replay, and how long the actor listens to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_dreamer.behavior.actor_critic import Actor
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.guide import Guide
from sb3_dreamer.hybrid.progress import Advance, no_progress
from sb3_dreamer.imitation import NO_TEACHER

RATE = 1e-3  # learning rate of an actor that does nothing but imitate
STEPS_PER_REHEARSAL = 4  # for each minibatch of the actor alone: with more of these it learns the answers by heart
IMITATIONS = 16  # of the actor, for each update of the model in learn(): with one it lags behind the moving features
MINIBATCH = 512
LESSONS = 40  # batches of the replay that they are taken from


class Asked(NamedTuple):
    """What ``warm_start`` was asked for: the same once more goes on with a warm start that was interrupted."""

    teacher: Any
    vec_normalize: Any
    deterministic: bool
    n_steps: int
    updates: int
    fade_updates: int
    student_share: float


class Cloning:
    """The actor imitates the teacher wherever it was asked; this fades, and its own aims take over::

        share    1 |-------------.
                   |  (only the   `-.
                   |   teacher)      `-.
                 0 |                    `-----------   (only its own)
                      warm_start   learn()             updates

    Imitation has an optimiser and a rate of its own: while the model learns its features move, and an actor that learns
    slowly enough to improve its policy would lag behind. As long as the share lasts the teacher goes on being asked.

    :param guide: the teacher.
    :param actor: who imitates.
    :param answers: what the teacher would do.
    :param fade_from: count of updates at which the share begins to fall.
    :param fade_updates: updates until it is zero.
    :param steps_left: environment steps that are yet to be taken.
    :param rehearsals: updates of the actor alone at the end, see :func:`rehearse`.
    :param asked: what ``warm_start`` was asked for.
    """

    def __init__(
        self,
        guide: Guide,
        actor: Actor,
        answers: Answers,
        fade_from: int,
        fade_updates: int,
        steps_left: int,
        rehearsals: int,
        asked: Asked,
    ) -> None:
        self.guide, self.actor, self.answers = guide, actor, answers
        self.fade_from, self.fade_updates = fade_from, fade_updates
        self.steps_left, self.rehearsals, self.asked = steps_left, rehearsals, asked
        self.rehearsed = 0
        self.optimizer = th.optim.Adam(actor.parameters())

    def left(self, n_updates: int) -> int:
        """Steps, updates and rehearsals of the warm start that are left to do, after some updates."""
        return max(self.steps_left, 0) + max(self.fade_from - n_updates, 0) + self.rehearsals - self.rehearsed

    def weight(self, n_updates: int) -> float:
        """Of the teacher in what the actor learns, after some updates."""
        if n_updates < self.fade_from:
            return 1.0
        left = self.fade_from + self.fade_updates - n_updates
        return left / self.fade_updates if left > 0 else 0.0

    def ask(self, model: Dreamer) -> np.ndarray:
        """What the teacher would do now, in each environment: noted for the entries to come."""
        actions = self.guide.answer(model)
        self.answers.note(model.replay_buffer.heads(), model.policy.encode_action(actions))
        return actions

    def query(self, model: Dreamer, taken: np.ndarray) -> None:
        """As :meth:`ask`, in ``learn()``: a teacher that fails is forgotten, and the next ``learn()`` goes on.

        :param taken: (n_envs, *shape) actions that the model takes meanwhile.
        :raises RuntimeError: that it has failed.
        """
        try:
            self.ask(model)
            self.guide.memory = self.guide.with_action(self.guide.memory, taken)
        except Exception as error:
            model.imitation = NO_TEACHER
            raise RuntimeError(
                f"the teacher of warm_start() failed at environment step {model.num_timesteps}: {error!r}. It is "
                "forgotten: learn(reset_num_timesteps=False) goes on without it"
            ) from error

    def imitate(self, model: Dreamer, weight: float) -> None:
        """Updates of the actor alone, on the features of a batch, at a share of the full rate.

        One while the warm start goes on, which ends with a rehearsal: more would learn its few answers by heart.
        """
        if weight == 0.0:
            return
        if model.replay_buffer.can_sample(self.answers.first):
            features, answers = self.lessons(model, 1)
            for _ in range(1 if self.left(model._n_updates) else IMITATIONS):
                self.step(features, answers, weight)

    def step(self, features: th.Tensor, answers: th.Tensor, weight: float) -> None:
        """One update of the actor on some of n lessons.

        :param features: (n, F).
        :param answers: (n, A) what the teacher would do there.
        :param weight: share of the full rate.
        """
        if len(features) == 0:
            return
        index = th.randperm(len(features), device=features.device)[:MINIBATCH]
        loss = -self.actor(features[index]).log_prob(answers[index]).mean()
        self.optimizer.param_groups[0]["lr"] = RATE * weight
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @th.no_grad()
    def lessons(self, model: Dreamer, batches: int) -> tuple[th.Tensor, th.Tensor]:
        """Replayed entries at which the teacher was asked: features of the model as it is (n, F), answers (n, A)."""
        parts = []
        for _ in range(batches):
            batch = model.replay_buffer.sample(model.batch_size, model.get_vec_normalize_env(), self.answers.first)
            states, _ = model.policy.world_model.observe(batch)
            number = batch.index[:, 1:] + np.arange(batch.reward.shape[1])
            answer = th.as_tensor(self.answers.at(batch.index[:, :1], number), device=model.device)
            asked = ~answer[..., 0].isnan()
            parts.append((states.features[asked], answer[asked]))
        return th.cat([features for features, _ in parts]), th.cat([answers for _, answers in parts])


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


def rehearse(model: Dreamer, cloning: Cloning, advance: Advance = no_progress) -> None:
    """Let the actor imitate alone, on a world model that stands still, at a rate that falls to zero.

    What the model makes of the entries is computed once, so that a step takes milliseconds.
    """
    if cloning.rehearsed == cloning.rehearsals:
        return
    features, answers = cloning.lessons(model, LESSONS)
    while cloning.rehearsed < cloning.rehearsals:
        cloning.step(features, answers, 1 - cloning.rehearsed / cloning.rehearsals)
        cloning.rehearsed += 1
        advance(1)
