"""How each family of SB3 algorithms takes over a policy and its values."""

from __future__ import annotations

import copy
import functools
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

from sb3_dreamer.hybrid.distillation import ActionValues, DistillationTargets
from sb3_dreamer.hybrid.offline_training import prepare_training
from sb3_dreamer.hybrid.progress import Advance, no_progress

BATCH_SIZE = 256
LEARNING_RATE = 1e-3  # at the start
FINAL_RATE = 0.02  # at the end, as a fraction of LEARNING_RATE
MAX_ABS_MEAN = 0.99  # a mean action nearer to the bounds than this would need a tanh of very large numbers
LOG_STD_RANGE = (-3.0, 0.0)
DIFFERENCE_WEIGHT = 10.0  # of the differences between actions in the loss of the critics
SLOW_START = 1e3  # by how much an off-policy actor's first steps are smaller than later ones
CALIBRATION_MINIBATCHES = 50  # from which the size of the gradients is estimated
ADAM_STEP = 1e6  # updates after which Adam does not correct the bias of its moments
UNSUPPORTED_POLICIES = {"RecurrentActorCriticPolicy", "MaskableActorCriticPolicy"}  # of sb3-contrib

# Layer normalization without weights, then ReLU, for any width: all features are one group. It bounds the values of
# actions that critics have not seen (Ball et al. 2023, RLPD); without it the actor follows their errors out of a gait.
# Made of torch's own modules, so that SB3 alone can load a student.
NORMALIZED_RELU = functools.partial(th.nn.Sequential, th.nn.GroupNorm(1, 1, affine=False), th.nn.ReLU())


class Family(Protocol):
    """How the policies of one family of algorithms are trained."""

    def parameters(self) -> list[th.nn.Parameter]:
        """The parameters to train."""

    def loss(self, obs: Any, targets: DistillationTargets, index: np.ndarray) -> th.Tensor:
        """Distance of its actions from Dreamer's, ()."""

    def finish(self, targets: DistillationTargets) -> None:
        """What remains to be done once it acts like Dreamer."""


def family_of(student: BaseAlgorithm) -> Family:
    """The family that an algorithm belongs to.

    :raises ValueError: for an algorithm of no known form.
    """
    ancestors = {base.__name__ for base in type(student.policy).__mro__}
    if isinstance(student, OnPolicyAlgorithm) and ancestors.isdisjoint(UNSUPPORTED_POLICIES):
        return StochasticActorCritic(student)
    actor = getattr(student, "actor", None)
    known_critics = hasattr(getattr(student, "critic", None), "q_networks")
    if not isinstance(student, OffPolicyAlgorithm) or actor is None or not known_critics:
        off_policy = "SAC, TD3, DDPG, TQC, CrossQ, " if isinstance(student.action_space, spaces.Box) else ""
        raise ValueError(
            f"{type(student).__name__} cannot take over from Dreamer: use {off_policy}PPO, A2C or TRPO; for a task "
            'that needs memory, one of them with on="latents"'
        )
    return SquashedActor(student) if hasattr(actor, "action_log_prob") else DeterministicActor(student)


class DeterministicActor:
    """TD3, DDPG: actions (n, A) in [-1, 1]; unless it has action noise already, it gets noise as wide as Dreamer's."""

    def __init__(self, student: Any) -> None:
        self.student = student

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.student.actor.parameters())

    def loss(self, obs: Any, targets: DistillationTargets, index: np.ndarray) -> th.Tensor:
        mean = targets.mean[index].clamp(-MAX_ABS_MEAN, MAX_ABS_MEAN)
        return (self.student.actor(obs) - mean).square().sum(-1).mean()

    def finish(self, targets: DistillationTargets) -> None:
        self.student.actor_target.load_state_dict(self.student.actor.state_dict())
        if self.student.action_noise is None:
            std = targets.std.mean(0).cpu().numpy().reshape(self.student.action_space.shape)
            self.student.action_noise = NormalActionNoise(np.zeros_like(std), std)


class SquashedActor:
    """SAC, TQC, CrossQ: actions tanh(N(mu, std)), in [-1, 1].

    Dreamer's standard deviation is that of the action, the student's that of its argument: they differ by the slope
    of tanh, 1 - a^2. The temperature is Dreamer's weight of the entropy in units of unscaled returns, and the target
    entropy is that of the distilled policy: neither pulls the policy anywhere.
    """

    def __init__(self, student: Any) -> None:
        self.student = student

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.student.actor.parameters())

    def loss(self, obs: Any, targets: DistillationTargets, index: np.ndarray) -> th.Tensor:
        mu, log_std, _ = self.student.actor.get_action_dist_params(obs)
        mean = targets.mean[index].clamp(-MAX_ABS_MEAN, MAX_ABS_MEAN)
        target_log_std = (targets.std[index] / (1 - mean.square())).log().clamp(*LOG_STD_RANGE)
        return ((th.tanh(mu) - mean).square() + 0.1 * (log_std - target_log_std).square()).sum(-1).mean()

    def finish(self, targets: DistillationTargets) -> None:
        obs = targets.obs_for(self.student.policy, next(targets.minibatches(1, 4096)))
        with th.no_grad():
            self.student.target_entropy = -self.student.actor.action_log_prob(obs)[1].mean().item()


class StochasticActorCritic:
    """PPO, A2C, TRPO: a Gaussian in the units of the action space, or choices; and a value function.

    Actions of a Box are learned in [-1, 1], whatever its bounds, and values :class:`Standardized`; the last layers are
    adapted afterwards.
    """

    def __init__(self, student: Any) -> None:
        self.policy: ActorCriticPolicy = student.policy
        self.space = student.action_space
        self.std_given = "log_std_init" in student.policy_kwargs
        self.values: Standardized | None = None  # None: nothing was learned

    def parameters(self) -> list[th.nn.Parameter]:
        return list(self.policy.parameters())

    def loss(self, obs: Any, targets: DistillationTargets, index: np.ndarray) -> th.Tensor:
        distribution: Any = self.policy.get_distribution(obs).distribution
        if self.values is None:
            self.values = Standardized(targets.value)
        mean = targets.mean[index]
        value = self.policy.predict_values(obs).squeeze(-1)
        loss = (value - self.values.value[index]).square().mean()
        if isinstance(self.space, spaces.Box):
            return loss + (distribution.mean - mean).square().sum(-1).mean()
        if isinstance(self.space, spaces.MultiBinary):
            logits = distribution.logits
            return loss - (mean * logits - th.nn.functional.softplus(logits)).sum(-1).mean()
        categoricals = distribution if isinstance(distribution, list) else [distribution]
        logits = th.cat([categorical.logits for categorical in categoricals], -1)
        return loss - (mean * logits).sum(-1).mean()

    def finish(self, targets: DistillationTargets) -> None:
        if self.values is not None:
            self.values.undo(self.policy.value_net)
        if isinstance(self.space, spaces.Box):
            bounds = self.space.low.flatten(), self.space.high.flatten()
            low, high = (th.as_tensor(bound, device=targets.std.device) for bound in bounds)
            half_range = (high - low) / 2
            rescale(self.policy.action_net, half_range, (low + high) / 2)
            if not self.std_given:
                with th.no_grad():
                    self.policy.log_std.copy_((targets.std.mean(0) * half_range).clamp(min=1e-3).log())


def teach(student: BaseAlgorithm, targets: DistillationTargets, updates: int, advance: Advance = no_progress) -> None:
    """Train the student to act (and on policy, to value states) as Dreamer does; its own optimizers stay untouched.

    :param student: the algorithm.
    :param targets: what to learn.
    :param updates: minibatches of 256.
    :param advance: called after each.
    """
    family = family_of(student)

    def loss(index: np.ndarray) -> th.Tensor:
        return family.loss(targets.obs_for(student.policy, index), targets, index)

    student.policy.set_training_mode(True)
    fit(family.parameters(), loss, targets.minibatches(updates, BATCH_SIZE), updates, advance)
    student.policy.set_training_mode(False)
    family.finish(targets)


def teach_critics(student: Any, targets: ActionValues, updates: int, advance: Advance = no_progress) -> None:
    """Off-policy critics learn Dreamer's action values, above all the differences between actions in one state.

    The actor follows their slope over actions from its first step on, and replayed actions hardly reveal it.
    They learn at a rate of their own, whatever the student's is, and it falls to almost nothing: at a constant rate the
    noise of the last minibatches alone leads the actor astray. The values are standardized, and the last layers then
    take over their mean and deviation: on the way from zero to values of hundreds a critic learns nothing else.

    :param student: the algorithm.
    :param targets: what to learn.
    :param updates: minibatches of 256 states.
    :param advance: called after each.
    """
    if updates == 0:
        return
    values = Standardized(targets.value)

    def loss(index: np.ndarray) -> th.Tensor:
        value = values.value[index]
        obs = targets.obs_for(student.policy, index.repeat(value.shape[1]))
        predicted = student.critic(obs, targets.action[index].flatten(0, 1))
        stacked = th.stack(predicted, 1) if isinstance(predicted, tuple) else predicted  # (., critics, 1 or quantiles)
        error = stacked.flatten(1).unflatten(0, value.shape) - value.unsqueeze(-1)
        return error.square().mean() + DIFFERENCE_WEIGHT * (error - error[:, :1]).square().mean()

    student.policy.set_training_mode(True)
    fit(student.critic.parameters(), loss, targets.minibatches(updates, BATCH_SIZE), updates, advance)
    student.policy.set_training_mode(False)
    for network in student.critic.q_networks:
        values.undo(network[-1])
    if hasattr(student, "critic_target"):
        student.critic_target.load_state_dict(student.critic.state_dict())


class Standardized:
    """Values with mean 0 and standard deviation 1; constant values become 0.

    :param value: (...) in the units of the returns.
    """

    def __init__(self, value: th.Tensor) -> None:
        self.mean, self.std = value.mean(), value.std().clamp(min=1e-3)  # the bound: not to amplify noise
        self.value = (value - self.mean) / self.std

    def undo(self, layer: Any) -> None:
        """Make a last layer that has learned these values predict the original ones."""
        rescale(layer, self.std, self.mean)


@th.no_grad()
def rescale(layer: Any, scale: th.Tensor, shift: th.Tensor) -> None:
    """Multiply the outputs of a linear layer by ``scale`` and add ``shift``, () or (out,) each."""
    layer.weight.mul_(scale.unsqueeze(-1))
    layer.bias.mul_(scale).add_(shift)


def start_slowly(student: Any) -> None:
    """Make the actor's first steps small, so that the critics can follow its changes.

    Its optimizer is left as if gradients had been ``SLOW_START`` times as large as they are. Adam forgets that at the
    rate of its second moments: with 1,000 and 0.999 steps are a hundredth of their size after 4,600 updates, and whole
    after 13,800. Another kind of optimizer stays as it is, and so does AMSGrad, which never forgets.

    :param student: the algorithm, its critics trained and its replay filled.
    """
    updates, schedule, actor = student._n_updates, student.lr_schedule, copy.deepcopy(student.actor.state_dict())
    student.lr_schedule = lambda _: 0.0  # nothing moves, but the optimizers record the gradients
    prepare_training(student)
    try:
        student.train(CALIBRATION_MINIBATCHES, student.batch_size)
    finally:
        student._n_updates, student.lr_schedule = updates, schedule
        student.actor.load_state_dict(actor)  # the batch norms of CrossQ change with every batch
        del student._logger
    optimizer = student.actor.optimizer
    decay = optimizer.defaults.get("betas", (None, None))[1]
    for state in optimizer.state.values():
        if decay is not None and "exp_avg_sq" in state and "max_exp_avg_sq" not in state:
            square = state["exp_avg_sq"] / (1 - decay ** state["step"].item())
            state["exp_avg_sq"].copy_(SLOW_START**2 * square.clamp(min=square.mean()))  # some have no gradient yet
            state["step"].fill_(ADAM_STEP)


def fit(
    parameters: Iterable[th.nn.Parameter],
    loss_of: Callable[[np.ndarray], th.Tensor],
    minibatches: Iterable[np.ndarray],
    updates: int,
    advance: Advance,
) -> None:
    """Minimize the loss of each minibatch in turn, at a rate that falls to almost nothing."""
    optimizer = th.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = th.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_RATE, total_iters=max(updates, 1))
    for index in minibatches:
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    optimizer.zero_grad()
