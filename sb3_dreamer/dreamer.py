"""Dreamer, one more SB3 algorithm: all the knobs and the train step."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TensorDict

from sb3_dreamer.algorithm import SequenceAlgorithm
from sb3_dreamer.behavior.actor_critic import actor_loss, advantages, critic_loss, replay_critic_loss
from sb3_dreamer.behavior.imagination import draw_starts, imagine, lambda_returns
from sb3_dreamer.capture import CapturedUpdate, Update, record_cuda_graph
from sb3_dreamer.environments import normalizes_obs
from sb3_dreamer.files import describe
from sb3_dreamer.imitation import NO_TEACHER
from sb3_dreamer.knobs import KNOBS, at_progress, check_knobs
from sb3_dreamer.metrics import Metrics
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.optional_methods import OptionalMethods
from sb3_dreamer.policies import CnnPolicy, DreamerPolicy, MlpPolicy, MultiInputPolicy
from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.types import Batch

LOSS_SCALES = {
    "reconstruction": 1.0, "reward": 1.0, "continue": 1.0, "dyn": 1.0, "rep": 0.1,
    "actor": 1.0, "critic": 1.0, "replay_critic": 0.3,
}  # fmt: skip

READ_FROM_TENSORS = {"learning_rate", "actor_lr_scale", "critic_lr_scale", "ent_coef"}  # so that they may change
NOT_READ_BY_UPDATE = READ_FROM_TENSORS | {"learning_starts", "train_ratio"}


def total_loss(losses: dict[str, th.Tensor]) -> th.Tensor:
    """Weighted sum of the means of losses by name, any shapes -> ()."""
    return th.stack([LOSS_SCALES[name] * loss.mean() for name, loss in losses.items()]).sum()


class Dreamer(OptionalMethods, SequenceAlgorithm):
    """DreamerV3 (Hafner et al., "Mastering diverse control tasks through world models", Nature 2025).

    :param policy: "MlpPolicy", "CnnPolicy" or "MultiInputPolicy".
    :param env: environment, VecEnv, or the id of a registered one.
    :param learning_rate: a number, or a function of the remaining progress (1 to 0).
    :param warmup_updates: updates over which the learning rate rises from zero.
    :param actor_lr_scale: learning rate of the actor, relative to the world model's.
    :param critic_lr_scale: learning rate of the critic, relative to the world model's.
    :param critic_ema_decay: how much of the critic's slow copy stays at each update.
    :param buffer_size: capacity of the replay in entries, all environments together.
    :param learning_starts: entries in the replay before the first update, an episode of n steps has n + 1; actions are
        random until then. One environment also needs ``batch_length`` entries.
    :param batch_size: sequences in a batch.
    :param batch_length: entries of a sequence.
    :param train_ratio: replayed entries per environment step, fractions allowed.
    :param imagination_starts: how many of the batch's states dreams start from, drawn at random; None: all.
    :param imagination_horizon: imagined steps of a dream.
    :param gamma: discount.
    :param gae_lambda: lambda of the returns.
    :param ent_coef: weight of the actor's entropy: a number, or a function of the remaining progress (1 to 0), such as
        SB3's ``LinearSchedule``.
    :param center_advantage: subtract the mean advantage of the dreams, see
        :func:`~sb3_dreamer.behavior.actor_critic.advantages`.
    :param rssm_type: sequence model, "gru" or "transformer".
    :param model_size: "debug", "size1m", "size12m", "size25m", "size50m", "size100m" or "size200m".
    :param replay_buffer_class: a subclass of :class:`~sb3_dreamer.replay.SequenceReplayBuffer`.
    :param replay_buffer_kwargs: further arguments of the buffer.
    :param policy_kwargs: single widths in place of those of ``model_size``, and ``normalize_obs``.
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

    def __init__(
        self,
        policy: str | type[DreamerPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 6e-4,
        *,  # SAC's next positional argument, buffer_size, is not the next one here
        warmup_updates: int = 100,
        actor_lr_scale: float = 0.2,
        critic_lr_scale: float = 4.0,
        critic_ema_decay: float = 0.9,
        buffer_size: int = 1_000_000,
        learning_starts: int = 500,
        batch_size: int = 16,
        batch_length: int = 64,
        train_ratio: float = 256,
        imagination_starts: int | None = 256,
        imagination_horizon: int = 15,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        ent_coef: float | Schedule = 3e-4,
        center_advantage: bool = True,
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
            replay_buffer_class=replay_buffer_class,
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
        self.actor_lr_scale = actor_lr_scale
        self.critic_lr_scale = critic_lr_scale
        self.critic_ema_decay = critic_ema_decay
        self.batch_length = batch_length
        self.train_ratio = train_ratio
        self.imagination_starts = imagination_starts
        self.imagination_horizon = imagination_horizon
        self.gae_lambda = gae_lambda
        self.ent_coef = ent_coef
        self.center_advantage = center_advantage
        self.rssm_type = rssm_type
        self.model_size = model_size
        self._metrics = Metrics(self.device)
        self._captured: tuple[list[Any], CapturedUpdate] | None = None
        if _init_setup_model:
            self._setup_model()
            if (there := self.replay_buffer.size()) > 0:
                warnings.warn(
                    f"{self.replay_buffer.storage_path} holds {there} entries already, and this new agent learns from "
                    "them at once: give each run a storage_path of its own, unless that is wanted",
                    stacklevel=2,
                )

    def check_settings(self) -> None:
        """Refuse knobs that cannot work, also those that were assigned after construction.

        :raises ValueError: names the knob, what was given and what is allowed.
        """
        check_knobs(vars(self))

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError("a new agent needs an environment, whose spaces its networks are built for: give env=")
        self.check_settings()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if not (isinstance(self.policy_class, type) and issubclass(self.policy_class, DreamerPolicy)):
            raise TypeError(
                f"policy is {self.policy_class!r}, which has no world model: give one of {list(self.policy_aliases)}, "
                "or a class derived from DreamerPolicy"
            )
        shared = ("model_size", "rssm_type", "gamma")
        if own := sorted(self.policy_kwargs.keys() & shared):
            raise ValueError(f"policy_kwargs {own} are arguments of Dreamer itself: give them to it")
        self.policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            **{name: getattr(self, name) for name in shared},
            **self.policy_kwargs,
        ).to(self.device)
        self.policy.world_model.gamma = self.trained_gamma or self.gamma  # what loaded weights have learned
        buffer_class: Any = self.replay_buffer_class or SequenceReplayBuffer
        self.replay_buffer = buffer_class(
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
        self._ent_coef = th.zeros((), device=self.device).fill_(at_progress("ent_coef", self.ent_coef, 1.0))
        self.described = describe(self.policy_class, self.observation_space, self.action_space)

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in every SB3 algorithm; what the replay draws follows too."""
        super().set_random_seed(seed)
        if seed is not None and self.replay_buffer is not None:
            self.replay_buffer.reseed()

    # -- learning ------------------------------------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Sample, update, write the refreshed states back: ``gradient_steps`` times."""
        if gradient_steps == 0:
            return
        at_progress("learning_rate", self.lr_schedule, self._current_progress_remaining)  # refuses what is no rate
        self._update_learning_rate(self.policy.optimizer)
        self._ent_coef.fill_(at_progress("ent_coef", self.ent_coef, self._current_progress_remaining))
        teacher_weight = self.imitation.weight(self._n_updates)
        self.policy.set_rates(self.warmup_updates, self.actor_lr_scale * (1 - teacher_weight), self.critic_lr_scale)
        self.policy.optimizer.put_rates_on_device()
        self.trained_gamma = self.policy.world_model.gamma = self.gamma
        normalize = self._vec_normalize_env
        self.trained_with_vecnormalize = normalize is not None
        self.trained_on_normalized_obs = normalizes_obs(normalize)
        update = self._captured_update()
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=normalize)
            latents, metrics = update(batch)
            self.replay_buffer.update_latents(batch.index, latents)
            self._n_updates += 1
            self._metrics.add(metrics)
            self.imitation.imitate(self, teacher_weight)
        if teacher_weight == 0.0:
            self.imitation = NO_TEACHER
        if self.device.type == "cpu":  # to read the means would wait for a GPU
            self._record_metrics()

    def update(self, batch: Batch) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """One update of everything, from one batch (paper, "Learning algorithm").

        :return: what the replay keeps of the batch's states (B, T, L), metrics.
        """
        world_model, actor, critic = self.policy.world_model, self.policy.actor, self.policy.critic

        with mixed_precision(self.device):
            # Learn what happens.
            losses, states, info = world_model.loss(batch)

            # Dream on from there, and see what it was worth.
            starts = draw_starts(batch.reward.numel(), self.imagination_starts, self.device)
            start = states.detach().flatten()[starts]
            dream = imagine(world_model, actor, start, self.imagination_horizon, compiled=True)
            th.clear_autocast_cache()  # older torch reuses weights cast under no_grad, which get none (pytorch#112583)
            logits = critic(dream.features)
            values = critic.mean(logits)
            returns = lambda_returns(dream.reward, dream.discount, values, self.gae_lambda)
            scale = self.policy.return_scale.update(returns)

            # Learn what to do, and what it is worth.
            advantage = advantages(dream, returns, values, scale, self.center_advantage)
            losses["actor"], actor_info = actor_loss(actor, dream, advantage, self._ent_coef)
            losses["critic"] = critic_loss(critic, dream, logits, returns)

            # What really happened counts too; its bootstrap is what dreams returned, where they began there.
            features = states.features
            logits = critic(features)
            bootstrap = critic.mean(logits).flatten().index_copy(0, starts, returns[:, 0])
            discount = (~batch.is_terminal).to(bootstrap.dtype) * self.gamma
            replay_returns = lambda_returns(
                batch.reward, discount, bootstrap.view_as(batch.reward), self.gae_lambda, batch.is_last
            )
            losses["replay_critic"] = replay_critic_loss(critic, features, logits, replay_returns, batch.is_last)

        loss = total_loss(losses)
        self.policy.optimizer.zero_grad()
        loss.backward()
        learned = self.policy.optimizer.step(loss)
        critic.update_slow(self.critic_ema_decay, learned)
        self.policy.return_scale.rollback_unless(learned)
        world_model.normalizer.rollback_unless(learned)

        metrics = {f"{key}_loss": value.detach().mean() for key, value in losses.items()}
        metrics.update(info, **actor_info, value=values.mean(), return_scale=scale, skipped_updates=~learned)
        metrics.update(imagined_return=returns[:, 0].mean(), replay_return=replay_returns.mean())
        metrics.update(imagined_reward=dream.reward[:, 1:].mean(), ent_coef=self._ent_coef)
        return world_model.rssm.latents(states.detach()).nan_to_num(), metrics

    def _captured_update(self) -> Update:
        """:meth:`update`, as a CUDA graph on a GPU."""
        knobs = [getattr(self, name) for name in KNOBS if name not in NOT_READ_BY_UPDATE]
        if self._captured is None or self._captured[0] != knobs:
            record = record_cuda_graph if self.device.type == "cuda" else None
            self._captured = knobs, CapturedUpdate(self.update, record)
        return self._captured[1]

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As in every SB3 algorithm, see :meth:`SequenceAlgorithm.set_parameters`."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._captured = None

    def _record_metrics(self) -> None:
        """Hand the logger the means of the training metrics since the last :meth:`dump_logs`, for whoever writes it."""
        for key, value in self._metrics.means().items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/skipped_updates", self._metrics.skips())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def dump_logs(self) -> None:
        """Write the log: the means of the training metrics since the last time, and SB3's own entries."""
        self._record_metrics()
        self._metrics.reset()
        super().dump_logs()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_metrics", "_captured", "_ent_coef"]
