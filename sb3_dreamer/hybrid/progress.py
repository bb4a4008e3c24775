"""A progress bar like that of ``learn()``, for long computations outside of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stable_baselines3.common.callbacks import tqdm

Advance = Callable[[int], object]


def no_progress(steps: int) -> None:
    """Shows nothing."""


@contextmanager
def progress(total: int, what: str, shown: bool) -> Iterator[Advance]:
    """A function to call with the number of steps that were done.

    :param total: number of steps.
    :param what: label of the bar.
    :param shown: whether to show a bar at all.
    :raises ImportError: if the libraries that draw the bar are missing.
    """
    if not shown:
        yield no_progress
        return
    if tqdm is None:
        raise ImportError("progress_bar=True needs tqdm and rich: pip install tqdm rich")
    with tqdm(total=total, desc=what) as bar:
        yield bar.update
