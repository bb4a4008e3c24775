"""From model features back to observations. A new kind of flat space is one line in ``LOSS`` and one in ``READ``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import symexp, symlog
from sb3_dreamer.nets.layers import MLP, BlockLinear, Dense, Linear
from sb3_dreamer.types import Kind, Size, Spec
from sb3_dreamer.world_model.encoders import IMAGE_MULTIPLIERS, ChannelNorm, SameConv, flat, halved, one_hot


def symlog_mse(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Squared error in symlog space, summed over dimensions: (..., width), (..., *shape) -> (...)."""
    return (out - symlog(flat(raw, spec))).square().sum(-1)


def cross_entropy(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Negative log-likelihood of the integers, summed: (..., sum of classes), (..., *shape) -> (...)."""
    target = one_hot(raw, spec).split(list(spec.classes), -1)
    logits = out.split(list(spec.classes), -1)
    return th.stack([-(F.log_softmax(x, -1) * y).sum(-1) for x, y in zip(logits, target, strict=True)]).sum(0)


def binary_cross_entropy(out: th.Tensor, raw: th.Tensor, spec: Spec) -> th.Tensor:
    """Negative log-likelihood of zeros and ones, summed: (..., width), (..., *shape) -> (...)."""
    return F.binary_cross_entropy_with_logits(out, flat(raw, spec), reduction="none").sum(-1)


def most_likely(out: th.Tensor, spec: Spec) -> th.Tensor:
    """The most likely integers: (..., sum of classes) -> (..., *shape)."""
    best = th.stack([x.argmax(-1) for x in out.split(list(spec.classes), -1)], -1)
    return best.reshape(*out.shape[:-1], *spec.shape)


LOSS: dict[Kind, Callable[[th.Tensor, th.Tensor, Spec], th.Tensor]] = {
    "vector": symlog_mse,
    "discrete": cross_entropy,
    "binary": binary_cross_entropy,
}
READ: dict[Kind, Callable[[th.Tensor, Spec], th.Tensor]] = {
    "vector": lambda out, spec: symexp(out).reshape(*out.shape[:-1], *spec.shape),
    "discrete": most_likely,
    "binary": lambda out, spec: (out > 0).to(th.int8).reshape(*out.shape[:-1], *spec.shape),
}


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
        self.from_stoch = nn.Sequential(
            Dense(size.stoch * size.classes, 2 * size.units), Linear(2 * size.units, cells)
        )
        self.norm = ChannelNorm(channels[0])
        self.stages = nn.ModuleList(
            nn.Sequential(SameConv(c_in, c_out), ChannelNorm(c_out), nn.SiLU())
            for c_in, c_out in zip(channels, channels[1:], strict=False)
        )
        self.out = SameConv(channels[-1], spec.shape[0])

    def forward(self, features: th.Tensor) -> th.Tensor:
        deter, stoch = features.split([self.deter, features.shape[-1] - self.deter], -1)
        x = (self.from_deter(deter) + self.from_stoch(stoch)).reshape(-1, *self.map_shape)
        x = F.silu(self.norm(x))
        for stage in [*self.stages, self.out]:
            x = stage(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return th.sigmoid(x[..., : self.image_shape[1], : self.image_shape[2]])


class Decoder(nn.Module):
    """Model features to all keys of an observation; mirrors :class:`~sb3_dreamer.world_model.encoders.Encoder`."""

    def __init__(self, specs: Mapping[str, Spec], features: int, size: Size) -> None:
        super().__init__()
        self.specs = dict(specs)
        self.flat_specs = {k: s for k, s in specs.items() if s.kind != "image"}
        if self.flat_specs:
            self.mlp = MLP(features, size.units, layers=3)
            self.out = Linear(size.units, sum(s.width for s in self.flat_specs.values()))
        self.image = nn.ModuleDict({k: ImageDecoder(s, size) for k, s in specs.items() if s.kind == "image"})

    def forward(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """Features (..., F) to raw network outputs by key; images (..., C, H, W) in [0, 1]."""
        outputs = {}
        if self.flat_specs:
            widths = [s.width for s in self.flat_specs.values()]
            outputs.update(zip(self.flat_specs, self.out(self.mlp(features)).split(widths, -1), strict=True))
        for key, net in self.image.items():
            outputs[key] = net(features.flatten(0, -2)).reshape(*features.shape[:-1], *self.specs[key].shape)
        return outputs

    def loss(self, features: th.Tensor, obs: Mapping[str, th.Tensor]) -> th.Tensor:
        """Reconstruction loss, summed over keys and dimensions: (..., F) -> (...)."""
        total = th.zeros((), device=features.device)
        for key, out in self(features).items():
            spec = self.specs[key]
            if spec.kind == "image":
                total = total + (out - obs[key].float() / 255).square().sum((-3, -2, -1))
            else:
                total = total + LOSS[spec.kind](out, obs[key], spec)
        return total

    def predict(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """Features (..., F) to observations by key, in the space's units; images uint8."""
        outputs = self(features)
        for key, out in outputs.items():
            spec = self.specs[key]
            outputs[key] = (out * 255).round().to(th.uint8) if spec.kind == "image" else READ[spec.kind](out, spec)
        return outputs
