"""An environment whose observations are the features of the world model, for tasks that need memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dreamer.acting import require_dreamer, require_same_units
from sb3_dreamer.dreamer import Dreamer


class LatentVecEnv(VecEnv):
    """Observations are the features of Dreamer's model state, with expected latents as in ``predict``.

    It is not a VecEnvWrapper: a VecNormalize inside belongs to Dreamer, and an algorithm outside must not find it.

    :param model: a trained Dreamer; it filters the observations, and does not learn here.
    :param env: environments with its spaces, for example ``model.get_env()``.
    :raises ValueError: for other spaces, and if env is normalized and the model has learned without, or the reverse.
    :raises TypeError: if the model is not a Dreamer, or env is not a VecEnv.
    """

    def __init__(self, model: Dreamer, env: VecEnv) -> None:
        require_dreamer(model, "LatentVecEnv")
        if not isinstance(env, VecEnv):
            raise TypeError(f"LatentVecEnv wraps a VecEnv, not {type(env).__name__}: make_vec_env() makes one")
        for name in ("observation_space", "action_space"):
            if (given := getattr(env, name)) != (own := getattr(model, name)):
                raise ValueError(f"env has the {name} {given}, the model {own}: wrap it as the model's environment")
        require_same_units(model, env)
        self.model, self.env = model, env
        self._memory: tuple[th.Tensor, th.Tensor] | None = None  # packed states (n, P), previous actions (n, A)
        width = model.policy.world_model.feature_width
        super().__init__(env.num_envs, spaces.Box(-np.inf, np.inf, (width,), np.float32), env.action_space)

    def reset(self) -> VecEnvObs:
        """Reset the environments and the memory."""
        packed, action = self.model.policy.initial_state(self.num_envs)
        self._memory = self._on_device(packed), self._on_device(action)
        features = self._remember(self.env.reset(), np.ones(self.num_envs, bool))
        self.reset_infos = self.env.unwrapped.reset_infos  # a VecEnvWrapper does not pass them on
        return features

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions, and remember them.

        :raises RuntimeError: before the first ``reset()``.
        """
        if self._memory is None:
            raise RuntimeError("no episode has started: call reset() before step()")
        self._memory = self._memory[0], self._on_device(self.model.policy.actions.encode(actions))
        self.env.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Receive observations and filter them, including the last one of an episode."""
        obs, rewards, dones, infos = self.env.step_wait()
        self.reset_infos = self.env.unwrapped.reset_infos  # SubprocVecEnv makes a new list
        infos = list(infos)  # a tuple in SubprocVecEnv
        ended = np.flatnonzero(dones)
        if ended.size:
            last = self._with_last(obs, ended, infos)
            _, final = self._filter(last, np.zeros(self.num_envs, bool))
            for i in ended:
                infos[i] = {**infos[i], "terminal_observation": final[i]}
        return self._remember(obs, dones), rewards, dones, infos

    def _remember(self, obs: Any, is_first: np.ndarray) -> np.ndarray:
        """Filter the observations and keep the states; features (n, F)."""
        assert self._memory is not None
        packed, features = self._filter(obs, is_first)
        self._memory = packed, self._memory[1]
        return features

    @th.inference_mode()
    def _filter(self, obs: Any, is_first: np.ndarray) -> tuple[th.Tensor, np.ndarray]:
        """The next states (n, P) and their features (n, F)."""
        assert self._memory is not None
        policy = self.model.policy
        tensors, _ = policy.checked_obs(obs, "LatentVecEnv")
        state = policy.observe(tensors, *self._memory, self._on_device(is_first), sample=False)
        return policy.world_model.rssm.pack(state), state.features.cpu().numpy()

    def _on_device(self, values: np.ndarray) -> th.Tensor:
        return th.as_tensor(values, device=self.model.device)

    @staticmethod
    def _with_last(obs: Any, ended: np.ndarray, infos: list[dict[str, Any]]) -> Any:
        """The observations (n, *shape), where an episode has ended its last one."""
        if isinstance(obs, dict):
            last = {key: part.copy() for key, part in obs.items()}
            for i in ended:
                for key, part in last.items():
                    part[i] = infos[i]["terminal_observation"][key]
            return last
        replaced = np.array(obs)
        replaced[ended] = np.stack([infos[i]["terminal_observation"] for i in ended])
        return replaced

    # -- passed on to the environments ---------------------------------------------------------------------------------

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds for the next reset."""
        return self.env.seed(seed)

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        """Options for the next reset."""
        self.env.set_options(options)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """See VecEnv."""
        return self.env.get_attr(attr_name, indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """See VecEnv."""
        self.env.set_attr(attr_name, value, indices)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """See VecEnv."""
        return self.env.env_method(method_name, *args, indices=indices, **kwargs)

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """See VecEnv."""
        return self.env.env_is_wrapped(wrapper_class, indices)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """See VecEnv."""
        return self.env.get_images()
