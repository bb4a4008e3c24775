"""Environments on the machines of a Ray cluster, as one SB3 VecEnv: for those whose simulators outgrow one machine.

    ray start --head                                  # on this machine, and on each other one:
    ray start --address=<this machine>:6379

    env = RayVecEnv([make_env] * 64, envs_per_worker=4)
    Dreamer("MlpPolicy", env).learn(1_000_000)        # or any other algorithm of SB3

The agent acts for all environments at once and learns where it runs; only observations and actions travel. Without a
cluster Ray starts one on this machine. Ray gives its workers the lowest priority; where they share the machine of the
agent, set ``RAY_worker_niceness=0`` before Ray starts, or the simulators wait for the learning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
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
    """A share of the environments; lives in a process of its own, somewhere in the cluster."""

    def begin(self, seeds: list[int | None], options: list[dict[str, Any]]) -> tuple[VecEnvObs, list[dict[str, Any]]]:
        """Reset all with these seeds and options: first observations and infos."""
        self._seeds, self._options = seeds, options
        return self.reset(), self.reset_infos

    def of_one(self, index: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """What ``get_attr``, ``set_attr``, ``env_method`` or ``env_is_wrapped`` says for one environment."""
        answer = getattr(self, method)(*args, indices=index, **kwargs)
        return None if answer is None else answer[0]


class RayVecEnv(VecEnv):
    """An SB3 VecEnv whose environments live in the workers of a Ray cluster; all take their steps at the same time.

    :param env_fns: functions that make one environment each; sent to the workers, whose machines need the packages.
    :param envs_per_worker: environments that share a process. They take turns, so that cheap ones want more of them.
    :param num_cpus: that a worker asks Ray for; a fraction, where workers mostly wait. If the cluster has fewer left,
        this warns and waits, since a cluster may grow.
    :raises ValueError: without environments, and for less than one in a worker.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], envs_per_worker: int = 1, num_cpus: float = 1) -> None:
        if not env_fns or envs_per_worker < 1:
            raise ValueError(
                f"{len(env_fns)} env_fns and envs_per_worker={envs_per_worker}: both have to be at least 1"
            )
        if not ray.is_initialized():
            ray.init()
        _warn_if_it_waits(math.ceil(len(env_fns) / envs_per_worker), num_cpus)
        shares = [list(env_fns[i : i + envs_per_worker]) for i in range(0, len(env_fns), envs_per_worker)]
        remote: Any = ray.remote(num_cpus=num_cpus)(Worker)
        self.workers: list[Any] = [remote.remote(share) for share in shares]
        self._places = [(w, i) for w, share in enumerate(shares) for i in range(len(share))]
        self._cuts = np.cumsum([len(share) for share in shares])[:-1]
        self._pending: list[Any] = []
        spaces = (self._ask(0, "get_attr", name) for name in ("observation_space", "action_space"))
        super().__init__(len(env_fns), *spaces)

    def reset(self) -> VecEnvObs:
        """Reset all, with the seeds and options that were set."""
        calls = []
        for w, worker in enumerate(self.workers):
            mine = [env for env, (place, _) in enumerate(self._places) if place == w]
            calls.append(worker.begin.remote([self._seeds[i] for i in mine], [self._options[i] for i in mine]))
        obs, infos = zip(*self._wait(calls), strict=True)
        self.reset_infos = [info for part in infos for info in part]
        self._reset_seeds()
        self._reset_options()
        return _joined(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Send each worker its actions."""
        parts = np.split(np.asarray(actions), self._cuts)
        self._pending = [worker.step.remote(part) for worker, part in zip(self.workers, parts, strict=True)]

    def step_wait(self) -> VecEnvStepReturn:
        """What all came to; environments that are done have been reset, as in any VecEnv."""
        obs, rewards, dones, infos = zip(*self._wait(self._pending), strict=True)
        joined = [info for part in infos for info in part]
        return _joined(obs), np.concatenate(rewards), np.concatenate(dones), joined

    def close(self) -> None:
        """Close the environments and end their workers; the cluster stays."""
        for worker in self.workers:
            try:
                ray.get(worker.close.remote())
            except ray.exceptions.RayActorError:
                continue  # it has died already
            ray.kill(worker)
        self.workers = []

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment."""
        return [self._ask(env, "get_attr", attr_name) for env in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each environment."""
        for env in self._get_indices(indices):
            self._ask(env, "set_attr", attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """What a method of each environment returns."""
        return [self._ask(env, "env_method", method_name, *args, **kwargs) for env in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether each environment has such a wrapper."""
        return [self._ask(env, "env_is_wrapped", wrapper_class) for env in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Pictures of all environments."""
        return [image for part in self._wait([worker.get_images.remote() for worker in self.workers]) for image in part]

    def _ask(self, env: int, method: str, *args: Any, **kwargs: Any) -> Any:
        worker, index = self._places[env]
        return self._wait([self.workers[worker].of_one.remote(index, method, *args, **kwargs)])[0]

    def _wait(self, calls: list[Any]) -> list[Any]:
        """Results of all workers.

        :raises RuntimeError: if one has died. Errors of environments come as they are.
        """
        try:
            return ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(
                f"a worker of environments died: {error}. What was collected is kept: save() and save_replay_buffer() "
                "work, and set_env() with a new RayVecEnv goes on"
            ) from error


def _warn_if_it_waits(workers: int, num_cpus: float) -> None:
    left = ray.available_resources().get("CPU", 0)
    if workers * num_cpus > left:
        warnings.warn(
            f"{workers} workers of num_cpus={num_cpus:g} ask for more than the {left:g} CPUs left in the cluster, "
            "so this waits until it grows; or take a smaller num_cpus or a larger envs_per_worker",
            stacklevel=3,
        )


def _joined(parts: Sequence[Any]) -> Any:
    """Observations of all workers, (n, *shape), as SB3 has them: arrays, Dicts or tuples of them."""
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(np.concatenate(of_one) for of_one in zip(*parts, strict=True))
    return np.concatenate(parts)
