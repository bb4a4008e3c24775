"""From model features back to observations; what each kind of space needs is in the table of ``codes``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.layers import MLP, BlockLinear, Dense, Linear
from sb3_dreamer.types import Size, Spec
from sb3_dreamer.world_model.codes import CODES
from sb3_dreamer.world_model.encoders import IMAGE_MULTIPLIERS, ChannelNorm, SameConv, halved


class ImageDecoder(nn.Module):
    """Features (n, F) -> images in [0, 1], (n, C, H, W): a small map of channels, then upsample and convolve.

    The deterministic part of the features fills the map block by block, the stochastic part through two layers.
    """

    def __init__(self, spec: Spec, size: Size) -> None:
        super().__init__()
        self.image_shape, self.deter, self.blocks = spec.shape, size.deter, size.blocks
        channels = [size.depth * m for m in reversed(IMAGE_MULTIPLIERS)]
        self.map_shape = (channels[0], *(halved(n, len(IMAGE_MULTIPLIERS)) for n in spec.shape[1:]))
        cells = channels[0] * self.map_shape[1] * self.map_shape[2]
        self.from_deter = BlockLinear(size.deter, cells, size.blocks)
        self.from_stoch = nn.Sequential(Dense(size.stoch * size.classes, 2 * size.units), Linear(2 * size.units, cells))
        self.norm = ChannelNorm(channels[0])
        self.stages = nn.ModuleList(
            nn.Sequential(SameConv(c_in, c_out), ChannelNorm(c_out), nn.SiLU()) for c_in, c_out in pairwise(channels)
        )
        self.out = SameConv(channels[-1], spec.shape[0])

    def forward(self, features: th.Tensor) -> th.Tensor:
        deter, stoch = features.split([self.deter, features.shape[-1] - self.deter], -1)
        x = (self.from_deter(deter) + self.from_stoch(stoch)).reshape(-1, *self.map_shape)
        x = F.silu(self.norm(x.contiguous(memory_format=th.channels_last)))
        for left, stage in zip(reversed(range(len(IMAGE_MULTIPLIERS))), [*self.stages, self.out], strict=True):
            rows, columns = (halved(n, left) for n in self.image_shape[1:])
            x = stage(F.interpolate(x, scale_factor=2.0, mode="nearest")[..., :rows, :columns])
        return th.sigmoid(x)


class Decoder(nn.Module):
    """Model features to all keys of an observation; mirrors :class:`~sb3_dreamer.world_model.encoders.Encoder`."""

    def __init__(self, specs: Mapping[str, Spec], features: int, size: Size) -> None:
        super().__init__()
        self.specs = dict(specs)
        self.flat_widths = {k: s.width for k, s in specs.items() if CODES[s.kind].flatten}
        if self.flat_widths:
            self.mlp = MLP(features, size.units, layers=3)
            self.out = Linear(size.units, sum(self.flat_widths.values()))
        self.image_keys = [k for k in specs if k not in self.flat_widths]
        self.image = nn.ModuleList(ImageDecoder(specs[k], size) for k in self.image_keys)

    def forward(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """Features (..., F) to raw network outputs by key; images (..., C, H, W) in [0, 1]."""
        outputs: dict[str, th.Tensor] = {}
        if self.flat_widths:
            parts = self.out(self.mlp(features)).split(list(self.flat_widths.values()), -1)
            outputs.update(zip(self.flat_widths, parts, strict=True))
        for key, net in zip(self.image_keys, self.image, strict=True):
            outputs[key] = net(features.flatten(0, -2)).reshape(*features.shape[:-1], *self.specs[key].shape)
        return outputs

    def loss(self, features: th.Tensor, obs: Mapping[str, th.Tensor]) -> th.Tensor:
        """Reconstruction loss, summed over keys and dimensions: (..., F) -> (...)."""
        total = th.zeros((), device=features.device)
        for key, out in self(features).items():
            spec = self.specs[key]
            total = total + CODES[spec.kind].loss(out, obs[key], spec)
        return total

    def predict(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """Features (..., F) to observations by key, in the space's units; images uint8."""
        return {key: CODES[self.specs[key].kind].read(out, self.specs[key]) for key, out in self(features).items()}
