"""Plots of truth against dream, drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sb3_dreamer.dreams.extras import need
from sb3_dreamer.dreams.horizon import BAND, REWARD, HorizonError, calibrated_band, data_scale
from sb3_dreamer.dreams.open_loop import OpenLoop, Pair, dimension_names, numbers
from sb3_dreamer.types import Spec

TRUTH, DREAM, SEEN = "#222222", "#1f6fb4", "#f0efe8"


class Panel(NamedTuple):
    """One dimension of one sequence, (T,) each.

    :param truth: as it was.
    :param dream: mean of the dreams.
    :param low: lower end of the band.
    :param high: upper end.
    """

    truth: np.ndarray
    dream: np.ndarray
    low: np.ndarray
    high: np.ndarray


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
    check_dims(loop.specs, dims)
    panels, until = vector_panels(loop, sequence), int(loop.valid[sequence].sum())
    names = worst(panels, loop, until, at_most) if dims is None else list(dims)
    shown = {name: panels[name] for name in names}
    for name, pair in {"reward": loop.reward, "continue": loop.goes_on, "value": loop.value}.items():
        shown |= panels_of(loop, sequence, pair, REWARD, [name])

    rows = -(-len(shown) // 3)
    figure = need("matplotlib.figure", "dreams").Figure(figsize=(12, 2.1 * rows), layout="constrained")
    for i, (name, panel) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, 3, i + 1)
        draw_panel(axes, Panel(*(line[:until] for line in panel)), loop.context)
        axes.set_title(name, fontsize=10)
        if name == "continue":
            axes.set_ylim(-0.05, 1.05)
    figure.axes[0].legend(fontsize=8, loc="best")
    for axes in figure.axes[-3:]:
        axes.set_xlabel("step", fontsize=9)
    return figure


def check_dims(specs: Mapping[str, Spec], dims: Sequence[str] | None) -> None:
    """Refuse dimensions that there are not.

    :raises ValueError: naming those that there are.
    """
    known = [name for names in dimension_names(specs).values() for name in names]
    if unknown := set(dims or ()) - set(known):
        raise ValueError(f"dims {sorted(unknown)} are unknown; there are {', '.join(known) or 'only images'}")


def draw_panel(axes: Any, panel: Panel, context: int) -> None:
    """One dimension in time; the context is shaded."""
    steps, dreamed = np.arange(len(panel.truth)), slice(context - 1, None)
    spread = steps[dreamed], panel.low[dreamed], panel.high[dreamed]
    axes.axvspan(0, context - 1, color=SEEN, zorder=0)
    axes.fill_between(*spread, color=DREAM, alpha=0.25, lw=0, label=f"{BAND:.0%} band")
    axes.plot(steps, panel.truth, color=TRUTH, lw=1.3, label="truth")
    axes.plot(steps, panel.dream, color=DREAM, lw=1.3, label="dream")
    axes.tick_params(labelsize=8)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def vector_panels(loop: OpenLoop, sequence: int) -> dict[str, Panel]:
    """Name of a dimension -> its panel, for all keys that are no images."""
    panels: dict[str, Panel] = {}
    for key, names in dimension_names(loop.specs).items():
        panels |= panels_of(loop, sequence, loop.obs[key], loop.specs[key], names)
    return panels


def panels_of(loop: OpenLoop, sequence: int, pair: Pair, spec: Spec, names: Sequence[str]) -> dict[str, Panel]:
    """The panels of one quantity."""
    truth, dream = numbers(pair.truth, spec), numbers(pair.dream, spec)
    low, high, _ = calibrated_band(truth, dream, loop)
    lines = [x.T for x in (truth[sequence], dream[:, sequence].mean(0), low[sequence], high[sequence])]
    return {name: Panel(*(line[i] for line in lines)) for i, name in enumerate(names)}


def worst(panels: Mapping[str, Panel], loop: OpenLoop, until: int, at_most: int) -> list[str]:
    """The dimensions with the largest error in standard deviations of the data, in the order of the observation."""
    scale: dict[str, float] = {}
    for key, names in dimension_names(loop.specs).items():
        spec = loop.specs[key]
        scale.update(zip(names, data_scale(numbers(loop.obs[key].truth, spec), spec)))

    def error(name: str) -> float:
        difference = (panels[name].truth - panels[name].dream)[loop.context : until]
        return float(np.square(difference / scale[name]).mean())

    chosen = sorted(panels, key=error, reverse=True)[:at_most]
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
