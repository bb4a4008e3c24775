"""The examples run as they are; that of the Zoo has its test in tests/zoo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def printed_by(example: str, *arguments: str, folder: Path) -> str:
    """What an example prints, run in a folder of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "examples" / example), *arguments]
    told = subprocess.run(script, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_a_world_model_of_random_actions_can_be_trained_without_an_agent(tmp_path: Path) -> None:
    arguments = ["--steps", "1000", "--updates", "2", "--out", str(tmp_path)]
    printed = printed_by("pendulum_world_model.py", *arguments, folder=tmp_path)
    assert "2 updates: error over 50 steps is" in printed
    assert (tmp_path / "index.html").stat().st_size > 10_000


def test_an_agent_adapts_to_another_gravity_next_to_one_that_begins_there(tmp_path: Path) -> None:
    arguments = ["--before", "502", "--after", "510", "--pieces", "2", "--episodes", "1"]
    printed = printed_by("changed_world.py", *arguments, folder=tmp_path)
    first, *later = [line for line in printed.splitlines() if "-" in line.partition(": ")[2]]  # but not progress bars
    assert first.startswith("trained with gravity 10: -")
    assert [line.split(" there: -")[0] for line in later] == ["after 255 steps", "after 510 steps"]
    assert (tmp_path / "before_the_change.zip").exists()
