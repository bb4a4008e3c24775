"""How each family of SB3 algorithms takes over a policy and its values."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable
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
from sb3_dreamer.hybrid.lessons import Lessons, Verdicts
from sb3_dreamer.hybrid.progress import Advance, no_progress

BATCH = 256
LEARNING_RATE = 1e-3  # at the beginning of what is taught
LAST_RATE = 0.02  # the share of it at the end
MOST_SATURATED = 0.99  # a mean action nearer to the bounds than this would need a tanh of very large numbers
LOG_STD_RANGE = (-3.0, 0.0)
DIFFERENCES = 10.0  # weight of the differences between actions in what critics are taught
SLOW_START = 1e3  # by how much an off-policy actor's first steps are smaller than later ones
GRADIENTS_NOTED = 50  # minibatches that tell how large they are
ENDLESS = 1e6  # updates after which Adam corrects its moments no more

# Layer normalisation without weights, then ReLU, for any width: all features are one group. It bounds what critics make
# of actions that they have not seen (Ball et al. 2023, RLPD); without it the actor follows their errors out of a gait.
# Made of torch's own parts, so that SB3 alone can load what has it.
NORMED_RELU = functools.partial(th.nn.Sequential, th.nn.GroupNorm(1, 1, affine=False), th.nn.ReLU())


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
    if isinstance(target, OnPolicyAlgorithm) and not re.search("Recurrent|Maskable", type(target.policy).__name__):
        return StochasticActorCritic(target)
    actor = getattr(target.policy, "actor", None)
    if not isinstance(target, OffPolicyAlgorithm) or actor is None:
        continuous = "SAC, TD3, DDPG, TQC, CrossQ, " * isinstance(target.action_space, spaces.Box)
        raise ValueError(
            f"{type(target).__name__} is of no family that Dreamer can be handed over to: use {continuous}PPO, A2C or "
            'TRPO; for a task that needs memory, one of them with on="latents"'
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
    """PPO, A2C, TRPO: a Gaussian in the units of the action space, or choices; value function beside it.

    Actions of a Box are learned in [-1, 1], whatever its bounds; the last layer then takes over their scale.
    """

    def __init__(self, target: Any) -> None:
        self.policy: ActorCriticPolicy = target.policy
        self.space = target.action_space
        self.std_given = "log_std_init" in target.policy_kwargs

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.policy.parameters())

    def loss(self, obs: Any, lessons: Lessons, index: np.ndarray) -> th.Tensor:
        chosen: Any = self.policy.get_distribution(obs).distribution
        wanted = lessons.mean[index]
        value = self.policy.predict_values(obs).squeeze(-1)
        loss = (value - standardized(lessons.value)[index]).square().mean()
        if isinstance(self.space, spaces.Box):
            return loss + (chosen.mean - wanted).square().sum(-1).mean()
        if isinstance(self.space, spaces.MultiBinary):
            return loss - (wanted * chosen.logits - th.nn.functional.softplus(chosen.logits)).sum(-1).mean()
        logits = th.cat([part.logits for part in (chosen if isinstance(chosen, list) else [chosen])], -1)
        return loss - (wanted * logits).sum(-1).mean()

    def finish(self, lessons: Lessons) -> None:
        unstandardize(self.policy.value_net, lessons.value)
        if isinstance(self.space, spaces.Box):
            bounds = self.space.low.flatten(), self.space.high.flatten()
            low, high = (th.as_tensor(bound, device=lessons.std.device) for bound in bounds)
            half_range = (high - low) / 2
            rescale(self.policy.action_net, half_range, (low + high) / 2)
            if not self.std_given:
                with th.no_grad():
                    self.policy.log_std.copy_((lessons.std.mean(0) * half_range).clamp(min=1e-3).log())


def teach(target: BaseAlgorithm, lessons: Lessons, updates: int, advance: Advance = no_progress) -> None:
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


def teach_critics(target: Any, verdicts: Verdicts, updates: int, advance: Advance = no_progress) -> None:
    """Off-policy critics learn what Dreamer thinks of actions, and foremost how they differ at one moment.

    The actor follows their slope over actions from its first step on, and replayed actions hardly tell them apart.
    They learn at a rate of their own, whatever the student's is, and it falls to almost nothing: at a constant rate the
    noise of the last minibatches alone leads the actor astray. They learn standardized values, and the last layers then
    take over mean and deviation: from zero to values of hundreds they would climb for thousands of updates and learn
    nothing else.

    :param target: the student.
    :param verdicts: what actions are worth.
    :param updates: minibatches of 256 moments.
    :param advance: is told of each.
    """
    values = standardized(verdicts.value)

    def loss(index: np.ndarray) -> th.Tensor:
        value = values[index]
        obs = verdicts.seen_by(target.policy, index.repeat(value.shape[1]))
        predicted = target.critic(obs, verdicts.action[index].flatten(0, 1))
        stacked = th.stack(predicted, 1) if isinstance(predicted, tuple) else predicted  # (., critics, 1 or quantiles)
        error = stacked.flatten(1).unflatten(0, value.shape) - value.unsqueeze(-1)
        return error.square().mean() + DIFFERENCES * (error - error[:, :1]).square().mean()

    target.policy.set_training_mode(True)
    fit(target.critic.parameters(), loss, verdicts.batches(updates, BATCH), updates, advance)
    target.policy.set_training_mode(False)
    for network in target.critic.q_networks:
        unstandardize(network[-1], verdicts.value)
    if hasattr(target, "critic_target"):
        target.critic_target.load_state_dict(target.critic.state_dict())


def standardized(value: th.Tensor) -> th.Tensor:
    """Values of any shape with mean 0 and deviation 1; constant ones are 0."""
    return (value - value.mean()) / deviation(value)


def unstandardize(layer: Any, value: th.Tensor) -> None:
    """Let a last layer that has learned :func:`standardized` values give the values themselves."""
    rescale(layer, deviation(value), value.mean())


def deviation(value: th.Tensor) -> th.Tensor:
    """Standard deviation (), not so small that noise would be amplified."""
    return value.std().clamp(min=1e-3)


@th.no_grad()
def rescale(layer: Any, scale: th.Tensor, shift: th.Tensor) -> None:
    """Multiply the outputs of a linear layer by ``scale`` and add ``shift``, () or (out,) each."""
    layer.weight.mul_(scale.unsqueeze(-1))
    layer.bias.mul_(scale).add_(shift)


def start_slowly(target: Any) -> None:
    """Let the actor's first steps be small, so that the critics can follow what it becomes.

    Its optimiser is left as if gradients had been ``SLOW_START`` times as large as they are. Adam forgets that at the
    rate of its second moments: with 1,000 and 0.999 steps are a hundredth of their size after 4,600 updates, and whole
    after 13,800. Another kind of optimiser stays as it is, and so does AMSGrad, which never forgets.

    :param target: the student, its critics taught and its replay filled.
    """
    updates, schedule, actor = target._n_updates, target.lr_schedule, copy.deepcopy(target.actor.state_dict())
    target.lr_schedule = lambda _: 0.0  # nothing moves, but the optimisers take note of the gradients
    prepare_training(target)
    try:
        target.train(GRADIENTS_NOTED, target.batch_size)
    finally:
        target._n_updates, target.lr_schedule = updates, schedule
        target.actor.load_state_dict(actor)  # CrossQ's batch norms take note of every batch
        del target._logger
    optimizer = target.actor.optimizer
    decay = optimizer.defaults.get("betas", (None, None))[1]
    for state in optimizer.state.values():
        if decay is not None and "exp_avg_sq" in state and "max_exp_avg_sq" not in state:
            square = state["exp_avg_sq"] / (1 - decay ** state["step"].item())
            state["exp_avg_sq"].copy_(SLOW_START**2 * square.clamp(min=square.mean()))  # some have seen no gradient yet
            state["step"].fill_(ENDLESS)


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
