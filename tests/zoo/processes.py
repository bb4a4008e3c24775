"""How the tests of this folder start the Zoo."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# the smallest agent that still trains within a hundred steps
TINY = ["model_size:'debug'", "batch_size:8", "batch_length:16", "learning_starts:20", "train_ratio:16"]

Run = Callable[..., str]


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    headless = {"MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **headless, "PYTHONPATH": path, **variables}


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sb3_dreamer.zoo", script, *arguments]
