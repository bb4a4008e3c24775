"""From a teacher to Dreamer: its experience, its policy on the model's latents, and critics of that policy."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.environments import name_dead_workers
from sb3_dreamer.hybrid.cloning import (
    STEPS_PER_FINAL_UPDATE,
    Cloning,
    Labels,
    WarmStartArguments,
    clone_on_frozen_features,
)
from sb3_dreamer.hybrid.external_policy import ExternalPolicy
from sb3_dreamer.hybrid.offline_training import begin_log, prepare_training, require_replay, train_until
from sb3_dreamer.hybrid.progress import Advance, progress


def warm_start(
    model: Dreamer,
    teacher: Any,
    n_steps: int,
    *,
    vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
    deterministic: bool = True,
    updates: int | None = None,
    fade_steps: int | None = None,
    student_share: float = 0.5,
    progress_bar: bool = False,
) -> None:
    """Let a teacher act, learn the world model from that, imitate the teacher, and only then improve on it.

    In the first steps the teacher acts. In the last ones the imitating policy acts, and the teacher labels what it
    would do there instead (DAgger, Ross et al. 2011): a policy that has only ever seen the teacher's states does not
    know the way back from its own mistakes. Meanwhile the critics and the return scale learn in dreams of the imitating
    policy. In ``learn()`` the teacher labels each step, while its weight in the actor's updates decays. If this is
    interrupted, the model can be used as it is, and the same call again takes the steps and updates that are missing;
    with another teacher or other numbers it starts over. A teacher that fails in ``learn()`` is forgotten. ``save()``
    keeps neither the teacher nor the remaining steps: a loaded model does not imitate.

    :param model: the model; the teacher acts in its environments, which are reset first.
    :param teacher: a model of SB3 or sb3-contrib, anything with their ``predict``, or the path of a saved model.
    :param n_steps: environment steps, at least ``batch_length`` in each environment; they count as the model's own.
    :param vec_normalize: the statistics that the teacher was trained with, or their path; False: it needs none; None:
        those of its own environment, if it has one. Off-policy files do not always show whether they need them, see
        :func:`~sb3_dreamer.hybrid.external_policy.saw_normalized`.
    :param deterministic: whether the teacher acts and labels without exploration. Learning a delicate gait from noisy
        labels takes far more of them.
    :param updates: gradient updates; None: as many as ``train_ratio`` demands for this many steps.
    :param fade_steps: steps of ``learn()`` until the teacher's weight is zero; None: twice ``n_steps``.
    :param student_share: share of the steps, the last ones, in which the model acts itself; 0: the teacher always acts.
    :param progress_bar: show progress, as in ``learn()``: steps, updates and final updates together.
    :raises ValueError: for other spaces, missing statistics, too few steps or a model without environment; before any
        work.
    :raises TypeError: for a teacher without ``predict``.
    """
    if model.env is None:
        raise ValueError("warm_start() needs an environment: give one to the constructor, to load() or to set_env()")
    model.check_settings()
    n_steps = as_whole("n_steps", n_steps, least=1)
    if n_steps < (needed := model.batch_length * model.n_envs):
        raise ValueError(
            f"n_steps={n_steps} makes no sequence of batch_length={model.batch_length} in each of {model.n_envs} "
            f"environments: give {needed} or more"
        )
    if not 0 <= student_share < 1:
        raise ValueError(f"student_share={student_share} must be at least 0 and below 1")
    policy = ExternalPolicy(model, teacher, vec_normalize, deterministic)
    prepare_training(model)
    per_step = model.train_ratio / (model.batch_size * model.batch_length)
    updates = int(n_steps * per_step) if updates is None else as_whole("updates", updates, least=0)
    fade = int((2 * n_steps if fade_steps is None else as_whole("fade_steps", fade_steps, least=0)) * per_step)
    arguments = WarmStartArguments(teacher, vec_normalize, deterministic, n_steps, updates, fade, student_share)
    cloning = model.imitation
    if (
        not isinstance(cloning, Cloning)
        or cloning.arguments != arguments
        or cloning.remaining(model._n_updates) == 0  # it was not interrupted
    ):
        labels = Labels(model.replay_buffer.heads(), model.policy.actions.spec.width)
        fade_from = model._n_updates + updates
        final_updates = n_steps // STEPS_PER_FINAL_UPDATE if updates else 0  # updates=0: only the steps
        cloning = Cloning(policy, model.policy.actor, labels, fade_from, fade, n_steps, final_updates, arguments)
    cloning.teacher = policy
    if model.num_timesteps == 0:
        begin_log(model)
    owed = model._entries_owed
    try:
        with progress(cloning.remaining(model._n_updates), "warm start", progress_bar) as advance:
            model.imitation = cloning
            if cloning.steps_left > 0:
                _take_steps(model, cloning, advance)
            require_replay(model, "warm_start()")
            train_until(model, cloning.fade_from, advance)
            clone_on_frozen_features(model, cloning, advance)
    finally:
        model._entries_owed = owed  # the updates for these steps are made: learn() must not make them again


def _take_steps(model: Dreamer, cloning: Cloning, advance: Advance) -> None:
    """The teacher's steps, then the model's own, with a share of the updates before each of the latter."""
    arguments = cloning.arguments
    by_student = int(arguments.n_steps * arguments.student_share)
    model.begin_episodes()
    try:
        while cloning.steps_left > 0:
            _step(model, cloning, teacher_acts=cloning.steps_left > by_student)
            advance(model.n_envs)
            if 0 < cloning.steps_left <= by_student and model.replay_buffer.can_sample():
                updates_left = arguments.updates * cloning.steps_left // arguments.n_steps
                train_until(model, cloning.fade_from - updates_left, advance)
    finally:
        model._last_obs = None  # the next learn() resets


def _step(model: Dreamer, cloning: Cloning, teacher_acts: bool) -> None:
    """One step of each environment, stored as the model's own."""
    env, policy = model.env, model.policy
    assert env is not None
    labels = cloning.label(model)
    last_obs: Any = model._last_obs
    actions, state = policy.predict(last_obs, model._online_state, model._last_episode_starts)
    actions = labels if teacher_acts else actions
    model._online_state = (state[0], policy.actions.encode(actions))
    cloning.teacher.observe_action(actions)
    stored = policy.actions.to_replay(actions)
    with name_dead_workers(env):
        outcome = env.step(actions)
    model.note_step(outcome[3])
    model._store_transition(model.replay_buffer, stored, *outcome)  # type: ignore[arg-type]
    model.num_timesteps += env.num_envs
    cloning.steps_left -= env.num_envs
