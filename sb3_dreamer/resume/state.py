"""The state of a run that ``save`` leaves out, as plain data, and how to restore it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

from sb3_dreamer.environments import statistics

if TYPE_CHECKING:
    from sb3_dreamer.dreamer import Dreamer

FORMAT = 4
AGENT_ATTRIBUTES = ("_last_obs", "_last_original_obs", "_last_episode_starts", "_online_state")


def run_state(model: Dreamer) -> dict[str, Any]:
    """The state that ``save`` leaves out, as plain containers of numbers, strings and arrays."""
    assert model.env is not None
    return {
        "format": FORMAT,
        "run_id": model.run_id,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()],
        "action_space": model.action_space.np_random.bit_generator.state,
        "agent": {name: getattr(model, name) for name in AGENT_ATTRIBUTES},
        "wrappers": [_wrapper_state(wrapper) for wrapper in _stateful_wrappers(model.env)],
        "environments": model.env.env_method("resume_state") if _restorable(model.env) else None,
        "episodes": _running_episodes(model.env),
    }


def restore_run_state(model: Dreamer, state: dict[str, Any]) -> None:
    """Restore a :func:`run_state`; the random states last, since a reset of the environment may draw numbers.

    :raises ValueError: if the environment is wrapped in another way than the one of the run.
    """
    env = model.env
    assert env is not None
    model.run_id = state["run_id"]
    if state["environments"] is not None and state["agent"]["_last_obs"] is not None and _restorable(env):
        _restore_environments(env, state["environments"], state["episodes"])
        for name, value in state["agent"].items():
            setattr(model, name, value)
        model.resets.note(env)
    elif model.seed is not None:
        env.seed(model.seed + model.num_timesteps)  # not the first episodes of the run again
    wrappers = _stateful_wrappers(env)
    kinds, saved_kinds = (
        [type(wrapper).__name__ for wrapper in wrappers],
        [saved["kind"] for saved in state["wrappers"]],
    )
    if kinds != saved_kinds:
        raise ValueError(
            f"the environments are wrapped in {kinds}, those of the run in {saved_kinds}: wrap them the same way"
        )
    for wrapper, saved in zip(wrappers, state["wrappers"], strict=True):
        _restore_wrapper(wrapper, saved)
    model.action_space.np_random.bit_generator.state = state["action_space"]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    th.set_rng_state(th.from_numpy(state["torch"]))
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(rng_state) for rng_state in state["cuda"]])


def _restore_environments(env: VecEnv, states: list[Any], episodes: dict[str, list[Any]]) -> None:
    """Restore each environment, and the wrappers around it."""
    env.reset()
    for i, state in enumerate(states):
        env.env_method("set_resume_state", state, indices=i)
    for name, values in episodes.items():
        for i, value in enumerate(values):
            env.env_method("set_wrapper_attr", name, value, indices=i)


def _restorable(env: VecEnv) -> bool:
    return all(env.has_attr(name) for name in ("resume_state", "set_resume_state"))


def _running_episodes(env: VecEnv) -> dict[str, list[Any]]:
    """The state that TimeLimit and Monitor, around single environments, keep of the running episodes."""
    names = ["_elapsed_steps"] if env.has_attr("_elapsed_steps") else []
    names += ["rewards"] if all(env.env_is_wrapped(Monitor)) else []
    return {name: env.get_attr(name) for name in names}


# -- wrappers around the vector of environments -----------------------------------------------------------------------


def _stateful_wrappers(env: VecEnv) -> list[VecEnvWrapper]:
    """The wrappers with a state, outermost first."""
    found: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize | VecFrameStack | VecMonitor):
            found.append(env)
        env = env.venv
    return found


def _wrapper_state(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """The state of a wrapper, as plain containers of numbers and arrays."""
    state: dict[str, Any] = {"kind": type(wrapper).__name__}
    if isinstance(wrapper, VecNormalize):
        stats = {key: (rms.mean, rms.var, rms.count) for key, rms in statistics(wrapper).items()}
        return {**state, "statistics": stats, "returns": wrapper.returns}
    if isinstance(wrapper, VecMonitor):
        return {**state, "returns": wrapper.episode_returns, "lengths": wrapper.episode_lengths}
    return {**state, "stacked": {key: stack.stacked_obs for key, stack in _stacks(wrapper).items()}}


def _restore_wrapper(wrapper: VecEnvWrapper, state: dict[str, Any]) -> None:
    """Restore a :func:`_wrapper_state`."""
    if isinstance(wrapper, VecNormalize):
        wrapper.returns = state["returns"]
        for key, rms in statistics(wrapper).items():
            rms.mean, rms.var, rms.count = state["statistics"][key]
    elif isinstance(wrapper, VecMonitor):
        wrapper.episode_returns, wrapper.episode_lengths = state["returns"], state["lengths"]
    elif isinstance(wrapper, VecFrameStack):
        for key, stack in _stacks(wrapper).items():
            stack.stacked_obs = state["stacked"][key]


def _stacks(wrapper: VecEnvWrapper) -> dict[str, Any]:
    """SB3's stacks of observations by key."""
    stacked = wrapper.stacked_obs
    return dict(getattr(stacked, "sub_stacked_observations", None) or {"": stacked})


# -- plain data --------------------------------------------------------------------------------------------------------


def to_tensors(value: Any) -> Any:
    """Plain data with its arrays as tensors, which torch can read without running code.

    :raises TypeError: for anything else, which torch would write but refuse to read.
    """
    if isinstance(value, np.ndarray | np.generic):
        return th.from_numpy(np.array(value))
    if isinstance(value, dict):
        return {key: to_tensors(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(to_tensors, value))
    if value is None or isinstance(value, int | float | complex | str | bytes):
        return value
    raise TypeError(
        f"a checkpoint cannot hold the {type(value).__name__} that resume_state() of an environment returns: it "
        "takes arrays, numbers, strings, bytes, and tuples, lists and dicts of these"
    )


def to_arrays(value: Any) -> Any:
    """Inverse of :func:`to_tensors`."""
    if isinstance(value, th.Tensor):
        return value.numpy()[()]  # one number is a NumPy number again, of its own type
    if isinstance(value, dict):
        return {key: to_arrays(part) for key, part in value.items()}
    return type(value)(map(to_arrays, value)) if isinstance(value, list | tuple) else value
