"""How each family of SB3 algorithms takes over a policy and its values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_dreamer.hybrid.experience import prepare_training
from sb3_dreamer.hybrid.lessons import Lessons
from sb3_dreamer.hybrid.progress import Advance, unseen

BATCH = 256
LEARNING_RATE = 1e-3  # at the beginning of what is taught
LAST_RATE = 0.02  # the share of it at the end
MOST_SATURATED = 0.99  # a mean action nearer to the bounds than this would need a tanh of very large numbers
LOG_STD_RANGE = (-3.0, 0.0)


class Student(Protocol):
    """One family of algorithms."""

    def parameters(self) -> list[th.nn.Parameter]:
        """What learns to act."""

    def loss(self, obs: Any, lessons: Lessons, index: np.ndarray) -> th.Tensor:
        """How far its actions are from Dreamer's, ()."""

    def finish(self, lessons: Lessons) -> None:
        """What is left to do once it acts alike."""


def student_of(target: BaseAlgorithm) -> Student:
    """The family that an algorithm belongs to.

    :raises ValueError: for an algorithm whose policy has none of the known forms.
    """
    if isinstance(target, OnPolicyAlgorithm) and type(target.policy).__name__.find("Recurrent") < 0:
        return StochasticActorCritic(target)
    actor = getattr(target.policy, "actor", None)
    if not isinstance(target, OffPolicyAlgorithm) or actor is None:
        raise ValueError(
            f"{type(target).__name__} is of no family that Dreamer can be handed over to: use SAC, TD3, DDPG, TQC, "
            'CrossQ, PPO, A2C or TRPO; for a task that needs memory, one of them with on="latents"'
        )
    return SquashedActor(target) if hasattr(actor, "action_log_prob") else DeterministicActor(target)


class DeterministicActor:
    """TD3, DDPG: actions (n, A) in [-1, 1]; they explore by noise as wide as Dreamer's, if no other was asked for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.target.actor.parameters())

    def loss(self, obs: Any, lessons: Lessons, index: np.ndarray) -> th.Tensor:
        mean = lessons.mean[index].clamp(-MOST_SATURATED, MOST_SATURATED)
        return (self.target.actor(obs) - mean).square().sum(-1).mean()

    def finish(self, lessons: Lessons) -> None:
        self.target.actor_target.load_state_dict(self.target.actor.state_dict())
        if self.target.action_noise is None:
            width = lessons.std.mean(0).cpu().numpy().reshape(self.target.action_space.shape)
            self.target.action_noise = NormalActionNoise(np.zeros_like(width), width)


class SquashedActor:
    """SAC, TQC, CrossQ: actions tanh(N(mu, std)), in [-1, 1].

    Dreamer's standard deviation is that of the action, the student's that of its argument: they differ by the slope
    of tanh, 1 - a^2. The temperature is what Dreamer's own weight of the entropy means for unscaled returns, and the
    entropy to be kept is the one that was handed over: neither pulls the policy anywhere.
    """

    def __init__(self, target: Any) -> None:
        self.target = target

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.target.actor.parameters())

    def loss(self, obs: Any, lessons: Lessons, index: np.ndarray) -> th.Tensor:
        mu, log_std, _ = self.target.actor.get_action_dist_params(obs)
        mean = lessons.mean[index].clamp(-MOST_SATURATED, MOST_SATURATED)
        wanted = (lessons.std[index] / (1 - mean.square())).log().clamp(*LOG_STD_RANGE)
        return ((th.tanh(mu) - mean).square() + 0.1 * (log_std - wanted).square()).sum(-1).mean()

    def finish(self, lessons: Lessons) -> None:
        obs = lessons.seen_by(self.target.policy, next(lessons.batches(1, 4096)))
        with th.no_grad():
            self.target.target_entropy = -self.target.actor.action_log_prob(obs)[1].mean().item()


class StochasticActorCritic:
    """PPO, A2C, TRPO: a Gaussian in the units of the action space, or choices; value function beside it."""

    def __init__(self, target: Any) -> None:
        self.policy: ActorCriticPolicy = target.policy
        self.space = target.action_space

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.policy.parameters())

    def loss(self, obs: Any, lessons: Lessons, index: np.ndarray) -> th.Tensor:
        chosen: Any = self.policy.get_distribution(obs).distribution
        wanted = lessons.mean[index]
        scale = lessons.value.std().clamp(min=1e-3)
        value = self.policy.predict_values(obs).squeeze(-1)
        loss = ((value - lessons.value[index]) / scale).square().mean()
        if isinstance(self.space, spaces.Box):
            low, high = (th.as_tensor(b.flatten(), device=wanted.device) for b in (self.space.low, self.space.high))
            mean = 2 * (chosen.mean - low) / th.where(high > low, high - low, 1) - 1
            return loss + (mean - wanted).square().sum(-1).mean()
        if isinstance(self.space, spaces.MultiBinary):
            return loss - (wanted * chosen.logits - th.nn.functional.softplus(chosen.logits)).sum(-1).mean()
        logits = th.cat([part.logits for part in (chosen if isinstance(chosen, list) else [chosen])], -1)
        return loss - (wanted * logits).sum(-1).mean()

    def finish(self, lessons: Lessons) -> None:
        if isinstance(self.space, spaces.Box):
            half_range = th.as_tensor((self.space.high - self.space.low).flatten() / 2, device=lessons.std.device)
            with th.no_grad():
                self.policy.log_std.copy_((lessons.std.mean(0) * half_range).clamp(min=1e-3).log())


def teach(target: BaseAlgorithm, lessons: Lessons, updates: int, advance: Advance = unseen) -> None:
    """Make the student act (and, on policy, judge) as Dreamer does; its own optimisers stay as new.

    :param target: the student.
    :param lessons: what to learn.
    :param updates: minibatches of 256.
    :param advance: is told of each.
    """
    student = student_of(target)

    def loss(index: np.ndarray) -> th.Tensor:
        return student.loss(lessons.seen_by(target.policy, index), lessons, index)

    target.policy.set_training_mode(True)
    fit(student.parameters(), loss, lessons.batches(updates, BATCH), updates, advance)
    target.policy.set_training_mode(False)
    student.finish(lessons)


def teach_critics(target: Any, lessons: Lessons, updates: int, advance: Advance = unseen) -> None:
    """Off-policy critics: first Dreamer's returns, then their own bootstrap on the real transitions, the actor fixed.

    The actor follows their slope over actions from its first step on, and they have to be right about that, not only
    about the value of a state. So both parts learn at a rate of their own, whatever the student's is, and it falls to
    almost nothing: at a constant rate the noise of the last minibatches alone leads the actor astray.

    :param target: the student, its replay filled.
    :param lessons: what actions were worth.
    :param updates: minibatches for each of the two.
    :param advance: is told of each.
    """

    def loss(index: np.ndarray) -> th.Tensor:
        predicted = target.critic(lessons.seen_by(target.policy, index), lessons.taken[index])
        stacked = th.stack(predicted, 1) if isinstance(predicted, tuple) else predicted  # (n, critics, 1 or quantiles)
        return (stacked - lessons.taken_value[index, None, None]).square().mean()

    target.policy.set_training_mode(True)
    fit(target.critic.parameters(), loss, lessons.batches(updates, BATCH), updates, advance)
    if hasattr(target, "critic_target"):
        target.critic_target.load_state_dict(target.critic.state_dict())
    with actor_fixed(target):
        for done in range(updates):
            target._current_progress_remaining = 1 - done / updates
            target.train(1, target.batch_size)
            advance(1)
    target.policy.set_training_mode(False)


def fit(
    parameters: Iterable[th.nn.Parameter],
    loss_of: Callable[[np.ndarray], th.Tensor],
    batches: Iterable[np.ndarray],
    updates: int,
    advance: Advance,
) -> None:
    """Minimise the loss of each batch in turn, at a rate that falls to almost nothing."""
    optimizer = th.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = th.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_RATE, total_iters=max(updates, 1))
    for index in batches:
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    optimizer.zero_grad()


@contextmanager
def actor_fixed(target: Any) -> Iterator[None]:
    """``train()`` moves the critics only, neither the actor nor the temperature, at a rate that falls with progress."""
    updates, temperature = target._n_updates, getattr(target, "ent_coef_optimizer", None)
    actor = copy.deepcopy(target.actor.state_dict())
    schedule, target.lr_schedule = target.lr_schedule, lambda remaining: LEARNING_RATE * max(remaining, LAST_RATE)
    target.actor.requires_grad_(False)
    prepare_training(target)
    if temperature is not None:
        target.ent_coef_tensor, target.ent_coef_optimizer = target.log_ent_coef.detach().exp(), None
    try:
        yield
    finally:
        if temperature is not None:
            del target.ent_coef_tensor
            target.ent_coef_optimizer = temperature
        target.actor.requires_grad_(True)
        target.actor.load_state_dict(actor)  # CrossQ's batch norms take note of every batch
        target._n_updates, target.lr_schedule, target._current_progress_remaining = updates, schedule, 1.0
        del target._logger
