"""Output distributions: symlog and two-hot regression, categorical latents, action distributions."""

from __future__ import annotations

import math
from typing import Protocol

import torch as th
import torch.nn.functional as F

UNIMIX = 0.01
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def symlog(x: th.Tensor) -> th.Tensor:
    """Sign-preserving logarithm, sign(x) ln(1 + |x|)."""
    return th.log1p(th.abs(x)).copysign(x)


def symexp(x: th.Tensor) -> th.Tensor:
    """Inverse of :func:`symlog`."""
    return th.sign(x) * th.expm1(th.abs(x))


# -- two-hot regression ------------------------------------------------------------------------------------------------


def symexp_bins(bins: int = 255) -> th.Tensor:
    """Centers of the two-hot bins: ``bins`` (odd) values, evenly spaced in [-20, 20] under symlog."""
    half = symexp(th.linspace(-20, 0, bins // 2 + 1))
    return th.cat([half, -half[:-1].flip(0)])


def twohot_mean(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """Expected value (..., bins) -> (...), by pairs of mirrored bins, so that uniform logits give exactly zero."""
    probs, m = F.softmax(logits, -1), bins.shape[0] // 2
    pairs = probs[..., m + 1 :] - probs[..., :m].flip(-1)
    return (pairs * bins[m + 1 :]).sum(-1)  # not a matrix product, which autocast would round


def twohot_loss(logits: th.Tensor, target: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """Cross-entropy to the two-hot codes of one or more targets, summed over them (paper, "Robust predictions").

    :param logits: (..., bins).
    :param target: (..., n) targets of the same prediction.
    :param bins: (bins,) their centers.
    :return: (...).
    """
    target = target.detach().clamp(bins[0], bins[-1])
    above = th.searchsorted(bins, target, right=True).clamp(1, bins.shape[0] - 1)
    low, high = bins[above - 1], bins[above]
    weight = (target - low) / (high - low)
    chosen = F.log_softmax(logits, -1).gather(-1, th.cat([above - 1, above], -1))  # (..., 2 n)
    return -(chosen * th.cat([1 - weight, weight], -1)).sum(-1)


# -- categorical latents -----------------------------------------------------------------------------------------------


def unimix_probs(logits: th.Tensor, dim: int = -1) -> th.Tensor:
    """Softmax over ``dim`` mixed with 1% of a uniform distribution, so that no class is ever impossible."""
    return F.softmax(logits, dim) * (1 - UNIMIX) + UNIMIX / logits.shape[dim]


def sample_onehot(probs: th.Tensor, dim: int = -1) -> th.Tensor:
    """One-hot samples along ``dim``; no gradient."""
    return sample_onehot_with(probs, th.rand_like(probs.narrow(dim, -1, 1)), dim)


@th.no_grad()
def sample_onehot_with(probs: th.Tensor, noise: th.Tensor, dim: int = -1) -> th.Tensor:
    """One-hot samples along ``dim``, by inversion of the cumulative distribution.

    :param noise: uniform numbers in [0, 1), of size 1 along ``dim``.
    """
    cumulative = probs.cumsum(dim)
    reached = (noise * cumulative.narrow(dim, -1, 1) < cumulative).to(probs.dtype)  # 0 ... 0 1 ... 1 along dim
    onehot = reached.clone()
    classes = probs.shape[dim]
    onehot.narrow(dim, 1, classes - 1).sub_(reached.narrow(dim, 0, classes - 1))
    return onehot


def straight_through(onehot: th.Tensor, probs: th.Tensor) -> th.Tensor:
    """The value of ``onehot`` with the gradient of ``probs``."""
    return onehot + (probs - probs.detach())


def categorical_entropy(p: th.Tensor) -> th.Tensor:
    """Entropy in nats of S categoricals each: probabilities (..., K, S) -> (..., S)."""
    return -(p * p.log()).sum(-2)


def categorical_kl(p: th.Tensor, q: th.Tensor) -> th.Tensor:
    """KL(p || q) of S categoricals, summed: probabilities (..., K, S) -> (...)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


# -- actions -----------------------------------------------------------------------------------------------------------


class ActionDistribution(Protocol):
    """What an actor head returns. Actions are encoded: floats in [-1, 1], one-hot vectors, or zeros and ones."""

    def sample(self) -> th.Tensor:
        """A random action (..., A)."""

    def mode(self) -> th.Tensor:
        """The most likely action (..., A)."""

    def log_prob(self, action: th.Tensor) -> th.Tensor:
        """Log-density of the action (..., A) -> (...)."""

    def entropy(self) -> th.Tensor:
        """Entropy in nats -> (...)."""


class BoundedNormal:
    """Normal with mean tanh(m) and a standard deviation between 0.1 and 1; samples are not squashed.

    :param out: (..., 2 A) raw means and raw standard deviations.
    """

    min_std, max_std = 0.1, 1.0

    def __init__(self, out: th.Tensor) -> None:
        mean, self.raw_std = out.chunk(2, -1)
        self.mean = th.tanh(mean)
        self._std: th.Tensor | None = None

    @property
    def std(self) -> th.Tensor:
        """Computed on first use: deterministic actions never need it. (``functools.cached_property`` takes a lock
        before Python 3.12, which torch.compile cannot trace.)"""
        if self._std is None:
            self._std = (self.max_std - self.min_std) * th.sigmoid(self.raw_std + 2.0) + self.min_std
        return self._std

    def sample(self) -> th.Tensor:
        return self.mean + self.std * th.randn_like(self.mean)

    def mode(self) -> th.Tensor:
        return self.mean

    def log_prob(self, action: th.Tensor) -> th.Tensor:
        return (-0.5 * ((action - self.mean) / self.std) ** 2 - self.std.log() - LOG_SQRT_2PI).sum(-1)

    def entropy(self) -> th.Tensor:
        return (0.5 + LOG_SQRT_2PI + self.std.log()).sum(-1)


class OneHotCategoricals:
    """One or more categorical choices, each mixed with 1% uniform, encoded as concatenated one-hot vectors.

    :param out: (..., sum of classes) logits.
    :param classes: number of values of each choice.
    """

    def __init__(self, out: th.Tensor, classes: tuple[int, ...]) -> None:
        self.classes = classes
        self.probs = [unimix_probs(logits) for logits in out.split(list(classes), -1)]

    def sample(self) -> th.Tensor:
        return th.cat([sample_onehot(p) for p in self.probs], -1)

    def mode(self) -> th.Tensor:
        return th.cat([F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype) for p in self.probs], -1)

    def log_prob(self, action: th.Tensor) -> th.Tensor:
        chosen = zip(self.probs, action.split(list(self.classes), -1), strict=True)
        return sum(((p.log() * a).sum(-1) for p, a in chosen), start=th.zeros(()))

    def entropy(self) -> th.Tensor:
        return sum((-(p * p.log()).sum(-1) for p in self.probs), start=th.zeros(()))


class Bernoulli:
    """Independent yes-or-no choices, each mixed with 1% uniform, encoded as zeros and ones.

    :param out: (..., A) logits of a one.
    """

    def __init__(self, out: th.Tensor) -> None:
        self.prob = (1 - UNIMIX) * th.sigmoid(out) + UNIMIX / 2

    def sample(self) -> th.Tensor:
        return th.bernoulli(self.prob)

    def mode(self) -> th.Tensor:
        return (self.prob > 0.5).to(self.prob.dtype)

    def log_prob(self, action: th.Tensor) -> th.Tensor:
        return (action * self.prob.log() + (1 - action) * th.log1p(-self.prob)).sum(-1)

    def entropy(self) -> th.Tensor:
        p = self.prob
        return -(p * p.log() + (1 - p) * th.log1p(-p)).sum(-1)
