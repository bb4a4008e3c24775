"""One self-contained HTML page: pictures, numbers and settings; it opens in a browser without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
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
    """A figure or a video, or the reason why there is none.

    :param caption: what is to be seen.
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
    body: Body | str = "",
) -> Path:
    """Look at the dreams of a model and write the page.

    :param model: the model.
    :param batch: sequences to dream on from.
    :param path: the HTML file; its folder is made.
    :param title: of the page.
    :param real_return: see :func:`~sb3_dreamer.dreams.trouble.signs_of`.
    :param context: entries that the model sees of each sequence.
    :param samples: dreams of each sequence.
    :param dims: names of the dimensions to plot, such as ``obs[3]``; None: those with the largest error.
    :param body: shows the dreamed bodies of a MuJoCo task; a string: the reason why there is none, "" for none to tell.
    :return: the path.
    """
    loop = open_loop(model.policy, batch, context, samples)
    errors = horizon_errors(loop)
    signs = signs_of(model, batch, errors, real_return)
    template = need("jinja2", "dreams").Template(TEMPLATE.read_text("utf-8"), autoescape=True, trim_blocks=True)
    page = template.render(
        title=title,
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
        loop=loop,
        band=f"{BAND:.0%}",
        errors=errors,
        verdicts=[verdict(name, error, model.imagination_horizon) for name, error in errors.items()],
        troubles=find_trouble(signs),
        signs={name: f"{value:.3g}" for name, value in signs.items()},
        settings={name.lstrip("_"): setting(model, name) for name in SETTINGS},
        horizon=attempt("Error by steps ahead", lambda: svg(horizon_figure(errors))),
        open_loops=open_loop_pictures(loop, dims),
        videos=video_pictures(model, loop, body),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path


def verdict(name: str, error: HorizonError, horizon: int) -> str:
    """One sentence on one quantity, at the horizon that the actor learns in."""
    k = min(horizon, len(error.dream))
    dream, unchanged = error.dream[k - 1], error.unchanged[k - 1]
    if np.isnan(dream):
        return f"{name}: no sequence in the data goes on for {k} steps."
    if unchanged < STILL:
        return f"{name}: does not change in {k} steps; the dream's error is {dream:.2g} standard deviations."
    return f"{name}: {k} steps ahead the dream's error is {dream / unchanged:.0%} of that of “nothing changes”."


def setting(model: Dreamer, name: str) -> str:
    """A setting of the model, a schedule as its present value."""
    value = getattr(model, name)
    return f"{value(model._current_progress_remaining):g}" if callable(value) else str(value)


def open_loop_pictures(loop: OpenLoop, dims: Sequence[str] | None) -> list[Picture]:
    """Figures of the sequences that can be compared longest."""

    def draw(sequence: int) -> str:
        return svg(open_loop_figure(loop, sequence, dims))

    return [attempt(f"Sequence {i}", partial(draw, int(i))) for i in loop.best_sequences[:3]]


def video_pictures(model: Dreamer, loop: OpenLoop, body: Body | str) -> list[Picture]:
    """Videos of the same sequences, and of the bodies."""
    films: dict[str, Callable[[], np.ndarray]] = {}
    in_units = partial(original_units, model.get_env())
    for i in map(int, loop.best_sequences[:2]):
        for key in [key for key, spec in loop.specs.items() if spec.kind == "image"]:
            films[f"{key}, sequence {i}: truth | dream | error"] = partial(image_video, loop, i, key)
        if isinstance(body, Body):
            films[f"Body, sequence {i}: truth | dream"] = partial(body_video, loop, i, body, in_units)
    pictures = [attempt(caption, partial(video, film), "video") for caption, film in films.items()]
    return [*pictures, Picture("Body", "missing", body)] if isinstance(body, str) and body else pictures


def attempt(caption: str, make: Callable[[], str], kind: str = "figure") -> Picture:
    """A picture, or the reason why there is none."""
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
