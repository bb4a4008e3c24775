"""From raw observations to one embedding; what each kind of space needs is in the table of ``codes``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch as th
from torch import nn

from sb3_dreamer.nets.layers import MLP, RMSNorm, trunc_normal_
from sb3_dreamer.types import Size, Spec
from sb3_dreamer.world_model.codes import CODES

IMAGE_MULTIPLIERS = (2, 3, 4, 4)


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
        for c_in, c_out in pairwise(channels):
            pool = nn.MaxPool2d(2, ceil_mode=True)
            self.stages.append(nn.Sequential(SameConv(c_in, c_out), pool, ChannelNorm(c_out), nn.SiLU()))
        height, width = (halved(n, len(IMAGE_MULTIPLIERS)) for n in spec.shape[1:])
        self.width = channels[-1] * height * width

    def forward(self, image: th.Tensor) -> th.Tensor:
        x = (image.float() / 255 - 0.5).contiguous(memory_format=th.channels_last)  # what norms and pools are fast on
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
        self.flatten = {k: (CODES[s.kind].flatten, s) for k, s in specs.items() if CODES[s.kind].flatten}
        self.width = 0
        if self.flatten:
            self.mlp = MLP(sum(s.width for _, s in self.flatten.values()), size.units, layers=3)
            self.width += size.units
        self.image_keys = [k for k in specs if k not in self.flatten]
        self.image = nn.ModuleList(ImageEncoder(specs[k], size.depth) for k in self.image_keys)
        self.width += sum(net.width for net in self.image)  # type: ignore[misc]

    def forward(self, obs: Mapping[str, th.Tensor]) -> th.Tensor:
        """Raw observations, key -> (..., *shape), to embeddings (..., width)."""
        parts = []
        if self.flatten:
            columns = [flatten(obs[key], spec) for key, (flatten, spec) in self.flatten.items() if flatten]
            parts.append(self.mlp(columns[0] if len(columns) == 1 else th.cat(columns, -1)))
        for key, net in zip(self.image_keys, self.image, strict=True):
            lead = obs[key].shape[:-3]
            parts.append(net(obs[key].flatten(0, -4)).reshape(*lead, -1))
        return parts[0] if len(parts) == 1 else th.cat(parts, -1)
