"""Vectors to zero mean and unit variance, before symlog."""

from __future__ import annotations

from collections.abc import Mapping

import torch as th

from sb3_dreamer.nets.running import RunningStatistics
from sb3_dreamer.types import Spec
from sb3_dreamer.world_model.codes import flat

FLOOR = 1e-6  # of the variance, so that constant dimensions are not amplified
LIMIT = 1e15  # clip before squaring: larger observations would overflow the variance


class ObsNormalizer(RunningStatistics):
    """Shifts and scales each dimension of the "vector" observations by running moments; other kinds pass untouched.

    Not in the paper. symlog alone leaves joint velocities four times as wide as angles and heights, and a small world
    model then spends itself on them. Until the first :meth:`update` nothing is changed.

    :param specs: key -> spec of the observations.
    :param rate: smallest weight of a new batch; before update 1 / rate the moments are plain averages.
    """

    mean: th.Tensor
    std: th.Tensor
    updates: th.Tensor

    def __init__(self, specs: Mapping[str, Spec], rate: float = 1e-3) -> None:
        super().__init__()
        self.rate = rate
        self.specs = {key: spec for key, spec in specs.items() if spec.kind == "vector"}
        self.widths = [spec.width for spec in self.specs.values()]
        self.register_buffer("mean", th.zeros(sum(self.widths)))
        self.register_buffer("std", th.ones(sum(self.widths)))
        self.register_buffer("updates", th.zeros(()))

    @th.no_grad()
    def update(self, obs: Mapping[str, th.Tensor]) -> None:
        """Update the moments with raw observations, key -> (..., *shape)."""
        if not self.specs:
            return
        x = th.cat([flat(obs[key], spec).flatten(0, -2) for key, spec in self.specs.items()], -1)
        x = x.clamp(-LIMIT, LIMIT)
        self.snapshot()
        var, mean = th.var_mean(x, 0, correction=0)
        share = (1 / self.updates.add_(1)).clamp(min=self.rate)
        shift = mean - self.mean
        mixed = self.std.square().lerp(var + FLOOR, share) + share * (1 - share) * shift.square()
        self.std.copy_(mixed.sqrt())
        self.mean.add_(share * shift)

    def forward(self, obs: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Raw observations, key -> (..., *shape), normalized."""
        return dict(obs) | {
            key: ((flat(obs[key], self.specs[key]) - mean) / std).reshape(obs[key].shape)
            for key, mean, std in self._moments()
        }

    def undo(self, obs: Mapping[str, th.Tensor]) -> dict[str, th.Tensor]:
        """Normalized observations, key -> (..., *shape), in the units of the space."""
        return dict(obs) | {
            key: (flat(obs[key], self.specs[key]) * std + mean).reshape(obs[key].shape)
            for key, mean, std in self._moments()
        }

    def _moments(self) -> zip[tuple[str, th.Tensor, th.Tensor]]:
        return zip(self.specs, *(x.split_with_sizes(self.widths) for x in (self.mean, self.std)), strict=True)
