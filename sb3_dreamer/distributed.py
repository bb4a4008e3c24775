"""Environments on the machines of a Ray cluster, as one SB3 VecEnv: for simulators that need more than one machine.

    ray start --head                                  # on this machine, and on each other one:
    ray start --address=<this machine>:6379

    env = RayVecEnv([make_env] * 64, envs_per_worker=4)
    Dreamer("MlpPolicy", env).learn(1_000_000)        # or any other algorithm of SB3

The agent acts for all environments together and learns where it runs; only observations, actions and infos are
transferred. Without a cluster Ray starts one on this machine. Ray gives its workers a low priority; if they share a
machine with the agent, set ``RAY_worker_niceness=0`` before Ray starts, or the simulators wait for the updates.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

try:
    import ray
except ImportError as error:
    raise ImportError('sb3_dreamer.distributed needs Ray: pip install "sb3-dreamer[distributed]"') from error


class Worker(DummyVecEnv):
    """Some of the environments, in a process of its own somewhere in the cluster."""

    def seeded_reset(
        self, seeds: list[int | None], options: list[dict[str, Any]]
    ) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        """Reset all with these seeds and options: first observations and infos."""
        self._seeds, self._options = seeds, copy.deepcopy(options)  # arguments from Ray are read-only
        return self.reset(), self.reset_infos

    def step_with_reset_infos(self, actions: np.ndarray) -> tuple[VecEnvStepReturn, list[dict[str, Any] | None]]:
        """One step of all, and the infos of resets; None where no episode has ended."""
        step = self.step(np.array(actions))
        return step, [info if done else None for info, done in zip(self.reset_infos, step[2], strict=True)]

    def call_on(self, index: int, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Result of ``get_attr``, ``set_attr``, ``env_method`` or ``env_is_wrapped`` for one environment."""
        args, kwargs = copy.deepcopy((args, kwargs))
        result = getattr(self, method)(*args, indices=index, **kwargs)
        return None if result is None else result[0]


class RayVecEnv(VecEnv):
    """An SB3 VecEnv whose environments run in the workers of a Ray cluster; all workers step at the same time.

    :param env_fns: functions that make one environment each; sent to the workers, whose machines need the packages.
    :param envs_per_worker: environments that share a process and step in turn; use more of them for cheap simulators.
    :param num_cpus: CPUs that a worker reserves; a fraction if workers mostly wait. If the cluster has fewer left, this
        warns and waits, since a cluster may grow.
    :raises ValueError: without environments, and for less than one in a worker.
    :raises RuntimeError: if a worker cannot make its environments.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], envs_per_worker: int = 1, num_cpus: float = 1) -> None:
        if not env_fns or envs_per_worker < 1:
            raise ValueError(f"{len(env_fns)} env_fns and envs_per_worker={envs_per_worker}: both must be at least 1")
        if not ray.is_initialized():
            ray.init()
        _warn_if_too_few_cpus(math.ceil(len(env_fns) / envs_per_worker), num_cpus)
        shares = [list(env_fns[i : i + envs_per_worker]) for i in range(0, len(env_fns), envs_per_worker)]
        remote: Any = ray.remote(num_cpus=num_cpus)(Worker)
        self.workers: list[Any] = [remote.remote(share) for share in shares]
        self._places = [(w, i) for w, share in enumerate(shares) for i in range(len(share))]
        self._cuts = np.cumsum([len(share) for share in shares])[:-1]
        self._pending: list[Any] = []
        try:
            spaces = [self._call_on([0], "get_attr", name)[0] for name in ("observation_space", "action_space")]
            super().__init__(len(env_fns), *spaces)
        except RuntimeError as error:
            raise RuntimeError(
                f"an environment could not be made: {error.__cause__}. Every machine of the cluster needs its packages"
            ) from error

    def reset(self) -> VecEnvObs:
        """Reset all, with the seeds and options that were set."""
        calls = []
        for w, worker in enumerate(self.workers):
            envs = [env for env, (place, _) in enumerate(self._places) if place == w]
            seeds, options = [self._seeds[env] for env in envs], [self._options[env] for env in envs]
            calls.append(worker.seeded_reset.remote(seeds, options))
        obs, infos = zip(*self._wait(calls), strict=True)
        self.reset_infos = list(chain.from_iterable(infos))
        self._reset_seeds()
        self._reset_options()
        return _joined(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Send each worker its actions."""
        parts = np.split(np.asarray(actions), self._cuts)
        calls = zip(self.workers, parts, strict=True)
        self._pending = [worker.step_with_reset_infos.remote(part) for worker, part in calls]

    def step_wait(self) -> VecEnvStepReturn:
        """Results of all steps; environments that are done have been reset, as in any VecEnv."""
        steps, reset_infos = zip(*self._wait(self._pending), strict=True)
        obs, rewards, dones, infos = zip(*steps, strict=True)
        newest = zip(self.reset_infos, chain.from_iterable(reset_infos), strict=True)
        self.reset_infos = [old if new is None else new for old, new in newest]
        return _joined(obs), np.concatenate(rewards), np.concatenate(dones), list(chain.from_iterable(infos))

    def close(self) -> None:
        """Close the environments and end their workers; the cluster stays."""
        for worker in self.workers:
            with suppress(ray.exceptions.RayError):  # it is dead or cannot close: kill it anyway
                ray.get(worker.close.remote())
            ray.kill(worker)
        self.workers = []

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute. Only the answer is transferred, not the attribute."""
        return all(self._wait([worker.has_attr.remote(attr_name) for worker in self.workers]))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment."""
        return self._call_on(self._get_indices(indices), "get_attr", attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each environment."""
        self._call_on(self._get_indices(indices), "set_attr", attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """What a method of each environment returns."""
        return self._call_on(self._get_indices(indices), "env_method", method_name, *args, **kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether each environment has such a wrapper."""
        return self._call_on(self._get_indices(indices), "env_is_wrapped", wrapper_class)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Images of all environments."""
        return list(chain.from_iterable(self._wait([worker.get_images.remote() for worker in self.workers])))

    def _call_on(self, envs: Iterable[int], method: str, /, *args: Any, **kwargs: Any) -> list[Any]:
        """Results of a method for some environments, called at the same time."""
        places = [self._places[env] for env in envs]
        return self._wait([self.workers[w].call_on.remote(index, method, *args, **kwargs) for w, index in places])

    def _wait(self, calls: list[Any]) -> list[Any]:
        """Results of calls to the workers.

        :raises RuntimeError: if a worker has died. Errors of environments are raised unchanged.
        """
        try:
            return ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"a worker of environments died: {error}. The collected data is kept: save() and save_replay_buffer() "
                "work, and set_env() with a new RayVecEnv of as many environments continues"
            ) from error


def _warn_if_too_few_cpus(workers: int, num_cpus: float) -> None:
    left = ray.available_resources().get("CPU", 0)
    if workers * num_cpus > left:
        warnings.warn(
            f"{workers} workers with num_cpus={num_cpus:g} need more than the {left:g} CPUs left in the cluster, "
            "so this waits until it grows; or use a smaller num_cpus or a larger envs_per_worker",
            stacklevel=3,
        )


def _joined(parts: Sequence[Any]) -> Any:
    """Observations of all workers, (n, *shape): arrays, dictionaries or tuples of arrays, as in SB3."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    return np.concatenate(parts)
