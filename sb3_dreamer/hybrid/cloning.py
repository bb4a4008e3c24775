"""Behavior cloning of a teacher: its actions by replay entry, and how their weight decays."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_dreamer.behavior.actor_critic import Actor
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.external_policy import ExternalPolicy
from sb3_dreamer.hybrid.progress import Advance, no_progress
from sb3_dreamer.imitation import NO_TEACHER
from sb3_dreamer.types import Batch

LEARNING_RATE = 1e-3  # of an actor that only imitates
GRADIENT_STEPS = 16  # per update in learn(); fewer lag behind the features, which move while the model learns
STEPS_PER_FINAL_UPDATE = 4  # environment steps for each final update; more of these updates overfit the labels
FROZEN_BATCHES = 40  # batches of the replay whose features the final updates use
MINIBATCH = 512


class WarmStartArguments(NamedTuple):
    """The arguments of ``warm_start``: the same ones again continue a warm start that was interrupted."""

    teacher: Any
    vec_normalize: Any
    deterministic: bool
    n_steps: int
    updates: int
    fade_updates: int
    student_share: float


class Cloning:
    """The actor imitates the teacher; the weight of this decays, and the actor's own objective takes over::

        weight   1 |-------------.
                   |  (only the   `-.
                   |   teacher)      `-.
                 0 |                    `-----------   (only its own)
                      warm_start   learn()             updates

    Imitation has its own optimizer and learning rate: the features move while the model learns, and an actor that
    learns slowly enough to improve its policy would lag behind. The teacher is queried until its weight is zero.

    :param teacher: the policy that is imitated.
    :param actor: the network that imitates it.
    :param labels: the teacher's actions.
    :param fade_from: number of updates after which the weight begins to decay.
    :param fade_updates: updates from there until the weight is zero.
    :param steps_left: environment steps that remain.
    :param final_updates: updates of the actor alone at the end, see :func:`clone_on_frozen_features`.
    :param arguments: those of ``warm_start``.
    """

    def __init__(
        self,
        teacher: ExternalPolicy,
        actor: Actor,
        labels: Labels,
        fade_from: int,
        fade_updates: int,
        steps_left: int,
        final_updates: int,
        arguments: WarmStartArguments,
    ) -> None:
        self.teacher, self.actor, self.labels = teacher, actor, labels
        self.fade_from, self.fade_updates = fade_from, fade_updates
        self.steps_left, self.final_updates, self.arguments = steps_left, final_updates, arguments
        self.final_updates_done = 0
        self.optimizer = th.optim.Adam(actor.parameters())

    def remaining(self, n_updates: int) -> int:
        """Steps, updates and final updates of the warm start that remain after ``n_updates`` updates in total."""
        final = self.final_updates - self.final_updates_done
        return max(self.steps_left, 0) + max(self.fade_from - n_updates, 0) + final

    def weight(self, n_updates: int) -> float:
        """Weight of the teacher in the actor's updates, from 1 to 0."""
        if n_updates < self.fade_from:
            return 1.0
        left = self.fade_from + self.fade_updates - n_updates
        return left / self.fade_updates if left > 0 else 0.0

    def label(self, model: Dreamer) -> np.ndarray:
        """The teacher's actions at the present observations (n_envs, *shape), recorded for the next entries."""
        actions = self.teacher.act(model)
        self.labels.add(model.replay_buffer.heads(), model.policy.actions.encode(actions))
        return actions

    def query(self, model: Dreamer, taken: np.ndarray) -> None:
        """As :meth:`label`, during ``learn()``: a teacher that fails is forgotten, and the next ``learn()`` continues.

        :param taken: (n_envs, *shape) actions that the model takes.
        :raises RuntimeError: if the teacher fails.
        """
        try:
            self.label(model)
            self.teacher.observe_action(taken)
        except Exception as error:
            model.imitation = NO_TEACHER
            raise RuntimeError(
                f"the teacher of warm_start() failed at environment step {model.num_timesteps}: {error!r}. It is "
                "forgotten: learn(reset_num_timesteps=False) continues without it"
            ) from error

    def imitate(self, model: Dreamer, weight: float) -> None:
        """Update the actor alone, on the features of a batch, at ``weight`` times the full learning rate.

        One gradient step while the warm start runs: more would overfit its few labels, and the final updates follow.
        """
        if weight > 0 and model.replay_buffer.can_sample(self.labels.since):
            features, labels = self.labeled_features(model, 1)
            warm_start_running = self.remaining(model._n_updates) > 0
            for _ in range(1 if warm_start_running else GRADIENT_STEPS):
                self.gradient_step(features, labels, weight)

    def gradient_step(self, features: th.Tensor, labels: th.Tensor, weight: float) -> None:
        """One update of the actor on a random minibatch.

        :param features: (n, F).
        :param labels: (n, A) the teacher's encoded actions there.
        :param weight: of the full learning rate.
        """
        if len(features) == 0:
            return
        index = th.randperm(len(features), device=features.device)[:MINIBATCH]
        loss = -self.actor(features[index]).log_prob(labels[index]).mean()
        self.optimizer.param_groups[0]["lr"] = LEARNING_RATE * weight
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @th.no_grad()
    def labeled_features(self, model: Dreamer, batches: int) -> tuple[th.Tensor, th.Tensor]:
        """Replayed entries that have a label: features of the present model (n, F), labels (n, A).

        Their latents are the expected ones: what samples of them add is noise, in which a delicate gait is lost.
        """
        parts = []
        for _ in range(batches):
            batch = model.replay_buffer.sample(model.batch_size, model.get_vec_normalize_env(), self.labels.since)
            features = expected_features(model, batch)
            number = batch.index[:, 1:] + np.arange(batch.reward.shape[1])
            label = th.as_tensor(self.labels.lookup(batch.index[:, :1], number), device=model.device)
            labeled = ~label.isnan().any(-1)
            parts.append((features[labeled], label[labeled]))
        return th.cat([features for features, _ in parts]), th.cat([labels for _, labels in parts])


def expected_features(model: Dreamer, batch: Batch) -> th.Tensor:
    """Features of a batch (B, T, F) as ``predict(deterministic=True)`` has them, with the expected latents."""
    policy, rssm = model.policy, model.policy.world_model.rssm
    embed, packed, features = policy.world_model.embed(batch.obs), rssm.pack(rssm.restore(batch.start)), []
    for t in range(embed.shape[1]):
        before = packed, batch.prev_action[:, t], batch.is_first[:, t]
        state = policy.observe_embedded(embed[:, t], *before, sample=False)
        packed = rssm.pack(state)
        features.append(state.features)
    return th.stack(features, 1)


class Labels:
    """Encoded actions of the teacher, by environment and entry number; NaN where it was not queried.

    :param since: (n_envs,) numbers of the first entries that can have a label.
    :param width: A.
    """

    def __init__(self, since: np.ndarray, width: int) -> None:
        self.since = since
        self.table = np.full((len(since), 1024, width), np.nan, np.float32)

    def add(self, number: np.ndarray, action: np.ndarray) -> None:
        """Record one action of each environment (n_envs, A), at entries (n_envs,)."""
        column = number - self.since
        while column.max() >= self.table.shape[1]:
            self.table = np.concatenate([self.table, np.full_like(self.table, np.nan)], 1)
        self.table[np.arange(len(column)), column] = action

    def lookup(self, env: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Environments (B, 1), entries (B, T) -> actions (B, T, A)."""
        column, known = number - self.since[env], self.table.shape[1]
        inside = (column >= 0) & (column < known)
        return np.where(inside[..., None], self.table[env, column.clip(0, known - 1)], np.float32(np.nan))


def clone_on_frozen_features(model: Dreamer, cloning: Cloning, advance: Advance = no_progress) -> None:
    """The final updates: the actor imitates on a world model that does not change, at a rate that falls to zero.

    The features are computed only once, so that an update takes milliseconds.
    """
    if cloning.final_updates_done == cloning.final_updates:
        return
    features, labels = cloning.labeled_features(model, FROZEN_BATCHES)
    while cloning.final_updates_done < cloning.final_updates:
        cloning.gradient_step(features, labels, 1 - cloning.final_updates_done / cloning.final_updates)
        cloning.final_updates_done += 1
        advance(1)
