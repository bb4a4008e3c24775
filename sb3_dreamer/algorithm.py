"""Collecting, saving and loading for an off-policy SB3 algorithm with a recurrent policy and a sequence replay."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict
from stable_baselines3.common.vec_env import VecEnv

from sb3_dreamer.environments import (
    NoteStep,
    ResetWatch,
    check_spaces,
    check_statistics,
    check_wrapping,
    name_dead_workers,
    step_named,
    warn_of_new_statistics,
)
from sb3_dreamer.files import FileLike, atomic_write, check_parameters, in_place_of_pickles, known_args, read_settings
from sb3_dreamer.imitation import NO_TEACHER, Imitation
from sb3_dreamer.policies import DreamerPolicy, PolicyState
from sb3_dreamer.replay import SequenceReplayBuffer, read_replay
from sb3_dreamer.types import Observation

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="SequenceAlgorithm")
NOT_SAVED = (
    "_online_state", "_last_obs", "_last_original_obs", "_originals", "imitation", "lent_env", "run_id", "resets",
)  # fmt: skip


class SequenceAlgorithm(OffPolicyAlgorithm):
    """SB3's off-policy algorithm, with a policy that carries a state and a replay of sequences.

    Whatever stops a step in the middle (a callback, an exception) ends the stream there: the next ``learn`` resets the
    environments, and what it stores first begins an episode. A subclass builds ``policy`` and ``replay_buffer`` in
    ``_setup_model``, learns in ``train``, and says in ``check_settings`` what cannot work.
    """

    policy: DreamerPolicy
    replay_buffer: SequenceReplayBuffer  # type: ignore[assignment]
    batch_length: int
    train_ratio: float
    _entries_owed: float = 0.0  # entries still to be replayed for the steps taken so far, see train_ratio
    _online_state: PolicyState | None = None  # of the training environments
    lent_env: VecEnv | None = None  # the environments, if another agent steps them too
    run_id: str | None = None  # names this run in the folder of a ResumeCallback
    _originals: Any = None  # observations, rewards and infos of the last step, before VecNormalize
    imitation: Imitation = NO_TEACHER  # of a warm start, until its weight is zero
    trained_gamma: float | None = None  # discount of the last update, which the model has learned
    trained_with_vecnormalize: bool = False  # whether the last update saw what a VecNormalize makes of the replay ...
    trained_on_normalized_obs: bool = False  # ... of its observations, and not of the rewards alone

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resets = ResetWatch()

    def check_settings(self) -> None:
        """Refuse settings that cannot work; called before anything is built or learned."""

    @staticmethod
    def _wrap_env(env: GymEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        env = maybe_make_env(env, verbose)
        check_spaces(env)
        env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        check_wrapping(env)
        return env

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Clamped at 0: many environments overshoot the total at the last step, and schedules would turn negative."""
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    # -- collecting ----------------------------------------------------------------------------------------------------

    def learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "Dreamer",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAlgorithm:
        """Collect ``total_timesteps`` steps and train after each; arguments as in every SB3 algorithm."""
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps and self._collect(callback, log_interval):
            self._train_what_is_due()
        callback.on_training_end()
        return self

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self.check_settings()
        check_statistics(self, stacklevel=4)
        if self.env is self.lent_env or self.resets.reset_by_others(self.env):
            self._last_obs = None
        if self._n_updates > 0 and self.replay_buffer.size() == 0:
            warnings.warn(
                "the replay is empty, so nothing is learned until it holds learning_starts="
                f"{self.learning_starts} entries: load_replay_buffer() brings back what was saved",
                stacklevel=3,
            )
        given = callback if isinstance(callback, list) else [callback] if callback is not None else []
        callbacks = [each if isinstance(each, BaseCallback) else ConvertCallback(each) for each in given]
        ready = super()._setup_learn(total_timesteps, [NoteStep(), *callbacks], *args, **kwargs)
        if np.all(self._last_episode_starts):  # the environments were just reset
            self.replay_buffer.cut()
        self.resets.note(self.env)
        return ready

    def note_step(self, infos: list[dict[str, Any]]) -> None:
        """Call after each step of the environments, before anything else uses them or their statistics."""
        if (normalize := self._vec_normalize_env) is not None:  # as in SB3, what it clips of the last one is lost
            last = "terminal_observation"
            infos = [{**info, last: normalize.unnormalize_obs(info[last])} if last in info else info for info in infos]
            self._originals = normalize.get_original_obs(), normalize.get_original_reward(), infos
        self.resets.note(self.env)

    def begin_where_others_reset(self) -> None:
        """Start new episodes if someone else has reset the environments; the running ones are not ours to continue."""
        if self.resets.reset_by_others(self.env):
            self.begin_episodes()

    def begin_episodes(self) -> None:
        """Reset the environments, and end the running episodes in the replay."""
        assert self.env is not None
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        normalize = self._vec_normalize_env
        self._last_original_obs = None if normalize is None else normalize.get_original_obs()
        self._last_episode_starts = np.ones(self.env.num_envs, bool)
        self.replay_buffer.cut()
        self.resets.note(self.env)

    def _collect(self, callback: BaseCallback, log_interval: int | None) -> bool:
        """One step of all environments. An interrupted step leaves the stream cut, never misaligned."""
        assert self.env is not None
        finished = False
        try:
            with name_dead_workers(self.env):
                finished = self.collect_rollouts(
                    self.env,
                    callback,
                    self.train_freq,  # type: ignore[arg-type]
                    self.replay_buffer,  # type: ignore[arg-type]
                    log_interval=log_interval,
                ).continue_training
        finally:
            if not finished:
                self._last_obs = None
        return finished

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self.begin_where_others_reset()
        with step_named(self.num_timesteps):
            self.replay_buffer.check(self.original_obs)
        last_obs: Any = self._last_obs
        actions, state = self.policy.predict(last_obs, self._online_state, self._last_episode_starts)
        if self._exploring():
            actions = np.array([self.action_space.sample() for _ in range(n_envs)])
            state = (state[0], self.policy.actions.encode(actions))
        self._online_state = state
        self.imitation.query(self, actions)
        return actions, self.policy.actions.to_replay(actions)

    @property
    def original_obs(self) -> Any:
        """The last observation, not normalized."""
        return self._last_obs if self._vec_normalize_env is None else self._last_original_obs

    def _exploring(self) -> bool:
        """Random actions until there is something to learn from; not again after a second learn() or a load."""
        return self._n_updates == 0 and self._waiting()

    def _waiting(self) -> bool:
        """Whether the replay holds too little to learn from: ``learning_starts`` entries, if so many fit."""
        replay = self.replay_buffer
        return replay.size() < min(self.learning_starts, replay.rows * replay.n_envs) or not replay.can_sample()

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Observation,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        obs, next_obs = self.original_obs, new_obs
        if self._vec_normalize_env is not None:
            next_obs, reward, infos = self._originals
        assert self._online_state is not None
        latent = self.policy.latents(self._online_state)
        with step_named(self.num_timesteps):
            self.replay_buffer.add(obs, next_obs, buffer_action, reward, dones, infos, latent=latent)
        self._last_obs, self._last_original_obs = new_obs, next_obs
        self._last_episode_starts = dones
        if not self._waiting():
            self._entries_owed += self.train_ratio * len(dones)

    def _train_what_is_due(self) -> None:
        """Run the updates that are due. Fractions, updates without data yet, and interrupted ones remain due."""
        entries, before = self.batch_size * self.batch_length, self._n_updates
        try:
            self.train(0 if self._waiting() else int(self._entries_owed // entries), self.batch_size)
        finally:
            self._entries_owed -= (self._n_updates - before) * entries

    def predict(
        self,
        observation: Observation,
        state: PolicyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PolicyState]:
        """See :meth:`sb3_dreamer.policies.DreamerPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    # -- keeping -------------------------------------------------------------------------------------------------------

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """As in every SB3 algorithm, but the file appears whole or not at all: an older one survives a crash.

        :raises ValueError: for the replay in ``include``, which has a file of its own.
        """
        included = list(include or ())
        if "replay_buffer" in included:
            raise ValueError("the replay has a file of its own: call save_replay_buffer(path)")
        with atomic_write(path, "zip") as file:
            super().save(file, exclude, included)

    def save_replay_buffer(self, path: FileLike) -> None:
        """Save the replay; the file appears whole or not at all."""
        with atomic_write(path, "pkl") as file:
            super().save_replay_buffer(file)

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: FileLike,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """As in every SB3 algorithm; :mod:`sb3_dreamer.files` says what a saved agent consists of.

        :param trusted: False for a file from somebody else: nothing is unpickled, so none of their code can run. The
            agent acts as the saved one; settings that were pickled, such as a learning rate schedule, are not read.
        :raises ValueError: for a file that is no agent's, truncated, damaged, or of another version, and statistics of
            a VecNormalize that are not finite.
        :raises TypeError: for settings that it does not have.
        """
        settings, custom_objects = read_settings(path), dict(custom_objects or {})
        kwargs = known_args(cls, settings, kwargs)
        if not trusted:
            custom_objects = in_place_of_pickles(settings, cls.policy_aliases, cls, {**kwargs, **custom_objects})
        given: Any = env  # an id too
        model = super().load(path, given, device, custom_objects, print_system_info, force_reset, **kwargs)
        check_statistics(model, stacklevel=3)
        warn_of_new_statistics(model, stacklevel=3)
        return model

    def load_replay_buffer(self, path: FileLike, truncate_last_traj: bool = True) -> None:
        """Continue with a saved replay; the next entry begins an episode.

        :param path: of the file that :meth:`save_replay_buffer` wrote.
        :param truncate_last_traj: part of SB3's signature, for HER; not used.
        :raises ValueError: if it holds no replay of sequences, or one of other shapes than this agent's.
        """
        self.replay_buffer = read_replay(path, self.replay_buffer, self.verbose)
        self._last_obs, self.imitation = None, NO_TEACHER  # the next learn() resets; answers belong to other entries

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As in every SB3 algorithm, but parameters of another shape are refused before anything is changed.

        :raises ValueError: for another shape, and for unknown or missing names.
        """
        given: Any = load_path_or_dict
        if not isinstance(given, dict):
            given = load_from_zip_file(given, device=device, load_data=False)[1]
        own = {"policy": self.policy.state_dict(), "policy.optimizer": self.policy.optimizer.state_dict()}
        check_parameters(given, own, exact_match)
        # a copy: an optimizer keeps and changes the very moments that it is given
        super().set_parameters(copy.deepcopy(given), exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NOT_SAVED]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
