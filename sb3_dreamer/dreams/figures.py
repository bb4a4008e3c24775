"""Plots of truth against dream, drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sb3_dreamer.dreams.extras import need
from sb3_dreamer.dreams.horizon import BAND, HorizonError, band, data_scale
from sb3_dreamer.dreams.open_loop import OpenLoop, Pair, dimension_names, numbers

TRUTH, DREAM, SEEN = "#222222", "#1f6fb4", "#f0efe8"


def open_loop_figure(loop: OpenLoop, sequence: int, dims: Sequence[str] | None = None, at_most: int = 6) -> Any:
    """Truth against dream of one sequence: some dimensions, then reward, continue probability and value.

    :param loop: dreams.
    :param sequence: which of the B sequences.
    :param dims: names such as ``obs[3]``; None: those with the largest error.
    :param at_most: how many dimensions if none are named.
    :return: a matplotlib figure.
    :raises MissingExtra: without matplotlib.
    :raises ValueError: for dimensions that there are not.
    """
    panels = vector_panels(loop, sequence)
    names = worst(loop, panels, at_most) if dims is None else list(dims)
    if unknown := set(names) - set(panels):
        raise ValueError(f"dims {sorted(unknown)} are unknown; there are {', '.join(panels) or 'only images'}")
    shown = {name: panels[name] for name in names}
    heads = {"reward": loop.reward, "continue": loop.goes_on, "value": loop.value}
    shown |= {name: Pair(pair.truth[sequence], pair.dream[:, sequence]) for name, pair in heads.items()}

    rows = -(-len(shown) // 3)
    figure = need("matplotlib.figure", "dreams").Figure(figsize=(12, 2.1 * rows), layout="constrained")
    until = int(loop.valid[sequence].sum())
    for i, (name, pair) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, 3, i + 1)
        draw_pair(axes, Pair(pair.truth[:until], pair.dream[:, :until]), loop.context)
        axes.set_title(name, fontsize=10)
    figure.axes[0].legend(fontsize=8, loc="best")
    for axes in figure.axes[-3:]:
        axes.set_xlabel("step", fontsize=9)
    return figure


def draw_pair(axes: Any, pair: Pair, context: int) -> None:
    """Truth (T,), mean and band of the dreams (M, T); the context is shaded."""
    steps, dreamed = np.arange(len(pair.truth)), slice(context - 1, None)
    low, high = band(pair.dream)
    axes.axvspan(0, context - 1, color=SEEN, zorder=0)
    spread = steps[dreamed], low[dreamed], high[dreamed]
    axes.fill_between(*spread, color=DREAM, alpha=0.25, lw=0, label=f"{BAND:.0%} of dreams")
    axes.plot(steps, pair.truth, color=TRUTH, lw=1.3, label="truth")
    axes.plot(steps, pair.dream.mean(0), color=DREAM, lw=1.3, label="dream")
    axes.tick_params(labelsize=8)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def vector_panels(loop: OpenLoop, sequence: int) -> dict[str, Pair]:
    """Name of a dimension -> its truth (T,) and dreams (M, T)."""
    panels: dict[str, Pair] = {}
    for key, names in dimension_names(loop.specs).items():
        truth = numbers(loop.obs[key].truth[sequence], loop.specs[key])
        dream = numbers(loop.obs[key].dream[:, sequence], loop.specs[key])
        panels.update({name: Pair(truth[:, i], dream[..., i]) for i, name in enumerate(names)})
    return panels


def worst(loop: OpenLoop, panels: Mapping[str, Pair], at_most: int) -> list[str]:
    """The dimensions with the largest error in standard deviations of the data, in the order of the observation."""
    scale: dict[str, float] = {}
    for key, names in dimension_names(loop.specs).items():
        scale.update(zip(names, data_scale(numbers(loop.obs[key].truth, loop.specs[key]), loop.specs[key])))
    c = loop.context
    errors = {n: np.square((p.truth - p.dream.mean(0))[c:] / scale[n]).mean() for n, p in panels.items()}
    chosen = sorted(errors, key=lambda name: -errors[name])[:at_most]
    return [name for name in panels if name in chosen]


def horizon_figure(errors: Mapping[str, HorizonError]) -> Any:
    """Error by steps ahead, beside the two references; one panel for each quantity.

    :raises MissingExtra: without matplotlib.
    """
    figure = need("matplotlib.figure", "dreams").Figure(figsize=(5 * len(errors), 3.4), layout="constrained")
    for i, (name, error) in enumerate(errors.items()):
        axes = figure.add_subplot(1, len(errors), i + 1)
        steps = np.arange(1, len(error.dream) + 1)
        axes.plot(steps, error.dream, color=DREAM, lw=2, label="dream")
        axes.plot(steps, error.unchanged, color="#c4661f", lw=1.3, ls="--", label="nothing changes")
        axes.plot(steps, error.mean, color="#777777", lw=1.3, ls=":", label="mean of the data")
        axes.set(xlabel="steps ahead", title=name, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("error in standard deviations")
    figure.axes[0].legend(fontsize=8)
    return figure
