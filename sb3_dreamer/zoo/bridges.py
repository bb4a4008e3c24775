"""What has to be in place while rl_zoo3's scripts run, so that they know an algorithm that registered itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def dreamer_experiments() -> Iterator[None]:
    """``train`` builds a :class:`~sb3_dreamer.zoo.experiment.DreamerExperiment` for ``--algo dreamer``."""
    import rl_zoo3.train

    from sb3_dreamer.zoo.experiment import experiment_manager

    with replaced(rl_zoo3.train, "ExperimentManager", experiment_manager):
        yield


@contextmanager
def children_know_dreamer() -> Iterator[None]:
    """Scripts of rl_zoo3 that a script of rl_zoo3 starts are started through this package."""
    call = subprocess.call

    def call_child(command: list[str], **kwargs: Any) -> int:
        return call(child_command(command), **kwargs)

    with replaced(subprocess, "call", call_child):
        yield


def child_command(command: list[str]) -> list[str]:
    """``python -m rl_zoo3.record_video`` -> ``python -m sb3_dreamer.zoo record_video``; anything else as it is."""
    here = [sys.executable, "-m", "sb3_dreamer.zoo"]
    match command:
        case ["python", "-m", module, *rest] if module.startswith("rl_zoo3."):
            return [*here, module.removeprefix("rl_zoo3."), *rest]
        case ["python", "enjoy.py", *rest]:
            return [*here, "enjoy", *rest]
    return command


@contextmanager
def ffmpeg_on_path() -> Iterator[None]:
    """The program ``ffmpeg`` that rl_zoo3 calls: the system's, else the one that moviepy brought."""
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
