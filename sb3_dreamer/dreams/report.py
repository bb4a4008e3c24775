"""One self-contained HTML page with pictures, numbers and settings; browsers open it without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.collect import original_units
from sb3_dreamer.dreams.extras import MissingExtra, need
from sb3_dreamer.dreams.figures import horizon_figure, open_loop_figure
from sb3_dreamer.dreams.horizon import BAND, STILL, HorizonError, horizon_errors
from sb3_dreamer.dreams.open_loop import OpenLoop, open_loop
from sb3_dreamer.dreams.trouble import find_trouble, signs_of
from sb3_dreamer.dreams.videos import Body, body_video, encode, image_video
from sb3_dreamer.types import Batch

TEMPLATE = Path(__file__).with_name("page.html")
SETTINGS = (
    "num_timesteps", "_n_updates", "model_size", "rssm_type", "batch_size", "batch_length", "train_ratio", "seed",
    "imagination_starts", "imagination_horizon", "learning_rate", "gamma", "gae_lambda", "ent_coef", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A figure or a video, or the reason why it is missing.

    :param caption: what it shows.
    :param kind: "figure", "video" or "missing".
    :param content: data URL; the reason for "missing".
    """

    caption: str
    kind: str
    content: str


def write_report(
    model: Dreamer,
    batch: Batch,
    path: str | Path,
    title: str,
    real_return: float = float("nan"),
    context: int = 10,
    samples: int = 16,
    dims: Sequence[str] | None = None,
    body: Body | None = None,
    body_missing: str | None = None,
) -> Path:
    """Evaluate the dreams of a model and write the page.

    :param model: the model.
    :param batch: sequences to dream on from.
    :param path: the HTML file; its folder is created.
    :param title: of the page.
    :param real_return: see :func:`~sb3_dreamer.dreams.trouble.signs_of`.
    :param context: entries that the model sees of each sequence.
    :param samples: dreams of each sequence.
    :param dims: names of the dimensions to plot, such as ``obs[3]``; None: those with the largest error.
    :param body: shows the dreamed bodies of a MuJoCo task.
    :param body_missing: the reason why there is no body, shown on the page.
    :return: the path.
    """
    rollout = open_loop(model.policy, batch, context, samples)
    errors = horizon_errors(rollout)
    signs = signs_of(model, batch, errors, real_return)
    missing = [] if body_missing is None else [Picture("Body", "missing", body_missing)]
    template = need("jinja2", "dreams").Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True)
    page = template.render(
        title=title,
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
        rollout=rollout,
        band=f"{BAND:.0%}",
        errors=error_rows(errors),
        verdicts=[verdict(name, error, model.imagination_horizon) for name, error in errors.items()],
        troubles=find_trouble(signs),
        signs={name: f"{value:.3g}" for name, value in signs.items()},
        settings={name.lstrip("_"): setting(model, name) for name in SETTINGS},
        horizon=attempt("Error by steps ahead", lambda: svg(horizon_figure(errors))),
        open_loops=open_loop_pictures(rollout, dims),
        videos=[*video_pictures(model, rollout, body), *missing],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def verdict(name: str, error: HorizonError, horizon: int) -> str:
    """One sentence about one quantity, at the horizon of imagination."""
    k = min(horizon, len(error.dream))
    dream, persistence = error.dream[k - 1], error.persistence[k - 1]
    if np.isnan(dream):
        return f"{name}: no sequence in the data continues for {k} steps."
    if persistence < STILL:
        return f"{name}: does not change in {k} steps; the dream's error is {dream:.2g} standard deviations."
    return f"{name}: {k} steps ahead the dream's error is {dream / persistence:.0%} of that of persistence."


def error_rows(errors: Mapping[str, HorizonError]) -> list[tuple[str, ...]]:
    """Cells of the table of horizon errors; the first row of a quantity has its name and its overconfidence."""
    rows = []
    for name, error in errors.items():
        for k in error.steps:
            values = (error.dream[k - 1], error.persistence[k - 1], error.mean[k - 1])
            cells = [*(known(value, ".3f") for value in values), known(error.coverage[k - 1], ".0%")]
            first = k == error.steps[0]
            rows.append((name if first else "", str(k), *cells, known(error.overconfidence, ".1f") if first else ""))
    return rows


def known(value: float, code: str) -> str:
    """A formatted number, a dash for NaN."""
    return "–" if np.isnan(value) else format(value, code)


def setting(model: Dreamer, name: str) -> str:
    """A setting of the model; the current value of a schedule."""
    value = getattr(model, name)
    return f"{value(model._current_progress_remaining):g}" if callable(value) else str(value)


def open_loop_pictures(rollout: OpenLoop, dims: Sequence[str] | None) -> list[Picture]:
    """Figures of the sequences with the most valid entries."""

    def draw(sequence: int) -> str:
        return svg(open_loop_figure(rollout, sequence, dims))

    return [attempt(f"Sequence {i}", partial(draw, int(i))) for i in rollout.best_sequences[:3]]


def video_pictures(model: Dreamer, rollout: OpenLoop, body: Body | None) -> list[Picture]:
    """Videos of images and of the body, of the sequences with the most valid entries."""
    films: dict[str, Callable[[], np.ndarray]] = {}
    in_units = partial(original_units, model.get_env())
    for i in map(int, rollout.best_sequences[:2]):
        for key in [key for key, spec in rollout.specs.items() if spec.kind == "image"]:
            films[f"{key}, sequence {i}: truth | dream | error"] = partial(image_video, rollout, i, key)
        if body is not None:
            films[f"Body, sequence {i}: truth | dream"] = partial(body_video, rollout, i, body, in_units)
    return [attempt(caption, partial(video, film), "video") for caption, film in films.items()]


def attempt(caption: str, make: Callable[[], str], kind: str = "figure") -> Picture:
    """A picture, or the reason why it is missing."""
    try:
        return Picture(caption, kind, make())
    except MissingExtra as error:
        return Picture(caption, "missing", str(error))


def svg(figure: Any) -> str:
    """A matplotlib figure as a data URL."""
    file = io.BytesIO()
    figure.savefig(file, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def video(film: Callable[[], np.ndarray]) -> str:
    """A video as a data URL."""
    return f"data:video/mp4;base64,{base64.b64encode(encode(film(), '.mp4')).decode()}"
