"""Dreamer, one more SB3 algorithm: all the knobs, the train step, saving."""

from __future__ import annotations

import io
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_dreamer.behavior.actor_critic import actor_loss, critic_loss, replay_critic_loss
from sb3_dreamer.behavior.imagination import imagine, lambda_returns
from sb3_dreamer.environments import check_spaces, check_wrapping, deaths_told
from sb3_dreamer.files import describe, in_place_of_pickles, read_settings
from sb3_dreamer.nets.layers import fast_bfloat16
from sb3_dreamer.policies import CnnPolicy, DreamerPolicy, MlpPolicy, MultiInputPolicy, PolicyState
from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.types import Batch

SelfDreamer = TypeVar("SelfDreamer", bound="Dreamer")
Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

LOSS_SCALES = {
    "reconstruction": 1.0,
    "reward": 1.0,
    "continue": 1.0,
    "dyn": 1.0,
    "rep": 0.1,
    "actor": 1.0,
    "critic": 1.0,
    "replay_critic": 0.3,
}


class Dreamer(OffPolicyAlgorithm):
    """DreamerV3 (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy".
    :param env: environment, VecEnv, or the id of a registered one.
    :param learning_rate: a number, or a function of the remaining progress (1 to 0).
    :param warmup_updates: updates over which the learning rate rises from zero.
    :param buffer_size: capacity of the replay in entries, all environments together.
    :param learning_starts: environment steps with random actions before the first update.
    :param batch_size: sequences in a batch.
    :param batch_length: entries of a sequence.
    :param train_ratio: replayed entries per environment step, fractions allowed.
    :param imagination_starts: how many of the batch's states dreams start from, drawn at random; None: all.
    :param imagination_horizon: imagined steps of a dream.
    :param gamma: discount.
    :param gae_lambda: lambda of the returns.
    :param ent_coef: weight of the actor's entropy.
    :param rssm_type: sequence model, "gru" or "transformer".
    :param model_size: "debug", "size1m", "size12m", "size25m", "size50m", "size100m" or "size200m".
    :param replay_buffer_class: a subclass of :class:`~sb3_dreamer.replay.SequenceReplayBuffer`.
    :param replay_buffer_kwargs: further arguments of the buffer.
    :param policy_kwargs: single widths in place of those of ``model_size``.
    :param stats_window_size: episodes that the rollout statistics average over.
    :param tensorboard_log: folder for TensorBoard; None: no such log.
    :param verbose: 0 nothing, 1 information, 2 debugging.
    :param seed: seed of all random numbers.
    :param device: "auto", "cpu", "cuda" ...
    :raises ValueError: for settings that can never work together.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DreamerPolicy
    replay_buffer: SequenceReplayBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[DreamerPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 4e-4,
        warmup_updates: int = 100,
        buffer_size: int = 1_000_000,
        learning_starts: int = 500,
        batch_size: int = 16,
        batch_length: int = 64,
        train_ratio: float = 512,
        imagination_starts: int | None = 128,
        imagination_horizon: int = 15,
        gamma: float = 0.997,
        gae_lambda: float = 0.95,
        ent_coef: float = 3e-4,
        rssm_type: str = "gru",
        model_size: str = "size1m",
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            gamma=gamma,
            replay_buffer_class=replay_buffer_class,  # type: ignore[arg-type]
            replay_buffer_kwargs=replay_buffer_kwargs,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            support_multi_env=True,
            sde_support=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.warmup_updates = warmup_updates
        self.batch_length = batch_length
        self.train_ratio = train_ratio
        self.imagination_starts = imagination_starts
        self.imagination_horizon = imagination_horizon
        self.gae_lambda = gae_lambda
        self.ent_coef = ent_coef
        self.rssm_type = rssm_type
        self.model_size = model_size
        self._entries_owed = 0.0
        self._online_state: PolicyState | None = None
        self._metrics: dict[str, list[th.Tensor]] = {}
        self._cloning: Any = None  # what is left of a warm start
        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: GymEnv, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        check_spaces(env)
        env = OffPolicyAlgorithm._wrap_env(env, verbose, monitor_wrapper)
        check_wrapping(env)
        return env

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            model_size=self.model_size,
            rssm_type=self.rssm_type,
            gamma=self.gamma,
            warmup_updates=self.warmup_updates,
            **self.policy_kwargs,
        ).to(self.device)
        buffer_class = self.replay_buffer_class or SequenceReplayBuffer
        self.replay_buffer = buffer_class(  # type: ignore[assignment]
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            sequence_length=self.batch_length,
            latent_size=self.policy.world_model.rssm.latent_width,
            **self.replay_buffer_kwargs,
        )
        self._convert_train_freq()
        self.described = describe(self.policy_class, self.observation_space, self.action_space)

    # -- collecting ----------------------------------------------------------------------------------------------------

    def learn(
        self: SelfDreamer,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str = "Dreamer",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDreamer:
        """Collect ``total_timesteps`` steps and train after each; arguments as in every SB3 algorithm."""
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        go_on = True
        while go_on and self.num_timesteps < total_timesteps:
            go_on = self._collect(callback, log_interval)
            if go_on:
                self.train(self._updates_due(), self.batch_size)
        callback.on_training_end()
        return self

    def _collect(self, callback: BaseCallback, log_interval: int | None) -> bool:
        """One step of all environments. An interrupted step leaves the stream cut, never misaligned."""
        assert self.env is not None
        finished = False
        try:
            with deaths_told(self.env):
                finished = self.collect_rollouts(
                    self.env, callback, self.train_freq, self.replay_buffer, log_interval=log_interval  # type: ignore[arg-type]
                ).continue_training
        finally:
            if not finished:
                self._last_obs = None
        return finished

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        total_timesteps, callback = super()._setup_learn(total_timesteps, *args, **kwargs)
        if np.all(self._last_episode_starts):  # the environments were just reset
            self.replay_buffer.cut()
        return total_timesteps, callback

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self._last_obs is not None
        actions, self._online_state = self.policy.predict(
            self._last_obs, self._online_state, self._last_episode_starts  # type: ignore[arg-type]
        )
        if self._exploring():
            actions = np.array([self.action_space.sample() for _ in range(n_envs)])
            assert self._online_state is not None
            self._online_state = (self._online_state[0], self.policy.encode_action(actions))
        is_box = isinstance(self.action_space, spaces.Box)
        return actions, self.policy.scale_action(actions) if is_box else actions

    def _exploring(self) -> bool:
        """Random actions until there is something to learn from; not again after a second learn() or a load."""
        return self._n_updates == 0 and self.replay_buffer.size() < self.learning_starts

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        obs, next_obs, normalize = self._last_obs, new_obs, self._vec_normalize_env
        if normalize is not None:
            obs, next_obs = self._last_original_obs, normalize.get_original_obs()
            reward = normalize.get_original_reward()
            infos = [
                {**info, "terminal_observation": normalize.unnormalize_obs(info["terminal_observation"])}
                if "terminal_observation" in info
                else info
                for info in infos
            ]
        assert self._online_state is not None
        latent = self._online_state[0][:, : self.policy.world_model.rssm.latent_width]
        self.replay_buffer.add(obs, next_obs, buffer_action, reward, dones, infos, latent=latent)
        self._last_obs = new_obs
        self._last_original_obs = next_obs
        self._last_episode_starts = dones
        if not self._exploring():
            self._entries_owed += self.train_ratio * len(dones)

    def _updates_due(self) -> int:
        """Updates that the steps taken so far pay for; what is left over stays owed."""
        if not self.replay_buffer.can_sample():
            return 0
        entries = self.batch_size * self.batch_length
        due = int(self._entries_owed // entries)
        self._entries_owed -= due * entries
        return due

    # -- learning ------------------------------------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Sample, update, write the refreshed states back: ``gradient_steps`` times."""
        if gradient_steps == 0:
            return
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            packed, metrics = self.update(batch)
            self.replay_buffer.update_latents(batch.index, packed)
            for key, value in metrics.items():
                self._metrics.setdefault(key, []).append(value)
        self._n_updates += gradient_steps

    def update(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """One update of everything, from one batch (paper, Algorithm 1).

        :return: what the replay keeps of the batch's states (B, T, L), metrics.
        """
        world_model, actor, critic = self.policy.world_model, self.policy.actor, self.policy.critic

        with th.autocast(self.device.type, th.bfloat16, enabled=fast_bfloat16(self.device)):
            # Learn what happens.
            losses, states, info = world_model.loss(batch)

            # Dream on from there, and see what it was worth.
            starts = self._imagination_starts(batch.reward.numel())
            dream = imagine(world_model, actor, states.detach().flatten()[starts], self.imagination_horizon)
            logits = critic(dream.features)
            values = critic.fast.mean(logits.detach())
            returns = lambda_returns(dream.reward, dream.discount, values, self.gae_lambda)
            scale = self.policy.return_scale.update(returns)

            # Learn what to do, and what it is worth.
            losses["actor"], actor_info = actor_loss(actor, dream, returns, values, scale, self.ent_coef)
            if self._cloning is not None:
                losses["actor"] = self._cloning.mix(losses["actor"], actor, states.features, batch, self._n_updates)
            losses["critic"] = critic_loss(critic, dream, logits, returns)

            # What really happened counts too; its bootstrap is what the dreams returned.
            features = states.features
            logits = critic(features)
            bootstrap = critic.fast.mean(logits.detach()).flatten().index_copy(0, starts, returns[:, 0])
            discount = (~batch.is_terminal).to(bootstrap.dtype) * self.gamma
            replay_returns = lambda_returns(
                batch.reward, discount, bootstrap.view_as(batch.reward), self.gae_lambda, batch.is_last
            )
            losses["replay_critic"] = replay_critic_loss(critic, features, logits, replay_returns, batch.is_last)

        loss = sum(LOSS_SCALES[key] * value.mean() for key, value in losses.items())
        self.policy.optimizer.zero_grad()
        loss.backward()
        self.policy.optimizer.step()
        critic.update_slow()

        metrics = {f"{key}_loss": value.detach().mean() for key, value in losses.items()}
        metrics.update(info, **actor_info, imagined_return=returns.mean(), value=values.mean(), return_scale=scale)
        metrics.update(imagined_reward=dream.reward[:, 1:].mean(), replay_return=replay_returns.mean())
        return world_model.rssm.latents(states.detach()), metrics

    def _imagination_starts(self, n_states: int) -> th.Tensor:
        """Which of the batch's states dreams start from: indices (N,)."""
        if self.imagination_starts is None or self.imagination_starts >= n_states:
            return th.arange(n_states, device=self.device)
        return th.randperm(n_states, device=self.device)[: self.imagination_starts]

    def dump_logs(self) -> None:
        """Write the log: the means of the training metrics since the last time, and SB3's own entries."""
        for key, values in self._metrics.items():
            self.logger.record(f"train/{key}", th.stack(values).mean().item())
        self._metrics = {}
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        super().dump_logs()

    # -- the hybrid: each opens its wing when called -------------------------------------------------------------------

    def warm_start(self: SelfDreamer, teacher: Any, n_steps: int, **kwargs: Any) -> SelfDreamer:
        """Begin with what a teacher can do, see :func:`sb3_dreamer.hybrid.warm_start.warm_start`."""
        from sb3_dreamer.hybrid.warm_start import warm_start

        warm_start(self, teacher, n_steps, **kwargs)
        return self

    def add_experience(self: SelfDreamer, source: Any, time_limit: int | None = None) -> SelfDreamer:
        """Take over recorded experience, see :func:`sb3_dreamer.hybrid.experience.add_experience`."""
        from sb3_dreamer.hybrid.experience import add_experience

        add_experience(self, source, time_limit)
        return self

    def pretrain(self: SelfDreamer, updates: int) -> SelfDreamer:
        """Learn from the replay alone, see :func:`sb3_dreamer.hybrid.experience.pretrain`."""
        from sb3_dreamer.hybrid.experience import pretrain

        pretrain(self, updates)
        return self

    def to_model_free(self, algorithm: type[Algorithm], env: GymEnv | None = None, **kwargs: Any) -> Algorithm:
        """A plain SB3 algorithm that goes on from here, see :func:`sb3_dreamer.hybrid.hand_over.to_model_free`."""
        from sb3_dreamer.hybrid.hand_over import to_model_free

        return to_model_free(self, algorithm, env, **kwargs)

    # -- keeping -------------------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: PolicyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PolicyState | None]:
        """See :meth:`sb3_dreamer.policies.DreamerPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfDreamer],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        *,
        trusted: bool = True,
        **kwargs: Any,
    ) -> SelfDreamer:
        """As in every SB3 algorithm; what a saved agent consists of is told in :mod:`sb3_dreamer.files`.

        :param trusted: False for a file from somebody else: nothing is unpickled, so none of their code can run. The
            agent acts as the saved one; settings that were pickled, such as a learning rate schedule, are not read.
        :raises ValueError: for a file that is no agent's, truncated, damaged, or of another version.
        """
        settings, custom_objects = read_settings(path), dict(custom_objects or {})
        if not trusted:
            custom_objects = in_place_of_pickles(settings, cls.policy_aliases, cls, {**kwargs, **custom_objects})
        return super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)

    @classmethod
    def resume(cls: type[SelfDreamer], folder: str | pathlib.Path, env: GymEnv, **kwargs: Any) -> SelfDreamer:
        """Go on from the newest checkpoint of a ``ResumeCallback``: see :func:`sb3_dreamer.resume.resume`."""
        from sb3_dreamer.resume import resume

        return resume(cls, folder, env, **kwargs)

    def load_replay_buffer(
        self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True
    ) -> None:
        """Go on with a saved replay; the next entry begins an episode.

        :param path: what :meth:`save_replay_buffer` was given.
        :param truncate_last_traj: only for SB3's signature, it is about HER.
        :raises ValueError: if it holds no replay of sequences, or one of another shape than this agent's.
        """
        buffer = load_from_pkl(path, self.verbose)
        if not isinstance(buffer, SequenceReplayBuffer):
            raise ValueError(f"{path} holds a {type(buffer).__name__}, but Dreamer replays a SequenceReplayBuffer")
        for name in ("observation_space", "action_space", "n_envs", "sequence_length", "latent_size"):
            saved, own = getattr(buffer, name), getattr(self.replay_buffer, name)
            if saved != own:
                raise ValueError(f"the replay in {path} has {name}={saved}, this agent {own}: load it with the same")
        buffer.device = self.device
        self.replay_buffer = buffer

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in every SB3 algorithm, but the file appears whole or not at all: an older one survives a crash."""
        if not isinstance(path, str | pathlib.Path):
            super().save(path, exclude, include)
            return
        path = pathlib.Path(path)
        path = path if path.suffix else path.with_suffix(".zip")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                super().save(file, exclude, include)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_online_state", "_metrics", "_cloning", "_last_obs", "_last_original_obs"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
