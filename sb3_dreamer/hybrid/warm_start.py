"""From a teacher to Dreamer: its experience, its policy on the model's latents, and critics that know its worth."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dreamer.behavior.actor_critic import Actor
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.experience import ensure_logger, require_replay
from sb3_dreamer.spaces import check_counted_from_zero
from sb3_dreamer.types import Batch

CHUNK = 16  # updates between two looks at how far the cloning has faded


@dataclass
class Cloning:
    """The actor imitates the teacher on the teacher's entries of the replay; this fades, and its own aims take over::

        weight   1 |-------------.
                   |  (only the   `-.
                   |   teacher)      `-.
                 0 |                    `-----------   (only its own)
                      warm_start   learn()             updates

    :param first: (n_envs,) number of the teacher's first entry in each environment.
    :param until: (n_envs,) number after its last one.
    :param fade_from: count of updates at which the weight begins to fall.
    :param fade_updates: updates until it is zero.
    :param steps_left: environment steps that the teacher has yet to take.
    :param asked: what ``warm_start`` was asked for.
    """

    spans: list[tuple[np.ndarray, np.ndarray]]
    fade_from: int
    fade_updates: int
    steps_left: int
    asked: tuple[int, int | None, int | None]

    def weight(self, n_updates: int) -> float:
        """Share of the teacher after some updates."""
        return float(np.clip(1 - (n_updates - self.fade_from) / max(self.fade_updates, 1), 0.0, 1.0))

    def mix(self, own: th.Tensor, actor: Actor, features: th.Tensor, batch: Batch, n_updates: int) -> th.Tensor:
        """The actor's loss: its own (), and the negative log-likelihood of what the teacher did.

        :param own: loss of the actor in its dreams, ().
        :param actor: the actor.
        :param features: (B, T, F) of the batch.
        :param batch: sequences, with the teacher's among them.
        :param n_updates: updates so far.
        """
        weight = self.weight(n_updates)
        if weight == 0.0:
            return own
        env, number = batch.index[:, :1], batch.index[:, 1:] + np.arange(batch.reward.shape[1])
        by_teacher = np.any([(number >= first[env]) & (number < until[env]) for first, until in self.spans], axis=0)
        taught = th.as_tensor(by_teacher, device=own.device) & ~batch.is_last  # the last entry has no action
        error = -actor(features.detach()).log_prob(batch.action)
        return (1 - weight) * own + weight * (error * taught).sum() / taught.sum().clamp(min=1)


def warm_start(
    model: Dreamer,
    teacher: Any,
    n_steps: int,
    vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
    deterministic: bool = False,
    updates: int | None = None,
    fade_steps: int | None = None,
) -> None:
    """Let a teacher act, learn the world from it, imitate it, and only then improve on it.

    Meanwhile the critics and the return scale learn in dreams of the imitated policy. If this is interrupted, the model
    can be used as it is, and the same call again takes the steps and updates that are missing; with other numbers it
    begins anew. ``save()`` does not keep what is left to do: nothing draws a loaded model to the teacher any more.

    :param model: whose environments the teacher acts in; they are reset first.
    :param teacher: a model of SB3 or sb3-contrib, anything with their ``predict``, or the path of a saved one.
    :param n_steps: environment steps; they count as the model's own.
    :param vec_normalize: the statistics that the teacher was trained with, or their path; False: it needs none; None:
        those of its own environment, if it has one. Off-policy ones do not always tell whether they need them, see
        :func:`saw_normalised`.
    :param deterministic: whether the teacher acts without exploring.
    :param updates: gradient updates; None: as many as ``train_ratio`` asks for this many steps.
    :param fade_steps: steps of ``learn()`` until nothing draws the actor to the teacher any more; None: ``n_steps``.
    :raises ValueError: for other spaces, missing statistics or a model without environment; before any work.
    """
    if model.env is None:
        raise ValueError("warm_start() needs an environment: give one to the constructor, to load() or to set_env()")
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps} has to be at least 1")
    guide = Guide(model, teacher, vec_normalize)
    per_step = model.train_ratio / (model.batch_size * model.batch_length)
    cloning: Cloning | None = model._cloning
    asked = n_steps, updates, fade_steps
    done = cloning is None or (cloning.steps_left <= 0 and model._n_updates >= cloning.fade_from)
    if cloning is None or done or cloning.asked != asked:
        due = model._n_updates + (int(n_steps * per_step) if updates is None else updates)
        fade = int((n_steps if fade_steps is None else fade_steps) * per_step)
        cloning = model._cloning = Cloning([], due, fade, n_steps, asked)
    guide.act(model, cloning, deterministic)
    require_replay(model, "warm_start()")
    ensure_logger(model)
    model._current_progress_remaining = 1.0  # a schedule that has run out would stop all learning
    while model._n_updates < cloning.fade_from:
        model.train(min(CHUNK, cloning.fade_from - model._n_updates), model.batch_size)
    model._entries_owed = 0.0


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

    def act(self, model: Dreamer, cloning: Cloning, deterministic: bool) -> None:
        """Take the steps that are left, and store them as the model's own. The next ``learn()`` resets."""
        if cloning.steps_left <= 0:
            return
        env, policy, normalize = model.env, model.policy, model.get_vec_normalize_env()
        assert env is not None
        model.begin_episodes()
        first = model.replay_buffer.heads()
        cloning.spans.append((first, first))
        memory = None
        try:
            while cloning.steps_left > 0:
                start = model._last_episode_starts
                shown = model._last_obs if normalize is None else model._last_original_obs
                shown = shown if self.normalize is None else self.normalize.normalize_obs(shown)  # type: ignore[arg-type]
                actions, memory = self.teacher.predict(shown, memory, start, deterministic)
                _, state = policy.predict(model._last_obs, model._online_state, start)  # type: ignore[arg-type]
                assert state is not None
                model._online_state = (state[0], policy.encode_action(actions))
                stored = policy.replay_action(actions)
                model._store_transition(model.replay_buffer, stored, *env.step(actions))  # type: ignore[arg-type]
                model.num_timesteps += env.num_envs
                cloning.steps_left -= env.num_envs
                cloning.spans[-1] = first, model.replay_buffer.heads()
        finally:
            model._last_obs = None


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
        seen, original, space = {"obs": seen}, {"obs": original}, {"obs": space}
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
