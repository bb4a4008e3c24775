"""What an agent asks of its environments, what it says when one is bad or dies, and what their wrappers remember."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize, unwrap_vec_normalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_dreamer.spaces import action_spec_of, check_action_bounds, observation_specs


def check_spaces(env: Any) -> None:
    """Refuse spaces that no policy can read or act in.

    :param env: an environment, or a vector of them.
    :raises ValueError: for infinite bounds of actions, and for actions and observations of a kind that has no code.
    :raises TypeError: for what is no environment.
    """
    if isinstance(env, VectorEnv):
        raise TypeError(f"{env} is a vector of Gymnasium's, SB3 has its own: stable_baselines3's make_vec_env(id, n)")
    if not hasattr(env, "action_space"):
        raise TypeError(f"{env!r} is no environment: give one of Gymnasium, a VecEnv, or the id of one")
    action_spec_of(env.action_space)
    check_action_bounds(env.action_space)
    observation_specs(env.observation_space)


def check_wrapping(env: VecEnv) -> None:
    """Refuse wrappers that change the observations after VecNormalize: the replay keeps what comes before it.

    :raises ValueError: if there is such a wrapper, or if it takes images for vectors.
    """
    normalize = unwrap_vec_normalize(env)
    if normalize is not None and (images := _normalised_images(normalize)):
        raise ValueError(
            f"VecNormalize makes {images} vectors of numbers, no longer images: give it norm_obs=False, or "
            "norm_obs_keys=[...] with the vectors alone"
        )
    if normalize is not None and normalize.observation_space != env.observation_space:
        raise ValueError(
            f"VecNormalize sees {normalize.observation_space}, the agent sees {env.observation_space}, but the replay "
            "keeps what comes before VecNormalize: so wrap it last, VecNormalize(VecTransposeImage(VecFrameStack(...)))"
        )


def _normalised_images(normalize: VecNormalize) -> list[str]:
    """Keys of the images that it normalises.

    Of a Dict it has overwritten the original parts: what shows images there is that their bounds are its own.
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
    """The moving statistics by name: "obs", followed by a key, and "returns"."""
    seen = getattr(normalize, "obs_rms", None) or {}
    seen = seen if isinstance(seen, dict) else {"": seen}
    return {**{f"obs {key}": one for key, one in seen.items()}, "returns": normalize.ret_rms}


def check_statistics(model: BaseAlgorithm, stacklevel: int) -> None:
    """Refuse statistics that a bad number has got into: all that they normalise is bad from then on.

    A Dreamer that learned from normalised observations and acts in an environment without statistics, or the reverse,
    is warned of.

    :raises ValueError: with what to do.
    """
    normalize = model.get_vec_normalize_env()
    normalised = normalize is not None and normalize.norm_obs
    learned = getattr(model, "trained_on_normalized_obs", normalised)
    if model.env is not None and model._n_updates > 0 and learned != normalised:
        warnings.warn(
            "this model learned from what a VecNormalize made of the observations, and its environment has none: "
            "load(path, env=VecNormalize.load(statistics, env))"
            if learned
            else "this model learned from observations as they are, and VecNormalize changes those of its environment: "
            "load(path, env=env) without it, or with norm_obs=False",
            stacklevel=stacklevel,
        )
    if normalize is None:
        return
    for name, one in statistics(normalize).items():
        used = normalize.norm_reward if name == "returns" else normalize.norm_obs
        if used and not (np.all(np.isfinite(one.mean)) and np.all(np.isfinite(one.var))):
            raise ValueError(
                f"the statistics of VecNormalize ({name.strip()}) are not finite, since an environment sent a number "
                "that was not: set_env() with a new VecNormalize, or with an older one that VecNormalize.load() reads"
            )


class ResetWatch:
    """Notices where somebody else, an evaluation perhaps, resets environments in which an agent is under way.

    SB3's vectors keep the infos of each reset, and replace them at the next one.
    """

    def __init__(self) -> None:
        self._noted: tuple[Any, ...] = ()

    def note(self, env: VecEnv | None) -> None:
        """Take the environments as they are now; before the next :meth:`reset_by_others`."""
        infos = self._infos(env)
        if isinstance(infos, list):  # of copies: an environment may give the same object each time
            infos[:] = map(copy.copy, infos)
        self._noted = tuple(infos)
        if self.reset_by_others(env):  # this vector builds its infos at each access, so they tell nothing
            self._noted = ()

    def reset_by_others(self, env: VecEnv | None) -> bool:
        """Whether they have been reset since they were noted."""
        return any(now is not then for now, then in zip(self._infos(env), self._noted, strict=False))

    @staticmethod
    def _infos(env: VecEnv | None) -> Any:
        return getattr(getattr(env, "unwrapped", None), "reset_infos", ())


@contextmanager
def name_dead_workers(env: VecEnv) -> Iterator[None]:
    """Around steps of SubprocVecEnv: say which worker died, where Python only knows of a broken pipe.

    With ``start_method="fork"`` the workers hold each other's pipes open, no pipe breaks, and SB3 waits for ever: use
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
            "collected is kept: save() and save_replay_buffer() work, and set_env() with new environments goes on"
        ) from error


@contextmanager
def step_named(number: int) -> Iterator[None]:
    """Around what stores a step: complete what the replay says about bad numbers.

    :param number: of the step.
    :raises ValueError: with the number and what to do.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"at environment step {number}: {error}. What was collected before is kept: "
            "save_replay_buffer() saves it, learn(reset_num_timesteps=False) goes on with a reset"
        ) from None


class NoteStep(BaseCallback):
    """Has the agent note after each step what the environments said, before another callback makes use of them."""

    def _on_step(self) -> bool:
        self.model.note_step(self.locals["infos"])  # type: ignore[attr-defined]
        return True


# -- what wrappers remember -------------------------------------------------------------------------------------------


def remembering(env: VecEnv) -> list[VecEnvWrapper]:
    """The wrappers that remember something, outermost first."""
    found: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize | VecFrameStack | VecMonitor):
            found.append(env)
        env = env.venv
    return found


def wrapper_state(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """What a wrapper remembers, as plain containers of numbers and arrays."""
    state: dict[str, Any] = {"kind": type(wrapper).__name__}
    if isinstance(wrapper, VecNormalize):
        stats = {key: (s.mean, s.var, s.count) for key, s in statistics(wrapper).items()}
        return {**state, "statistics": stats, "returns": wrapper.returns}
    if isinstance(wrapper, VecMonitor):
        return {**state, "returns": wrapper.episode_returns, "lengths": wrapper.episode_lengths}
    return {**state, "stacked": {key: one.stacked_obs for key, one in _stacks(wrapper).items()}}


def restore_wrapper(wrapper: VecEnvWrapper, state: dict[str, Any]) -> None:
    """Put back what :func:`wrapper_state` gave."""
    if isinstance(wrapper, VecNormalize):
        wrapper.returns = state["returns"]
        for key, one in statistics(wrapper).items():
            one.mean, one.var, one.count = state["statistics"][key]
    elif isinstance(wrapper, VecMonitor):
        wrapper.episode_returns, wrapper.episode_lengths = state["returns"], state["lengths"]
    elif isinstance(wrapper, VecFrameStack):
        for key, one in _stacks(wrapper).items():
            one.stacked_obs = state["stacked"][key]


def _stacks(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """SB3's stacks of observations by key."""
    stacked = wrapper.stacked_obs
    return dict(getattr(stacked, "sub_stacked_observations", None) or {"": stacked})
