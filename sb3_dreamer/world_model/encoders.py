"""From raw observations to one embedding. A new kind of flat space is one line in ``FLATTEN``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import symlog
from sb3_dreamer.nets.layers import MLP, RMSNorm, trunc_normal_
from sb3_dreamer.types import Kind, Size, Spec

IMAGE_MULTIPLIERS = (2, 3, 4, 4)


def one_hot(x: th.Tensor, spec: Spec) -> th.Tensor:
    """Concatenated one-hot vectors of integers: (..., *shape) -> (..., sum of classes)."""
    columns = x.long().reshape(*x.shape[: x.ndim - len(spec.shape)], len(spec.classes)).unbind(-1)
    return th.cat([F.one_hot(c, k) for c, k in zip(columns, spec.classes, strict=True)], -1).float()


def flat(x: th.Tensor, spec: Spec) -> th.Tensor:
    """(..., *shape) -> (..., width) floats."""
    return x.reshape(*x.shape[: x.ndim - len(spec.shape)], spec.width).float()


FLATTEN: dict[Kind, Callable[[th.Tensor, Spec], th.Tensor]] = {
    "vector": lambda x, spec: symlog(flat(x, spec)),
    "discrete": one_hot,
    "binary": flat,
}


class ChannelNorm(RMSNorm):
    """RMSNorm over the channels of (n, C, H, W)."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SameConv(nn.Conv2d):
    """5 x 5 convolution that keeps the size of the image."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=5, padding=2)

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, self.in_channels * 25)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class ImageEncoder(nn.Module):
    """uint8 images of any size, channels first: (n, C, H, W) -> (n, width). Each stage halves the size, rounding up."""

    def __init__(self, spec: Spec, depth: int) -> None:
        super().__init__()
        channels = [spec.shape[0], *(depth * m for m in IMAGE_MULTIPLIERS)]
        self.stages = nn.ModuleList()
        for c_in, c_out in zip(channels, channels[1:], strict=False):
            pool = nn.MaxPool2d(2, ceil_mode=True)
            self.stages.append(nn.Sequential(SameConv(c_in, c_out), pool, ChannelNorm(c_out), nn.SiLU()))
        height, width = (halved(n, len(IMAGE_MULTIPLIERS)) for n in spec.shape[1:])
        self.width = channels[-1] * height * width

    def forward(self, image: th.Tensor) -> th.Tensor:
        x = image.float() / 255 - 0.5
        for stage in self.stages:
            x = stage(x)
        return x.flatten(1)


def halved(size: int, times: int) -> int:
    """``size`` halved ``times`` times, rounding up each time."""
    return -(-size // 2**times)


class Encoder(nn.Module):
    """All keys of an observation into one embedding: one MLP for the flat ones, one convolutional net per image.

    :param specs: key -> spec.
    :param size: widths.
    """

    def __init__(self, specs: Mapping[str, Spec], size: Size) -> None:
        super().__init__()
        self.flat_specs = {k: s for k, s in specs.items() if s.kind != "image"}
        self.width = 0
        if self.flat_specs:
            self.mlp = MLP(sum(s.width for s in self.flat_specs.values()), size.units, layers=3)
            self.width += size.units
        self.image = nn.ModuleDict({k: ImageEncoder(s, size.depth) for k, s in specs.items() if s.kind == "image"})
        self.width += sum(net.width for net in self.image.values())  # type: ignore[misc]

    def forward(self, obs: Mapping[str, th.Tensor]) -> th.Tensor:
        """Raw observations, key -> (..., *shape), to embeddings (..., width)."""
        parts = []
        if self.flat_specs:
            columns = [FLATTEN[spec.kind](obs[key], spec) for key, spec in self.flat_specs.items()]
            parts.append(self.mlp(columns[0] if len(columns) == 1 else th.cat(columns, -1)))
        for key, net in self.image.items():
            lead = obs[key].shape[:-3]
            parts.append(net(obs[key].flatten(0, -4)).reshape(*lead, -1))
        return parts[0] if len(parts) == 1 else th.cat(parts, -1)
