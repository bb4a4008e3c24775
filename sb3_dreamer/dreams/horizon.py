"""Prediction error by number of steps ahead: tells whether a model is good enough to learn in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sb3_dreamer.dreams.open_loop import OpenLoop, Pair, numbers
from sb3_dreamer.types import Spec

STEPS = (1, 5, 15, 50)
BAND = 0.8  # what the band over sampled dreams claims to cover


@dataclass(frozen=True)
class HorizonError:
    """Root mean squared errors in standard deviations of the data; index k - 1 is k steps ahead, NaN where no data is.

    :param dream: (H,) of the mean over sampled dreams.
    :param unchanged: (H,) of "nothing changes": the last observation of the context.
    :param mean: (H,) of "the mean of the data".
    :param coverage: (H,) share of the truth inside the band over sampled dreams, which claims ``BAND``.
    """

    dream: np.ndarray
    unchanged: np.ndarray
    mean: np.ndarray
    coverage: np.ndarray

    @property
    def steps(self) -> list[int]:
        """Those of ``STEPS`` that were dreamed."""
        return [k for k in STEPS if k <= len(self.dream)]

    @property
    def ratio(self) -> float:
        """Mean error of the dream over all steps, as a share of that of "nothing changes"."""
        return float(np.nanmean(self.dream) / max(np.nanmean(self.unchanged), 1e-12))


def horizon_errors(loop: OpenLoop) -> dict[str, HorizonError]:
    """Observation key -> its errors; those of the reward under "reward", unless an observation has that name."""
    errors = {"reward": horizon_error(loop.reward, Spec("vector", ()), loop)}
    return errors | {key: horizon_error(pair, loop.specs[key], loop) for key, pair in loop.obs.items()}


def horizon_error(observed: Pair, spec: Spec, loop: OpenLoop) -> HorizonError:
    """Errors of one quantity, step by step, since images are large.

    :param observed: the quantity.
    :param spec: its spec.
    :param loop: says what was seen and what can be compared.
    """
    truth = numbers(observed.truth, spec)
    mean, scale = truth.mean((0, 1)), data_scale(truth, spec)
    last = truth[:, loop.context - 1]

    def error(future: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(np.square((future - expected) / scale).mean()))

    rows = np.full((loop.horizon, 4), np.nan)
    for row, t in zip(rows, range(loop.context, loop.context + loop.horizon)):
        valid = loop.valid[:, t]
        if valid.any():
            future, dream = truth[valid, t], numbers(observed.dream[:, valid, t], spec)
            low, high = band(dream)
            inside = ((low <= future) & (future <= high)).mean()
            row[:] = error(future, dream.mean(0)), error(future, last[valid]), error(future, mean), inside
    return HorizonError(*rows.T)


def data_scale(truth: np.ndarray, spec: Spec) -> np.ndarray:
    """Standard deviation of each dimension over sequences and time, (X,); 1 where it never changes.

    An image has one for all its pixels: most of them hardly ever change.
    """
    std = truth.std((0, 1))
    if spec.kind == "image":
        std = np.full_like(std, np.sqrt(np.square(std).mean()))
    return np.where(std > 1e-6, std, 1.0)


def band(dream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles over dreams between which a new dream falls with probability ``BAND``: (M, ...) -> two of (...)."""
    tails = [(1 - BAND) / 2, (1 + BAND) / 2]
    low, high = np.quantile(dream, tails, axis=0, method="weibull")  # i-th of M lies at i / (M + 1)
    return low, high
