"""How each kind of observation becomes numbers and comes back. A new kind of space is one line in ``CODES``.

::

    raw observation --flatten--> floats for the MLP   ...   output of the decoder --read--> observation
                                                                      '------loss------ raw observation

Images have no ``flatten``: a convolutional net of their own reads them, and another one paints them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch as th
import torch.nn.functional as F

from sb3_dreamer.nets.distributions import symexp, symlog
from sb3_dreamer.types import Kind, Spec


class Code(NamedTuple):
    """What the encoder and the decoder do with one kind of space.

    :param flatten: raw (..., *shape) -> floats (..., width); None: not by the MLP.
    :param loss: decoder output, raw (..., *shape) -> reconstruction loss (...), summed over dimensions.
    :param read: decoder output -> observations (..., *shape) in the units of the space.
    """

    flatten: Callable[[th.Tensor, Spec], th.Tensor] | None
    loss: Callable[[th.Tensor, th.Tensor, Spec], th.Tensor]
    read: Callable[[th.Tensor, Spec], th.Tensor]


def flat(x: th.Tensor, spec: Spec) -> th.Tensor:
    """(..., *shape) -> (..., width) floats."""
    return x.reshape(*x.shape[: x.ndim - len(spec.shape)], spec.width).float()


def symlog_flat(x: th.Tensor, spec: Spec) -> th.Tensor:
    """(..., *shape) -> (..., width) under symlog."""
    return symlog(flat(x, spec))


def one_hot(x: th.Tensor, spec: Spec) -> th.Tensor:
    """Concatenated one-hot vectors of integers: (..., *shape) -> (..., sum of classes)."""
    columns = x.long().reshape(*x.shape[: x.ndim - len(spec.shape)], len(spec.classes)).unbind(-1)
    numbers = zip(columns, spec.start, spec.classes, strict=True)
    return th.cat([c[..., None] - start == th.arange(k, device=x.device) for c, start, k in numbers], -1).float()


def are_choices(x: th.Tensor, spec: Spec) -> bool:
    """Whether all integers (..., *shape) are among those that have a code."""
    start, classes = (th.tensor(numbers, device=x.device) for numbers in (spec.start, spec.classes))
    chosen = x.reshape(-1, len(spec.classes)) - start
    return bool(((chosen >= 0) & (chosen < classes)).all())


def symlog_mse(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Squared error in symlog space: (..., width), (..., *shape) -> (...)."""
    return (out - symlog_flat(raw, spec)).square().sum(-1)


def cross_entropy(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Negative log-likelihood of the integers: (..., sum of classes), (..., *shape) -> (...)."""
    target = one_hot(raw, spec).split(list(spec.classes), -1)
    logits = out.split(list(spec.classes), -1)
    return th.stack([-(F.log_softmax(x, -1) * y).sum(-1) for x, y in zip(logits, target, strict=True)]).sum(0)


def binary_cross_entropy(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Negative log-likelihood of zeros and ones: (..., width), (..., *shape) -> (...)."""
    return F.binary_cross_entropy_with_logits(out, flat(raw, spec), reduction="none").sum(-1)


def pixel_mse(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Squared error of images in [0, 1]: (..., C, H, W) floats, (..., C, H, W) uint8 -> (...)."""
    return (out - raw.float() / 255).square().sum((-3, -2, -1))


def vector(out: th.Tensor, spec: Spec) -> th.Tensor:
    """Out of symlog: (..., width) -> (..., *shape)."""
    return symexp(out).reshape(*out.shape[:-1], *spec.shape)


def integers(out: th.Tensor, spec: Spec) -> th.Tensor:
    """The most likely integers: (..., sum of classes) -> (..., *shape)."""
    logits = out.split(list(spec.classes), -1)
    best = th.stack([x.argmax(-1) + start for x, start in zip(logits, spec.start, strict=True)], -1)
    return best.reshape(*out.shape[:-1], *spec.shape)


def bits(out: th.Tensor, spec: Spec) -> th.Tensor:
    """The more likely of zero and one: (..., width) -> (..., *shape)."""
    return (out > 0).to(th.int8).reshape(*out.shape[:-1], *spec.shape)


def pixels(out: th.Tensor, spec: Spec) -> th.Tensor:
    """[0, 1] -> uint8, (..., C, H, W)."""
    return (out * 255).round().to(th.uint8)


CODES: dict[Kind, Code] = {
    "vector": Code(symlog_flat, symlog_mse, vector),
    "discrete": Code(one_hot, cross_entropy, integers),
    "binary": Code(flat, binary_cross_entropy, bits),
    "image": Code(None, pixel_mse, pixels),
}
