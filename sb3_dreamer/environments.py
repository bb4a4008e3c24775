"""Checks of environments and their wrappers, and what an agent reports when one is bad or dies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_dreamer.actions import ActionCodec
from sb3_dreamer.spaces import observation_specs

NEW_STATISTICS = "the VecNormalize of the environment has seen no observation yet"


def check_spaces(env: Any) -> None:
    """Refuse spaces that no policy supports.

    :param env: an environment, or a vector of them.
    :raises ValueError: for infinite bounds of actions, and for unsupported kinds of spaces.
    :raises TypeError: for anything but an environment of SB3 or Gymnasium.
    """
    if isinstance(env, VectorEnv):
        raise TypeError(f"{env} is a vector environment of Gymnasium, SB3 has its own: use SB3's make_vec_env(id, n)")
    if not hasattr(env, "action_space"):
        raise TypeError(f"{env!r} is no environment: give one of Gymnasium, a VecEnv, or the id of one")
    ActionCodec(env.action_space)  # refuses what it cannot translate
    observation_specs(env.observation_space)


def check_wrapping(env: VecEnv) -> None:
    """Refuse wrappers that change the observations after VecNormalize: the replay stores what comes before it.

    :raises ValueError: if there is such a wrapper, or if VecNormalize normalizes images.
    """
    normalize = unwrap_vec_normalize(env)
    if normalize is not None and (images := _normalized_images(normalize)):
        raise ValueError(
            f"VecNormalize turns {images} into vectors of floats, which are no images: give it norm_obs=False, or "
            "norm_obs_keys=[...] with the vectors alone"
        )
    if normalize is not None and normalize.observation_space != env.observation_space:
        raise ValueError(
            f"VecNormalize sees {normalize.observation_space}, the agent sees {env.observation_space}, but the replay "
            "stores what comes before VecNormalize: wrap it last, VecNormalize(VecTransposeImage(VecFrameStack(...)))"
        )


def _normalized_images(normalize: VecNormalize) -> list[str]:
    """Keys of the images that it normalizes.

    It has overwritten the original parts of a Dict space: images are those whose bounds are its own.
    """
    if not normalize.norm_obs:
        return []
    original, clip = normalize.venv.observation_space, normalize.clip_obs
    if not isinstance(original, spaces.Dict):
        return ["obs"] if is_image_space(original) else []
    keys = original.keys() if normalize.norm_obs_keys is None else normalize.norm_obs_keys
    boxes = {key: part for key in keys if isinstance(part := original[key], spaces.Box) and len(part.shape) == 3}
    return [key for key, box in boxes.items() if np.all(box.low == -clip) and np.all(box.high == clip)]


def statistics(normalize: VecNormalize) -> dict[str, RunningMeanStd]:
    """The running statistics by name: "obs", followed by a key, and "returns"."""
    obs_rms = getattr(normalize, "obs_rms", None) or {}
    obs_rms = obs_rms if isinstance(obs_rms, dict) else {"": obs_rms}
    return {**{f"obs {key}": rms for key, rms in obs_rms.items()}, "returns": normalize.ret_rms}


def normalizes_obs(normalize: VecNormalize | None) -> TypeGuard[VecNormalize]:
    """Whether there is a VecNormalize, and it normalizes observations."""
    return normalize is not None and normalize.norm_obs


def sees_other_units(model: Any, normalize: VecNormalize | None) -> bool:
    """Whether a trained Dreamer learned from normalized observations and would see original ones, or the reverse.

    SB3's own algorithms do not record what they learned from.
    """
    normalized = normalizes_obs(normalize)
    return model._n_updates > 0 and getattr(model, "trained_on_normalized_obs", normalized) != normalized


def check_statistics(model: Any, stacklevel: int) -> None:
    """Check the VecNormalize of a Dreamer, or that it has none.

    :raises ValueError: as :func:`_check_finite`.
    """
    normalize = model.get_vec_normalize_env()
    if model.env is not None and sees_other_units(model, normalize):
        _warn_of_other_units(model, stacklevel + 1)
    if normalize is not None:
        _check_finite(normalize)


def _warn_of_other_units(model: Any, stacklevel: int) -> None:
    """Warn that a Dreamer trained on normalized observations has no VecNormalize, or the reverse."""
    warnings.warn(
        "this model learned from what a VecNormalize made of the observations, and its environment has none: "
        "load(path, env=VecNormalize.load(statistics, env))"
        if model.trained_on_normalized_obs
        else "this model learned from observations as they are, and VecNormalize changes those of its environment: "
        "load(path, env=env) without it, or with norm_obs=False",
        stacklevel=stacklevel,
    )


def warn_of_new_statistics(model: Any, stacklevel: int) -> None:
    """Warn that a trained Dreamer has been loaded with a VecNormalize that has seen no observation yet."""
    normalize = model.get_vec_normalize_env()
    if model._n_updates == 0 or not normalizes_obs(normalize) or sees_other_units(model, normalize):
        return
    if all(rms.count < 1 for name, rms in statistics(normalize).items() if name != "returns"):
        warnings.warn(
            f"{NEW_STATISTICS}, this model learned with others: load(path, env=VecNormalize.load(statistics, env))",
            stacklevel=stacklevel,
        )


def _check_finite(normalize: VecNormalize) -> None:
    """Refuse statistics that are not finite, since all that they normalize would not be either.

    :raises ValueError: with what to do.
    """
    for name, rms in statistics(normalize).items():
        used = normalize.norm_reward if name == "returns" else normalize.norm_obs
        if used and not (np.all(np.isfinite(rms.mean)) and np.all(np.isfinite(rms.var))):
            raise ValueError(
                f"the statistics of VecNormalize ({name.strip()}) are not finite, since an environment sent a number "
                "that was not: set_env() with a new VecNormalize, or with an older one from VecNormalize.load()"
            )


class ResetWatch:
    """Detects that someone else, an evaluation perhaps, has reset environments in the middle of an episode.

    SB3's vectors keep the infos of each reset, and replace them at the next one.
    """

    def __init__(self) -> None:
        self._noted: tuple[Any, ...] = ()

    def note(self, env: VecEnv | None) -> None:
        """Record the current state of the environments, to compare with in :meth:`reset_by_others`."""
        infos = self._infos(env)
        if isinstance(infos, list):  # of copies: an environment may return the same object each time
            infos[:] = map(copy.copy, infos)
        self._noted = tuple(infos)
        if self.reset_by_others(env):  # this vector builds its infos at each access, so they say nothing
            self._noted = ()

    def reset_by_others(self, env: VecEnv | None) -> bool:
        """Whether they have been reset since the last :meth:`note`."""
        # without a note, or with other environments, the lengths may differ
        return any(now is not then for now, then in zip(self._infos(env), self._noted, strict=False))

    @staticmethod
    def _infos(env: VecEnv | None) -> Any:
        return getattr(getattr(env, "unwrapped", None), "reset_infos", ())


@contextmanager
def name_dead_workers(env: VecEnv) -> Iterator[None]:
    """Around steps of SubprocVecEnv: say which worker died, instead of a bare error about a broken pipe.

    With ``start_method="fork"`` the workers hold each other's pipes open, no pipe breaks, and SB3 waits forever: use
    its default, "forkserver".

    :raises RuntimeError: if a worker died.
    """
    try:
        yield
    except (EOFError, OSError) as error:
        workers = list(enumerate(getattr(env, "processes", [])))
        for _, process in workers:
            process.join(0.2)  # its pipe breaks a moment before it is gone
        dead = {i: process.exitcode for i, process in workers if not process.is_alive()}
        if not dead:
            raise
        raise RuntimeError(
            f"processes of environments died, number and exit code: {dead} (-9: killed, often for memory). What was "
            "collected is kept: save() and save_replay_buffer() work, and set_env() with new environments continues"
        ) from error


@contextmanager
def step_named(number: int) -> Iterator[None]:
    """Add the step number and what to do to errors raised while a step is stored.

    :param number: of the step.
    :raises ValueError: with the number and what to do.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"at environment step {number}: {error}. What was collected before is kept: "
            "save_replay_buffer() saves it, learn(reset_num_timesteps=False) continues with a reset"
        ) from None


class NoteStep(BaseCallback):
    """Lets the agent record the outcome of each step before another callback uses the environments."""

    def _on_step(self) -> bool:
        self.model.note_step(self.locals["infos"])  # type: ignore[attr-defined]
        return True
