"""The examples run as they are; that of the Zoo has its test in tests/zoo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_a_world_model_of_random_actions_can_be_trained_without_an_agent(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "pendulum_world_model.py")]
    arguments = ["--steps", "1000", "--updates", "2", "--out", str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([*script, *arguments], env=variables, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "2 updates: error over 50 steps is" in told.stdout
    assert (tmp_path / "index.html").stat().st_size > 10_000
