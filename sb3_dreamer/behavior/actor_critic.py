"""Actor and critic on model features, and their losses on dreams and on replayed sequences."""

from __future__ import annotations

import copy

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import ActionDistribution, Bernoulli, BoundedNormal, OneHotCategoricals
from sb3_dreamer.nets.layers import MLP, Linear
from sb3_dreamer.types import Dream, Size, Spec
from sb3_dreamer.world_model.world_model import TwoHotHead

Info = dict[str, th.Tensor]


class Actor(nn.Module):
    """Features (..., F) -> a distribution over actions; three layers, output near zero at the start."""

    def __init__(self, features: int, action_spec: Spec, size: Size) -> None:
        super().__init__()
        self.spec = action_spec
        self.mlp = MLP(features, size.units, layers=3)
        outputs = 2 * action_spec.width if action_spec.kind == "vector" else action_spec.width
        self.out = Linear(size.units, outputs, scale=0.01)

    def forward(self, features: th.Tensor) -> ActionDistribution:
        out = self.out(self.mlp(features)).to(self.out.weight.dtype)
        if self.spec.kind == "vector":
            return BoundedNormal(out)
        return OneHotCategoricals(out, self.spec.classes) if self.spec.kind == "discrete" else Bernoulli(out)


class Critic(nn.Module):
    """Two-hot critic, regularized toward a slow copy of itself (an exponential moving average).

    :param features: F.
    :param size: widths.
    """

    def __init__(self, features: int, size: Size) -> None:
        super().__init__()
        self.fast = TwoHotHead(features, size.units, layers=3)
        self.slow = copy.deepcopy(self.fast).requires_grad_(False)

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Features (..., F) -> logits (..., bins)."""
        return self.fast(features)

    def mean(self, logits: th.Tensor) -> th.Tensor:
        """Expected return by the logits, without gradient: (..., bins) -> (...)."""
        return self.fast.mean(logits.detach())

    def value(self, features: th.Tensor) -> th.Tensor:
        """Expected return: (..., F) -> (...)."""
        return self.fast.mean(self.fast(features))

    def loss(self, logits: th.Tensor, features: th.Tensor, target: th.Tensor) -> th.Tensor:
        """Regress to the returns and to the slow copy: (..., bins), (..., F), (...) -> (...)."""
        with th.no_grad():
            slow = self.slow.mean(self.slow(features))
        return self.fast.loss(logits, target, slow)

    @th.no_grad()
    def update_slow(self, decay: float, learned: th.Tensor) -> None:
        """Keep the share ``decay`` of the slow copy, the rest is the critic's; if it has ``learned`` (() bool)."""
        slow: list[th.Tensor] = list(self.slow.parameters())
        fast: list[th.Tensor] = list(self.fast.parameters())
        th._foreach_add_(slow, th._foreach_mul(th._foreach_sub(fast, slow), (1 - decay) * learned))


@th.no_grad()
def advantages(dream: Dream, returns: th.Tensor, values: th.Tensor, scale: th.Tensor, center: bool) -> th.Tensor:
    """How much more an action returned than the critic expected, in units of the return scale.

    A critic that is still moving shifts all advantages by a common offset far larger than the differences between
    actions, which is noise to the actor. Centered, the weighted mean over the trajectories is zero at each step.

    :param dream: N trajectories of H actions.
    :param returns: (N, H) lambda-returns.
    :param values: (N, H+1) critic at the states of the dream.
    :param scale: () return scale.
    :param center: subtract the mean; the paper does not.
    :return: (N, H).
    """
    advantage = (returns - values[:, :-1]) / scale
    if not center:
        return advantage
    weight = discount_weights(dream)[:, :-1]
    return advantage - (weight * advantage).sum(0) / weight.sum(0).clamp(min=1e-8)


def actor_loss(actor: Actor, dream: Dream, advantage: th.Tensor, ent_coef: th.Tensor | float) -> tuple[th.Tensor, Info]:
    """REINFORCE with an entropy bonus (paper, "Actor learning").

    :param actor: the policy.
    :param dream: N trajectories of H actions.
    :param advantage: (N, H).
    :param ent_coef: weight of the entropy, () if it is a tensor.
    :return: mean loss (); info.
    """
    policy = actor(dream.features)
    entropy = policy.entropy()
    gain = policy.log_prob(F.pad(dream.action, (0, 0, 0, 1))) * F.pad(advantage, (0, 1)) + ent_coef * entropy
    return -(gain * discount_weights(dream)).sum() / advantage.numel(), {
        "entropy": entropy.detach().mean(),
        "advantage_magnitude": advantage.abs().mean(),
    }


def critic_loss(critic: Critic, dream: Dream, logits: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """Critic regression on imagined returns.

    :param critic: the critic.
    :param dream: N trajectories.
    :param logits: (N, H+1, bins) of the critic at the states of the dream.
    :param returns: (N, H).
    :return: mean loss ().
    """
    loss = critic.loss(logits, dream.features, F.pad(returns.detach(), (0, 1)))
    return (loss * discount_weights(dream)).sum() / returns.numel()


def replay_critic_loss(
    critic: Critic, features: th.Tensor, logits: th.Tensor, returns: th.Tensor, is_last: th.Tensor
) -> th.Tensor:
    """Critic regression on replayed sequences; the gradient also shapes the features.

    :param features: (B, T, F).
    :param logits: (B, T, bins) of the critic at the features.
    :param returns: (B, T - 1) lambda-returns; their bootstrap is the imagined return where a dream began, else the
        critic's value.
    :param is_last: (B, T) bool; the last entry of an episode has no return of its own.
    :return: mean loss ().
    """
    loss = critic.loss(logits[:, :-1], features[:, :-1].detach(), returns.detach())
    return (loss * (~is_last[:, :-1]).to(loss.dtype)).mean()


def discount_weights(dream: Dream) -> th.Tensor:
    """(N, H+1) cumulative discount of a dream's states; 0 at the last one, which has no action.

    Losses are computed at all states and weighted: cheaper than to cut the last one off large arrays.
    """
    cumulative = dream.discount.cumprod(1)
    cumulative[:, -1].zero_()
    return cumulative
