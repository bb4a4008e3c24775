"""From a teacher to Dreamer: its experience, its policy on the model's latents, and critics that know its worth."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.environments import name_dead_workers
from sb3_dreamer.hybrid.cloning import STEPS_PER_REHEARSAL, Answers, Asked, Cloning, rehearse
from sb3_dreamer.hybrid.experience import prepare_training, require_replay, train_until
from sb3_dreamer.hybrid.guide import Guide
from sb3_dreamer.hybrid.progress import Advance, progress
from sb3_dreamer.knobs import as_whole, check_knobs


def warm_start(
    model: Dreamer,
    teacher: Any,
    n_steps: int,
    vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
    deterministic: bool = True,
    updates: int | None = None,
    fade_steps: int | None = None,
    student_share: float = 0.5,
    progress_bar: bool = False,
) -> None:
    """Let a teacher act, learn the world from it, imitate it, and only then improve on it.

    In the first steps the teacher acts. In the last ones the imitated policy does, and the teacher is asked what it
    would do there instead (DAgger, Ross et al. 2011): a policy that has only ever seen the teacher's states does not
    know the way back from its own mistakes. Meanwhile the critics and the return scale learn in dreams of the imitated
    policy. In ``learn()`` the teacher is asked on at each step, while its share in what the actor learns fades. If this
    is interrupted, the model can be used as it is, and the same call again takes the steps and updates that are
    missing; with another teacher or other numbers it begins anew. A teacher that fails in ``learn()`` is forgotten.
    ``save()`` does not keep what is left to do, nor the teacher: nothing draws a loaded model to it any more.

    :param model: whose environments the teacher acts in; they are reset first.
    :param teacher: a model of SB3 or sb3-contrib, anything with their ``predict``, or the path of a saved one.
    :param n_steps: environment steps, at least ``batch_length`` of each environment; they count as the model's own.
    :param vec_normalize: the statistics that the teacher was trained with, or their path; False: it needs none; None:
        those of its own environment, if it has one. Off-policy ones do not always tell whether they need them, see
        :func:`~sb3_dreamer.hybrid.guide.saw_normalised`.
    :param deterministic: whether the teacher acts and answers without exploring. To learn a delicate gait from noisy
        answers takes far more of them.
    :param updates: gradient updates; None: as many as ``train_ratio`` asks for this many steps.
    :param fade_steps: steps of ``learn()`` until nothing draws the actor to the teacher any more; None: twice
        ``n_steps``.
    :param student_share: share of the steps, the last ones, in which the model acts itself; 0: the teacher always acts.
    :param progress_bar: show how far it is, as in ``learn()``: steps, updates and rehearsals together.
    :raises ValueError: for other spaces, missing statistics, too few steps or a model without environment; before any
        work.
    :raises TypeError: for a teacher without ``predict``.
    """
    if model.env is None:
        raise ValueError("warm_start() needs an environment: give one to the constructor, to load() or to set_env()")
    check_knobs(vars(model))
    n_steps = as_whole("n_steps", n_steps, least=1)
    if n_steps < (needed := model.batch_length * model.n_envs):
        raise ValueError(
            f"n_steps={n_steps} makes no sequence of batch_length={model.batch_length} in each of {model.n_envs} "
            f"environments: give {needed} or more"
        )
    if not 0 <= student_share < 1:
        raise ValueError(f"student_share={student_share} has to be at least 0 and below 1")
    guide = Guide(model, teacher, vec_normalize, deterministic)
    prepare_training(model)
    per_step = model.train_ratio / (model.batch_size * model.batch_length)
    updates = int(n_steps * per_step) if updates is None else as_whole("updates", updates, least=0)
    fade = int((2 * n_steps if fade_steps is None else as_whole("fade_steps", fade_steps, least=0)) * per_step)
    asked = Asked(teacher, vec_normalize, deterministic, n_steps, updates, fade, student_share)
    cloning = model.imitation
    if not isinstance(cloning, Cloning) or cloning.asked != asked or cloning.left(model._n_updates) == 0:
        answers = Answers(model.replay_buffer.heads(), model.policy.action_spec.width)
        fade_from = model._n_updates + updates
        rehearsals = n_steps // STEPS_PER_REHEARSAL if updates else 0  # updates=0: only the steps
        cloning = Cloning(guide, model.policy.actor, answers, fade_from, fade, n_steps, rehearsals, asked)
    cloning.guide = guide
    owed = model._entries_owed
    try:
        with progress(cloning.left(model._n_updates), "warm start", progress_bar) as advance:
            model.imitation = cloning
            if cloning.steps_left > 0:
                _take_steps(model, cloning, advance)
            require_replay(model, "warm_start()")
            train_until(model, cloning.fade_from, advance)
            rehearse(model, cloning, advance)
    finally:
        model._entries_owed = owed  # learn() is not to pay for these steps once more


def _take_steps(model: Dreamer, cloning: Cloning, advance: Advance) -> None:
    """The teacher's steps, then the model's own, with a share of the updates before each of these."""
    asked = cloning.asked
    by_student = int(asked.n_steps * asked.student_share)
    model.begin_episodes()
    try:
        while cloning.steps_left > 0:
            _step(model, cloning, teacher_acts=cloning.steps_left > by_student)
            advance(model.n_envs)
            if 0 < cloning.steps_left <= by_student and model.replay_buffer.can_sample():
                train_until(model, cloning.fade_from - asked.updates * cloning.steps_left // asked.n_steps, advance)
    finally:
        model._last_obs = None  # the next learn() resets


def _step(model: Dreamer, cloning: Cloning, teacher_acts: bool) -> None:
    """One step of each environment, stored as the model's own."""
    env, policy = model.env, model.policy
    assert env is not None
    answers = cloning.ask(model)
    last_obs: Any = model._last_obs
    actions, state = policy.predict(last_obs, model._online_state, model._last_episode_starts)
    actions = answers if teacher_acts else actions
    model._online_state = (state[0], policy.encode_action(actions))
    cloning.guide.memory = cloning.guide.with_action(cloning.guide.memory, actions)
    stored = policy.replay_action(actions)
    with name_dead_workers(env):
        outcome = env.step(actions)
    model.note_step(outcome[3])
    model._store_transition(model.replay_buffer, stored, *outcome)  # type: ignore[arg-type]
    model.num_timesteps += env.num_envs
    cloning.steps_left -= env.num_envs
