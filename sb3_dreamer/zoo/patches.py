"""Patches of rl_zoo3 and its libraries, active while its scripts run, so that they work with Dreamer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym

# part of an environment's id -> how to install what rl_zoo3 does not bring
ENVIRONMENTS = {
    "dm_control/": 'pip install "sb3-dreamer[dmc]"',
    "NoFrameskip-v4": 'pip install "sb3-dreamer[atari]"',
}


@contextmanager
def dreamer_experiments() -> Iterator[None]:
    """``train`` builds a :class:`~sb3_dreamer.zoo.experiment.DreamerExperiment` for ``--algo dreamer``."""
    import rl_zoo3.train

    from sb3_dreamer.zoo.experiment import experiment_manager

    with patch.object(rl_zoo3.train, "ExperimentManager", experiment_manager):
        yield


def register_dm_control(arguments: list[str]) -> None:
    """Register its tasks if one is named: only some of rl_zoo3's scripts have ``--gym-packages shimmy``.

    :param arguments: of the command line.
    """
    if any("dm_control/" in word for word in arguments) and find_spec("shimmy"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a display, importing dm_control warns of it
            gym.register_envs(import_module("shimmy"))


@contextmanager
def missing_environments_explained() -> Iterator[None]:
    """If an environment of dreamer.yml is not registered, say which extra brings it."""
    try:
        yield
    except (ValueError, KeyError) as error:
        named, *words = str(error).split() or [""]
        for part, needs in ENVIRONMENTS.items():
            if part in named and ("not found" in str(error) or not words):
                raise ValueError(f"{error} It needs {needs}") from error
        raise


@contextmanager
def subprocesses_know_dreamer() -> Iterator[None]:
    """Scripts of rl_zoo3 start other scripts of rl_zoo3 through this package."""
    call = subprocess.call

    def call_child(command: list[str], **kwargs: Any) -> int:
        return call(child_command(command), **kwargs)

    with patch.object(subprocess, "call", call_child):
        yield


def child_command(command: list[str]) -> list[str]:
    """``python -m rl_zoo3.record_video`` -> ``python -m sb3_dreamer.zoo record_video``; other commands unchanged."""
    here = [sys.executable, "-m", "sb3_dreamer.zoo"]
    match command:
        case ["python", "-m", module, *rest] if module.startswith("rl_zoo3."):
            return [*here, module.removeprefix("rl_zoo3."), *rest]
        case ["python", "enjoy.py", *rest]:
            return [*here, "enjoy", *rest]
    return command


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """Put ``ffmpeg``, which rl_zoo3 calls, on the PATH: the one of moviepy if the system has none."""
    if shutil.which("ffmpeg"):
        yield
        return
    import imageio_ffmpeg

    path = os.environ.get("PATH", os.defpath)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
        os.environ["PATH"] = os.pathsep.join([folder, path])
        try:
            yield
        finally:
            os.environ["PATH"] = path


@contextmanager
def figures_to_files() -> Iterator[None]:
    """Without a display, ``plt.show`` writes ``<name of the figure>.png`` into the current folder."""
    from matplotlib import pyplot as plt
    from wasabi import msg

    def save_all() -> None:
        for number in plt.get_fignums():
            figure = plt.figure(number)
            manager = figure.canvas.manager
            name = str(figure.get_label()) or (manager.get_window_title() if manager else "") or f"figure_{number}"
            path = re.sub(r"[^\w.-]+", "_", name) + ".png"
            figure.savefig(path)
            msg.good(f"No display: saved {path}")
        plt.close("all")

    with patch.object(plt, "show", save_all if plt.get_backend().lower() == "agg" else plt.show):
        yield
