"""The Zoo's command line, end to end: every run is a process of its own, as a user starts it."""

import subprocess
from pathlib import Path

import pytest

from tests.zoo.processes import Run, command, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of a test file work and log."""
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def zoo(folder: Path) -> Run:
    """Run a script, give back all that it said; a failure is a failure of the test unless it was expected."""

    def run(script: str, *arguments: str, fails: bool = False, **variables: str) -> str:
        done = subprocess.run(
            command(script, *arguments), cwd=folder, env=environment(**variables), capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, said
        return said

    return run
