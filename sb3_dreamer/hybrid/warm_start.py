"""From a teacher to Dreamer: its experience, its policy on the model's latents, and critics that know its worth."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.cloning import REHEARSALS, Answers, Cloning, rehearse
from sb3_dreamer.hybrid.experience import prepare_training, require_replay, train_until
from sb3_dreamer.hybrid.progress import Advance, progress
from sb3_dreamer.spaces import check_counted_from_zero


def warm_start(
    model: Dreamer,
    teacher: Any,
    n_steps: int,
    vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
    deterministic: bool = False,
    updates: int | None = None,
    fade_steps: int | None = None,
    student_share: float = 0.5,
    progress_bar: bool = False,
) -> None:
    """Let a teacher act, learn the world from it, imitate it, and only then improve on it.

    In the first steps the teacher acts. In the last ones the imitated policy does, and the teacher is asked what it
    would do there instead (DAgger, Ross et al. 2011): a policy that has only ever seen the teacher's states does not
    know the way back from its own mistakes. Meanwhile the critics and the return scale learn in dreams of the imitated
    policy. If this is interrupted, the model can be used as it is, and the same call again takes the steps and updates
    that are missing; with other numbers it begins anew. ``save()`` does not keep what is left to do: nothing draws a
    loaded model to the teacher any more.

    :param model: whose environments the teacher acts in; they are reset first.
    :param teacher: a model of SB3 or sb3-contrib, anything with their ``predict``, or the path of a saved one.
    :param n_steps: environment steps; they count as the model's own.
    :param vec_normalize: the statistics that the teacher was trained with, or their path; False: it needs none; None:
        those of its own environment, if it has one. Off-policy ones do not always tell whether they need them, see
        :func:`saw_normalised`.
    :param deterministic: whether the teacher acts without exploring.
    :param updates: gradient updates; None: as many as ``train_ratio`` asks for this many steps.
    :param fade_steps: steps of ``learn()`` until nothing draws the actor to the teacher any more; None: ``n_steps``.
    :param student_share: share of the steps, the last ones, in which the model acts itself; 0: the teacher always acts.
    :param progress_bar: show how far it is, as in ``learn()``: steps, updates and rehearsals together.
    :raises ValueError: for other spaces, missing statistics or a model without environment; before any work.
    """
    if model.env is None:
        raise ValueError("warm_start() needs an environment: give one to the constructor, to load() or to set_env()")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps} has to be at least 1")
    if not 0 <= student_share < 1:
        raise ValueError(f"student_share={student_share} has to be at least 0 and below 1")
    guide = Guide(model, teacher, vec_normalize)
    per_step = model.train_ratio / (model.batch_size * model.batch_length)
    updates = int(n_steps * per_step) if updates is None else updates
    fade = int((n_steps if fade_steps is None else fade_steps) * per_step)
    asked = n_steps, updates, fade, student_share
    cloning: Cloning | None = model._cloning
    if cloning is None or cloning.asked != asked or cloning.left(model._n_updates) == 0:
        answers = Answers(model.replay_buffer.heads(), model.policy.action_spec.width)
        fade_from, rehearsals = model._n_updates + updates, min(REHEARSALS, updates)
        cloning = model._cloning = Cloning(answers, fade_from, fade, n_steps, rehearsals, asked)
    prepare_training(model)
    with progress(cloning.left(model._n_updates), "warm start", progress_bar) as advance:
        if cloning.steps_left > 0:
            _take_steps(model, guide, cloning, deterministic, advance)
        require_replay(model, "warm_start()")
        train_until(model, cloning.fade_from, advance)
        rehearse(model, cloning, advance)
    model._entries_owed = 0.0


def _take_steps(model: Dreamer, guide: Guide, cloning: Cloning, deterministic: bool, advance: Advance) -> None:
    """The teacher's steps, then the model's own, with a share of the updates before each of these."""
    n_steps, updates, _, student_share = cloning.asked
    by_student = int(n_steps * student_share)
    model.begin_episodes()
    try:
        while cloning.steps_left > 0:
            guide.step(model, cloning, deterministic, teacher_acts=cloning.steps_left > by_student)
            advance(model.n_envs)
            if 0 < cloning.steps_left <= by_student and model.replay_buffer.can_sample():
                train_until(model, cloning.fade_from - updates * cloning.steps_left // n_steps, advance)
    finally:
        model._last_obs = None  # the next learn() resets


class Guide:
    """A teacher and what it is to be shown.

    :param model: whose environments it acts in.
    :param teacher: as in :func:`warm_start`.
    :param vec_normalize: as in :func:`warm_start`.
    :raises ValueError: if it cannot act there.
    """

    def __init__(
        self, model: Dreamer, teacher: Any, vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None
    ) -> None:
        env = raw_env(model)
        normalised = isinstance(teacher, BaseAlgorithm) and saw_normalised(vars(teacher))
        if isinstance(teacher, str | pathlib.Path):
            teacher, normalised = load_policy(teacher, model.device)
        check_counted_from_zero(env.action_space)
        if vec_normalize is None and hasattr(teacher, "get_vec_normalize_env"):
            vec_normalize = teacher.get_vec_normalize_env()
        if vec_normalize is None and normalised:
            raise ValueError(
                "the teacher was trained with VecNormalize and cannot act without its statistics: "
                "give vec_normalize=, the VecNormalize or the path that its save() wrote to; False, if this is wrong"
            )
        if isinstance(vec_normalize, str | pathlib.Path):
            vec_normalize = VecNormalize.load(str(vec_normalize), env)
        self.teacher, self.normalize = teacher, vec_normalize or None
        self.memory: Any = None  # of a recurrent teacher
        shown = self.normalize.observation_space if self.normalize else env.observation_space
        for name, given, own in (
            ("observations", shown, teacher.observation_space),
            ("actions", env.action_space, teacher.action_space),
        ):
            if given != own:
                raise ValueError(
                    f"the teacher's {name} are {own}, here they are {given}: "
                    "use the environment and the wrappers that it was trained with"
                )

    def step(self, model: Dreamer, cloning: Cloning, deterministic: bool, teacher_acts: bool) -> None:
        """One step of each environment, stored as the model's own, and what the teacher does there or would do."""
        env, policy = model.env, model.policy
        assert env is not None
        start = model._last_episode_starts
        shown = model.original_obs if self.normalize is None else self.normalize.normalize_obs(model.original_obs)
        answers, self.memory = self.teacher.predict(shown, self.memory, start, deterministic)
        actions, state = policy.predict(model._last_obs, model._online_state, start)  # type: ignore[arg-type]
        assert state is not None
        actions = answers if teacher_acts else actions
        model._online_state = (state[0], policy.encode_action(actions))
        cloning.answers.note(model.replay_buffer.heads(), policy.encode_action(answers))
        stored = policy.replay_action(actions)
        outcome = env.step(actions)
        model.note_step(outcome[3])
        model._store_transition(model.replay_buffer, stored, *outcome)  # type: ignore[arg-type]
        model.num_timesteps += env.num_envs
        cloning.steps_left -= env.num_envs


def raw_env(model: Dreamer) -> VecEnv:
    """The model's environments without normalisation."""
    normalize = model.get_vec_normalize_env()
    assert model.env is not None
    return model.env if normalize is None else normalize.venv


def saw_normalised(attributes: Mapping[str, Any]) -> bool:
    """Whether an SB3 algorithm, by what it keeps of its last step, was given normalised observations.

    On-policy ones keep an original observation only if their environment normalises, be it rewards alone. Off-policy
    ones always do; normalised ones are float32 and know no bounds, so that those of float64 environments, as MuJoCo's,
    and those beyond the bounds are told.

    :param attributes: of the algorithm, or out of its file.
    """
    seen, original = attributes.get("_last_obs"), attributes.get("_last_original_obs")
    if seen is None or original is None:
        return False
    if "gae_lambda" in attributes:
        return True
    space = attributes["observation_space"]
    if not isinstance(seen, dict):
        seen, original, space = ({"obs": part} for part in (seen, original, space))
    return any(
        part.dtype != original[key].dtype
        or (isinstance(space[key], spaces.Box) and bool(np.any((part < space[key].low) | (part > space[key].high))))
        for key, part in seen.items()
    )


def load_policy(path: str | pathlib.Path, device: th.device) -> tuple[BasePolicy, bool]:
    """The policy out of the file of any SB3 algorithm, and whether the file tells of a VecNormalize.

    :raises ValueError: if the file holds no algorithm of SB3.
    """
    data, params, _ = load_from_zip_file(path, device=device)
    if data is None or "policy" not in params:
        raise ValueError(f"{path} holds no algorithm of SB3: give the file that its save() wrote")
    kwargs = dict(data["policy_kwargs"])
    if data.get("use_sde"):
        kwargs["use_sde"] = True
    policy = data["policy_class"](data["observation_space"], data["action_space"], lambda _: 0.0, **kwargs).to(device)
    policy.load_state_dict(params["policy"])
    return policy, saw_normalised(data)
