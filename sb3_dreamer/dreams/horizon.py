"""Prediction error by number of steps ahead: is a model good enough to learn in?"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from sb3_dreamer.dreams.open_loop import OpenLoop, Pair, numbers
from sb3_dreamer.types import Spec

STEPS = (1, 5, 15, 50)
STILL = 1e-3  # a smaller change, in standard deviations of the data, counts as none
REWARD = Spec("vector", ())
CHECKED = slice(1, None, 2)  # sequences that the band was not calibrated on
NORMAL = 1.2816  # standard deviations around the mean that hold BAND of a normal distribution
BAND = 0.8  # what the band claims to cover


@dataclass(frozen=True)
class HorizonError:
    """Root mean squared errors in standard deviations of the data; index k - 1 is k steps ahead, NaN without data.

    :param dream: (H,) of the mean over sampled dreams.
    :param persistence: (H,) of the forecast that nothing changes after the last observation of the context.
    :param mean: (H,) of the forecast that is always the mean of the data.
    :param coverage: (H,) share of the truth inside the :func:`calibrated_band`, which claims ``BAND``.
    :param overconfidence: actual error divided by the error that the spread of the dreams suggests; 1 is calibrated.
        Mean over dimensions.
    """

    dream: np.ndarray
    persistence: np.ndarray
    mean: np.ndarray
    coverage: np.ndarray
    overconfidence: float

    @property
    def steps(self) -> list[int]:
        """Those of ``STEPS`` that were dreamed."""
        return [k for k in STEPS if k <= len(self.dream)]

    def ratio(self, steps: int | None = None) -> float:
        """Mean error of the dream over the first ``steps``, or all, divided by that of persistence.

        NaN without data, and for quantities that do not change, such as the goal of an episode.
        """
        known = ~np.isnan(self.dream[:steps])
        reference = self.persistence[:steps][known].mean() if known.any() else 0.0
        return float(self.dream[:steps][known].mean() / reference) if reference > STILL else float("nan")


def horizon_errors(rollout: OpenLoop) -> dict[str, HorizonError]:
    """Observation key -> its errors; those of the reward under its :func:`reward_name`."""
    errors = {key: horizon_error(pair, rollout.specs[key], rollout) for key, pair in rollout.obs.items()}
    return {**errors, reward_name(rollout.obs): horizon_error(rollout.reward, REWARD, rollout)}


def reward_name(keys: Container[str]) -> str:
    """Name of the errors of the reward among those of observations with these keys."""
    return "reward of the task" if "reward" in keys else "reward"


def horizon_error(observed: Pair, spec: Spec, rollout: OpenLoop) -> HorizonError:
    """Errors of one quantity, step by step, since images are large.

    :param observed: the quantity.
    :param spec: its spec.
    :param rollout: has the context and the valid entries.
    """
    truth = numbers(observed.truth, spec)
    mean, scale = truth.mean((0, 1)), data_scale(truth, spec)
    last = truth[:, rollout.context - 1]

    def error(future: np.ndarray, expected: np.ndarray) -> float:
        return float(np.sqrt(np.square((future - expected) / scale).mean()))

    rows = np.full((rollout.horizon, 3), np.nan)
    for t, row in enumerate(rows, rollout.context):
        valid = rollout.valid[:, t]
        if valid.any():
            future, expected = truth[valid, t], numbers(observed.dream[:, valid, t], spec).mean(0)
            row[:] = error(future, expected), error(future, last[valid]), error(future, mean)
    dream, persistence, average = rows.T
    return HorizonError(dream, persistence, average, *coverage(observed, spec, rollout))


def coverage(observed: Pair, spec: Spec, rollout: OpenLoop) -> tuple[np.ndarray, float]:
    """Share of the truth inside the band by step (H,), and the overconfidence of the dreams; NaN for images."""
    share = np.full(rollout.horizon, np.nan)
    if spec.kind == "image":
        return share, float("nan")
    truth = numbers(observed.truth, spec)
    low, high, factor = calibrated_band(truth, numbers(observed.dream, spec), rollout)
    inside = ((low <= truth) & (truth <= high))[CHECKED]
    for k in range(rollout.horizon):
        valid = rollout.valid[CHECKED, rollout.context + k]
        if valid.any():
            share[k] = inside[valid, rollout.context + k].mean()
    return share, float(factor.mean())


def data_scale(truth: np.ndarray, spec: Spec) -> np.ndarray:
    """Standard deviation of each dimension over sequences and time, (X,); 1 where it never changes.

    An image has one for all its pixels: most of them hardly ever change.
    """
    std = np.where(truth.max((0, 1)) > truth.min((0, 1)), truth.std((0, 1), dtype=np.float64), 0.0)
    if spec.kind == "image":
        std = np.full_like(std, np.sqrt(np.square(std).mean()))
    return np.where(std > 1e-6, std, 1.0).astype(truth.dtype)


def calibrated_band(
    truth: np.ndarray, dream: np.ndarray, rollout: OpenLoop
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The band in which the truth should be with probability ``BAND``.

    Mean of the dreams, plus and minus their spread (including that of the decoder's errors in the context) times a
    factor for each dimension. World models are often overconfident, so the factor is chosen such that the band has the
    claimed coverage on every second sequence; the others are left to check it (split conformal prediction).

    :param truth: (B, T, X) numbers.
    :param dream: (M, B, T, X).
    :param rollout: has the context and the valid entries.
    :return: low (B, T, X), high (B, T, X), and the factor (X,) as a multiple of that of a normal distribution.
    """
    c, mean = rollout.context, dream.mean(0)
    seen = (truth - dream)[:, :, :c].std((0, 1, 2))
    spread = np.sqrt(dream.var(0) + np.square(seen)) + 1e-9
    surprise = (np.abs(truth - mean) / spread)[::2, c:][rollout.valid[::2, c:]]  # (entries, X)
    factor = np.quantile(surprise, BAND, axis=0) if len(surprise) else np.full(truth.shape[-1], NORMAL)
    return mean - factor * spread, mean + factor * spread, factor / NORMAL
