"""An environment seen through the world model: its features instead of observations, for tasks that need memory."""

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
    """Observations are the features of Dreamer's model state, its expected latents, as ``predict`` would have them.

    It is no VecEnvWrapper: a VecNormalize inside belongs to Dreamer, and an algorithm outside must not find it.

    :param model: a trained Dreamer; it filters, and does not learn here.
    :param env: environments of its spaces, for example ``model.get_env()``.
    :raises ValueError: for other spaces, and where it is normalised and the model has learned without, or the reverse.
    :raises TypeError: for a model that is no Dreamer, and an environment that is no VecEnv.
    """

    def __init__(self, model: Dreamer, env: VecEnv) -> None:
        require_dreamer(model, "LatentVecEnv")
        if not isinstance(env, VecEnv):
            raise TypeError(f"LatentVecEnv goes around a VecEnv, not {type(env).__name__}: make_vec_env() makes one")
        for name in ("observation_space", "action_space"):
            if (given := getattr(env, name)) != (own := getattr(model, name)):
                raise ValueError(f"env has the {name} {given}, the model {own}: wrap it as the model's environment")
        require_same_units(model, env)
        self.model, self.env = model, env
        self._packed: th.Tensor | None = None
        width = model.policy.world_model.feature_width
        super().__init__(env.num_envs, spaces.Box(-np.inf, np.inf, (width,), np.float32), env.action_space)

    def reset(self) -> VecEnvObs:
        """Reset the environments and the memory."""
        nothing = self.model.policy.initial_state(self.num_envs)
        self._packed, self._action = (th.as_tensor(part, device=self.model.device) for part in nothing)
        self._packed, features = self._see(self.env.reset(), np.ones(self.num_envs, bool))
        self.reset_infos = self.env.reset_infos
        return features

    def step_async(self, actions: np.ndarray) -> None:
        """Send the actions, and remember them.

        :raises RuntimeError: before the first ``reset()``.
        """
        if self._packed is None:
            raise RuntimeError("no episode has begun: call reset() before step()")
        self._action = th.as_tensor(self.model.policy.encode_action(actions), device=self.model.device)
        self.env.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Receive observations and filter them; the last one of an episode goes through the filter as well."""
        obs, rewards, dones, infos = self.env.step_wait()
        self.reset_infos = self.env.reset_infos  # SubprocVecEnv makes new ones
        infos = list(infos)  # and these are a tuple there
        ended = np.flatnonzero(dones)
        if ended.size:
            last = self._with_last(obs, ended, infos)
            _, final = self._see(last, np.zeros(self.num_envs, bool))
            for i in ended:
                infos[i] = {**infos[i], "terminal_observation": final[i]}
        self._packed, features = self._see(obs, dones)
        return features, rewards, dones, infos

    @th.inference_mode()
    def _see(self, obs: Any, is_first: np.ndarray) -> tuple[th.Tensor, np.ndarray]:
        """The next states (n, P) and their features (n, F)."""
        assert self._packed is not None
        policy = self.model.policy
        tensors, _ = policy.checked_obs(obs, "LatentVecEnv")
        first = th.as_tensor(is_first, device=self.model.device)
        state = policy.observe(tensors, self._packed, self._action, first, sample=False)
        return policy.world_model.rssm.pack(state), state.features.cpu().numpy()

    @staticmethod
    def _with_last(obs: Any, ended: np.ndarray, infos: list[dict[str, Any]]) -> Any:
        """The observations (n, *shape), those of the next episode replaced by the last ones."""
        if isinstance(obs, dict):
            last = {key: part.copy() for key, part in obs.items()}
            for i in ended:
                for key, part in last.items():
                    part[i] = infos[i]["terminal_observation"][key]
            return last
        replaced = np.array(obs)
        replaced[ended] = np.stack([infos[i]["terminal_observation"] for i in ended])
        return replaced

    # -- the rest goes to the environments -----------------------------------------------------------------------------

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
