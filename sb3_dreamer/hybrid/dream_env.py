"""The world model as an SB3 environment: any SB3 algorithm can train in it without a real step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_dreamer.acting import require_statistics
from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.offline_training import require_replay
from sb3_dreamer.hybrid.real_states import imagined_observations, real_states, unpacked
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.policies import PolicyState
from sb3_dreamer.spaces import as_observation
from sb3_dreamer.world_model.rssm import State

STARTS_PER_DREAM = 16
MIN_ENTRIES_PER_ENV = 64  # of each real environment, to filter


class DreamVecEnv(VecEnv):
    """Dynamics, reward and termination are the learned model's; episodes start from replayed states.

    A dream terminates with the probability that the model predicts, and is truncated after ``horizon`` steps, so that
    the value of what would follow counts. Observations and rewards are as Dreamer's policy sees them: normalized if its
    environment is a VecNormalize. Each step uses the present weights of the model; each ``reset()`` reads new states to
    start from out of the replay. Random numbers are torch's: the ``seed`` of the algorithm that trains here determines
    them, or SB3's ``set_random_seed``; ``seed()`` does not.

    With ``start``, all dreams start from a given state instead, such as the present one of a robot: what a policy, or a
    sequence of actions, would lead to from there can be seen before the robot tries it.

    :param model: a trained Dreamer; with its replay, unless ``start`` is given.
    :param n_envs: number of parallel dreams.
    :param horizon: steps of a dream.
    :param start: the state that ``model.predict`` returned for the newest observation; with several environments, each
        dream starts from one of them at random. The first observation is decoded by the model.
    :raises ValueError: for a replay with nothing to start from, a state of another model, and invalid values.
    :raises TypeError: if the model is not a Dreamer.
    """

    def __init__(self, model: Dreamer, n_envs: int = 1024, horizon: int = 64, start: PolicyState | None = None) -> None:
        n_envs, horizon = as_whole("n_envs", n_envs, least=1), as_whole("horizon", horizon, least=1)
        if start is None:
            require_replay(model, "DreamVecEnv")
        else:
            require_statistics(model, "DreamVecEnv")
            shape, width = np.shape(start[0]), model.policy.world_model.rssm.packed_width
            if len(shape) != 2 or 0 in shape or shape[1] != width:
                raise ValueError(
                    f"start has shape {shape}, not (n, {width}): give the state that predict() of this model returned"
                )
            if not np.isfinite(start[0]).all():
                raise ValueError("start contains NaN or infinite values, and so would all dreams from there")
        self.model, self.horizon = model, horizon
        self._fixed = None if start is None else th.tensor(np.asarray(start[0], np.float32), device=model.device)
        super().__init__(n_envs, model.observation_space, model.action_space)
        self._age = np.zeros(n_envs, int)
        self._starts = th.zeros(0)  # packed states (m, P) to start from, filled by reset()
        self._start_obs: dict[str, np.ndarray] = {}  # their observations (m, *shape)
        self._state: State | None = None
        self._actions = np.zeros(0)

    def reset(self) -> VecEnvObs:
        """Start all dreams again."""
        self._starts, self._start_obs = self._replayed() if self._fixed is None else self._decoded(self._fixed)
        drawn = self._draw(self.num_envs)
        self._state = unpacked(self.model, self._starts[drawn])
        self._age[:] = 0
        return as_observation(self.observation_space, {key: part[drawn] for key, part in self._start_obs.items()})

    def _replayed(self) -> tuple[th.Tensor, dict[str, np.ndarray]]:
        """States of the replay: packed (m, P), and their observations (m, *shape) by key."""
        real = real_states(self.model, max(STARTS_PER_DREAM * self.num_envs, MIN_ENTRIES_PER_ENV * self.model.n_envs))
        alive = np.flatnonzero(~real.is_last)
        dreamed = imagined_observations(self.model, unpacked(self.model, real.packed[:1]).features)
        obs = {key: part[alive].astype(dreamed[key].dtype) for key, part in real.obs.items()}
        return real.packed[alive], obs

    def _decoded(self, packed: th.Tensor) -> tuple[th.Tensor, dict[str, np.ndarray]]:
        """The given states, and the observations that the model decodes from them."""
        return packed, imagined_observations(self.model, unpacked(self.model, packed).features)

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions, in the units of the action space.

        :raises ValueError: for actions of another shape, and for NaN or infinite ones.
        """
        actions = np.asarray(actions)
        expected = self.num_envs, *(self.action_space.shape or ())
        if actions.shape != expected:
            raise ValueError(f"actions have shape {actions.shape}, {self.num_envs} dreams need {expected}")
        if not np.isfinite(actions).all():
            raise ValueError("actions contain NaN or infinite values")
        self._actions = actions

    @th.inference_mode()
    def step_wait(self) -> VecEnvStepReturn:
        """Dream one step ahead.

        :raises RuntimeError: before the first ``reset()``.
        """
        if self._state is None:
            raise RuntimeError("no dream has started: call reset() before step()")
        model, policy = self.model.policy.world_model, self.model.policy
        device = self.model.device
        actions = th.as_tensor(policy.actions.encode(self._actions), device=device)
        with mixed_precision(device):
            self._state = model.rssm.imagine_step(self._state, actions)
            features = self._state.features
            reward = model.predict_reward(features)
            cont = model.predict_continue(features)
            obs = imagined_observations(self.model, features)
        terminal = (th.rand_like(cont) > cont).cpu().numpy()
        self._age += 1
        dones = terminal | (self._age >= self.horizon)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            self._restart(np.flatnonzero(dones), terminal, obs, infos)
        return as_observation(self.observation_space, obs), reward.float().cpu().numpy(), dones, infos

    def _restart(
        self, ended: np.ndarray, terminal: np.ndarray, obs: dict[str, np.ndarray], infos: list[dict[str, Any]]
    ) -> None:
        """Replace dreams that have ended by new ones; the last observations go into ``infos``."""
        for i in ended:
            last = {key: part[i].copy() for key, part in obs.items()}
            infos[i] = {
                "terminal_observation": as_observation(self.observation_space, last),
                "TimeLimit.truncated": not terminal[i],
            }
        assert self._state is not None
        drawn = self._draw(len(ended))
        packed = self.model.policy.world_model.rssm.pack(self._state)
        packed[th.as_tensor(ended, device=packed.device)] = self._starts[th.as_tensor(drawn, device=packed.device)]
        self._state = unpacked(self.model, packed)
        self._age[ended] = 0
        for key, part in obs.items():
            part[ended] = self._start_obs[key][drawn]

    def _draw(self, n: int) -> np.ndarray:
        return th.randint(len(self._starts), (n,)).numpy()

    # -- the rest of the interface -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The same for all dreams; they have no render mode."""
        value = None if attr_name == "render_mode" else getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute for all dreams."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Dreams have no methods of the real environment.

        :raises AttributeError: always.
        """
        raise AttributeError(f"a dream has no method {method_name}: only the real environment has")

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """Dreams have no wrappers."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A dream cannot be rendered.

        :raises NotImplementedError: always.
        """
        raise NotImplementedError("dreams are not rendered here: python -m sb3_dreamer.dreams shows them")
