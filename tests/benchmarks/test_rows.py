import csv
import subprocess
from pathlib import Path

import pytest

import sb3_dreamer
from benchmarks.rows import append_row, commit, drop_rows_after

COLUMNS = ("env", "step")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if the package that is imported was another one than that next to the benchmarks."""
    package = tmp_path / "checkout" / "sb3_dreamer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(sb3_dreamer, "__file__", str(package / "__init__.py"))
    return package


def git(package: Path, *words: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@home"]
    done = subprocess.run(["git", *identity, *words], cwd=package.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_belongs_to_the_package_that_is_imported(package: Path):
    git(package, "init")
    git(package, "add", ".")
    git(package, "commit", "-m", "the package")
    head = git(package, "rev-parse", "--short", "HEAD")
    assert commit() == head
    (package.parent / "notes").touch()
    assert commit() == head, "only the package counts"
    (package / "__init__.py").write_text("changed = True")
    assert commit() == head + "+"


def test_an_installed_package_reports_its_version_and_not_the_commit_of_the_folder_around_it(package: Path):
    git(package, "init")
    assert commit() == sb3_dreamer.__version__


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path):
    path = tmp_path / "results.csv"
    drop_rows_after(path, COLUMNS, step=10)
    assert not path.exists()
    for step in (10, 20):
        append_row(path, COLUMNS, {"env": "Pendulum-v1", "step": step})
    drop_rows_after(path, COLUMNS, step=10)
    with path.open() as file:
        assert list(csv.DictReader(file)) == [{"env": "Pendulum-v1", "step": "10"}]
