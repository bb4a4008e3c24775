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
MOST_DIMS = 6  # plotted if none are named


class Panel(NamedTuple):
    """One dimension of one sequence, (T,) each.

    :param truth: the real values.
    :param dream: mean of the dreams.
    :param low: lower end of the band.
    :param high: upper end.
    """

    truth: np.ndarray
    dream: np.ndarray
    low: np.ndarray
    high: np.ndarray


def open_loop_figure(rollout: OpenLoop, sequence: int, dims: Sequence[str] | None = None) -> Any:
    """Truth against dream of one sequence: some dimensions, then reward, continue probability and value.

    :param rollout: dreams.
    :param sequence: which of the B sequences.
    :param dims: names such as ``obs[3]``; None: those with the largest error.
    :return: a matplotlib figure.
    :raises MissingExtra: without matplotlib.
    :raises ValueError: for unknown dimensions.
    """
    check_dims(rollout.specs, dims)
    panels, until = vector_panels(rollout, sequence), int(rollout.valid[sequence].sum())
    names = worst(panels, rollout, until) if dims is None else list(dims)
    shown = {name: panels[name] for name in names}
    for name, pair in {"reward": rollout.reward, "continue": rollout.cont, "value": rollout.value}.items():
        shown |= panels_of(rollout, sequence, pair, REWARD, [name])

    rows = -(-len(shown) // 3)
    figure = need("matplotlib.figure", "dreams").Figure(figsize=(12, 2.1 * rows), layout="constrained")
    for i, (name, panel) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, 3, i + 1)
        draw_panel(axes, Panel(*(line[:until] for line in panel)), rollout.context)
        axes.set_title(name, fontsize=10)
        if name == "continue":
            axes.set_ylim(-0.05, 1.05)
    figure.axes[0].legend(fontsize=8, loc="best")
    for axes in figure.axes[-3:]:
        axes.set_xlabel("step", fontsize=9)
    return figure


def check_dims(specs: Mapping[str, Spec], dims: Sequence[str] | None) -> None:
    """Refuse unknown dimensions.

    :raises ValueError: naming the available ones.
    """
    known = [name for names in dimension_names(specs).values() for name in names]
    if unknown := set(dims or ()) - set(known):
        raise ValueError(f"unknown dims {sorted(unknown)}; available: {', '.join(known) or 'none, only images'}")


def draw_panel(axes: Any, panel: Panel, context: int) -> None:
    """One dimension over time; the context is shaded."""
    steps, dreamed = np.arange(len(panel.truth)), slice(context - 1, None)
    spread = steps[dreamed], panel.low[dreamed], panel.high[dreamed]
    axes.axvspan(0, context - 1, color=SEEN, zorder=0)
    axes.fill_between(*spread, color=DREAM, alpha=0.25, lw=0, label=f"{BAND:.0%} band")
    axes.plot(steps, panel.truth, color=TRUTH, lw=1.3, label="truth")
    axes.plot(steps, panel.dream, color=DREAM, lw=1.3, label="dream")
    axes.tick_params(labelsize=8)
    axes.margins(x=0)
    axes.spines[["top", "right"]].set_visible(False)


def vector_panels(rollout: OpenLoop, sequence: int) -> dict[str, Panel]:
    """Name of a dimension -> its panel, for all keys except images."""
    panels: dict[str, Panel] = {}
    for key, names in dimension_names(rollout.specs).items():
        panels |= panels_of(rollout, sequence, rollout.obs[key], rollout.specs[key], names)
    return panels


def panels_of(rollout: OpenLoop, sequence: int, pair: Pair, spec: Spec, names: Sequence[str]) -> dict[str, Panel]:
    """The panels of one quantity."""
    truth, dream = numbers(pair.truth, spec), numbers(pair.dream, spec)
    low, high, _ = calibrated_band(truth, dream, rollout)
    lines = [x.T for x in (truth[sequence], dream[:, sequence].mean(0), low[sequence], high[sequence])]
    return {name: Panel(*(line[i] for line in lines)) for i, name in enumerate(names)}


def worst(panels: Mapping[str, Panel], rollout: OpenLoop, until: int) -> list[str]:
    """The dimensions with the largest errors in standard deviations of the data, in the order of the observation."""
    scale: dict[str, float] = {}
    for key, names in dimension_names(rollout.specs).items():
        spec = rollout.specs[key]
        scale.update(zip(names, data_scale(numbers(rollout.obs[key].truth, spec), spec), strict=True))

    def error(name: str) -> float:
        difference = (panels[name].truth - panels[name].dream)[rollout.context : until]
        return float(np.square(difference / scale[name]).mean())

    chosen = sorted(panels, key=error, reverse=True)[:MOST_DIMS]
    return [name for name in panels if name in chosen]


def horizon_figure(errors: Mapping[str, HorizonError]) -> Any:
    """Error by steps ahead with the two references; one panel for each quantity.

    :raises MissingExtra: without matplotlib.
    """
    figure = need("matplotlib.figure", "dreams").Figure(figsize=(5 * len(errors), 3.4), layout="constrained")
    for i, (name, error) in enumerate(errors.items()):
        axes = figure.add_subplot(1, len(errors), i + 1)
        steps = np.arange(1, len(error.dream) + 1)
        axes.plot(steps, error.dream, color=DREAM, lw=2, label="dream")
        axes.plot(steps, error.persistence, color="#c4661f", lw=1.3, ls="--", label="persistence")
        axes.plot(steps, error.mean, color="#777777", lw=1.3, ls=":", label="mean of the data")
        axes.set(xlabel="steps ahead", title=name, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("error in standard deviations")
    figure.axes[0].legend(fontsize=8)
    return figure
