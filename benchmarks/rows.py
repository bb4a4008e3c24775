"""Rows of results: CSV files, and the commit and the machine that were measured."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch as th

import sb3_dreamer


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add one row to a CSV file; a new file gets a header."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def drop_rows_after(path: Path, columns: Sequence[str], step: int) -> None:
    """Drop the rows of later steps, which belong to training that no checkpoint holds."""
    if not path.exists():
        return
    rows = list(csv.DictReader(path.read_text().splitlines()))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for row in rows if int(row["step"]) <= step)


def commit() -> str:
    """The commit of the package that is measured, with a + for uncommitted changes; its version where git has none."""
    package = Path(sb3_dreamer.__file__)
    if not _git(package, "ls-files", package.name):
        return sb3_dreamer.__version__
    return _git(package, "rev-parse", "--short", "HEAD") + ("+" if _git(package, "status", "--porcelain", ".") else "")


def _git(package: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(package.parent), *words], capture_output=True, text=True)
    return done.stdout.strip()


def machine() -> str:
    """Processor, cores and PyTorch build."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {th.__version__}"
