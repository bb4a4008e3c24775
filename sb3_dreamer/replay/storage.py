"""Where the entries are stored: arrays of rows in memory, or memory-mapped files in a folder.

Both know rows and columns only; what the rows mean in time is up to the buffer.

On disk, a folder holds one ``.npy`` file per column, ``replay.json`` (what the columns are) and ``lock``. There is no
file of write heads to keep in sync: every row carries the number of its entry, which is cleared before the row is
overwritten and set after the last byte of the entry::

    number   0   0   0   0       nothing yet (the number of entry n is stored as n + 1)
    number   1   2   3   0       3 entries; row 3 is free, or is being written
    number   5   2   3   4       entry 4 took the place of entry 0
    number   5   0   3   4       entry 5 is being written: after a kill here, entries 2, 3, 4 are served

What is guaranteed. When the process dies at any moment (``kill -9``, out of memory), every entry whose ``write``
returned is there when the folder is opened again, and no half-written one is: the pages belong to the system, not to
the process. After a power loss this holds for what was stored before the last ``flush``, provided that nothing was
stored after it; otherwise pages may have reached the disk in any order, and the folder should be deleted. Latents
are refreshed in place and may be half refreshed after a kill; they are approximations at all times.
The disk space of all rows is allocated when the folder is created: a full disk is an error then and not later.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import psutil

from sb3_dreamer.replay.columns import Column

if sys.platform != "win32":
    import fcntl

DESCRIPTION = "replay.json"
CHUNK = 2**20  # bytes that are written at a time
# device and inode of the locks that this process holds until it ends -> number of the newest claim
_LOCKS: dict[tuple[int, int], int] = {}
if hasattr(os, "register_at_fork"):  # a child inherits the table, but none of the locks
    os.register_at_fork(after_in_child=_LOCKS.clear)


class Storage(Protocol):
    """Arrays (n_envs * rows, *shape), one per column."""

    arrays: dict[str, np.ndarray]
    writable: bool  # False until `claim`

    def write(self, row: np.ndarray, number: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Write one entry for each of some environments.

        :param row: (n,) rows to write to.
        :param number: (n,) how many entries came before this one in its environment.
        :param values: column name -> (n, *shape).
        """

    def claim(self, head: np.ndarray) -> None:
        """Become writable.

        :param head: (n_envs,) entries of each environment, as the buffer knows them.
        """

    def flush(self) -> None:
        """Write everything to the disk, if there is one."""

    def dump(self, used: int) -> Any:
        """What a pickle needs to hold.

        :param used: number of rows in use of each environment.
        """

    def restore(self, dumped: Any) -> None:
        """Restore the result of :meth:`dump`."""


class RamStorage:
    """A :class:`Storage` in memory. The pages of rows never written cost nothing.

    Warns if the arrays will not fit into memory once all rows are written: that would end a run after hours.

    :param columns: what an entry consists of.
    :param n_envs: number of environments.
    :param rows: entries kept of each environment.
    """

    def __init__(self, columns: dict[str, Column], n_envs: int, rows: int) -> None:
        self.n_envs, self.rows, self.writable = n_envs, rows, True
        self.arrays = {name: np.zeros((n_envs * rows, *c.shape), c.dtype) for name, c in columns.items()}
        needed, available = sum(a.nbytes for a in self.arrays.values()), psutil.virtual_memory().available
        if needed > available:
            warnings.warn(
                f"a full replay takes {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are available: "
                "use a smaller buffer_size, or keep it on disk, replay_buffer_kwargs=dict(storage_path=...)",
                stacklevel=3,
            )

    def write(self, row: np.ndarray, number: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """See :meth:`Storage.write`."""
        for name, value in values.items():
            self.arrays[name][row] = value

    def claim(self, head: np.ndarray) -> None:
        """Nothing to do: memory is always writable."""

    def flush(self) -> None:
        """Nothing to do in memory."""

    def dump(self, used: int) -> dict[str, np.ndarray]:
        """The first ``used`` rows of each environment, (n_envs, used, *shape)."""
        return {name: a.reshape(self.n_envs, self.rows, *a.shape[1:])[:, :used] for name, a in self.arrays.items()}

    def restore(self, dumped: dict[str, np.ndarray]) -> None:
        """Restore the result of :meth:`dump`; the arrays of a full replay are taken over, not copied."""
        used = next(iter(dumped.values())).shape[1]
        for name, part in self.dump(used).items():
            if used == self.rows:
                self.arrays[name] = dumped[name].reshape(self.arrays[name].shape)
            else:
                part[:] = dumped[name]


class DiskStorage:
    """A :class:`Storage` of memory-mapped files. A folder that holds a replay is opened, any other is created.

    :param folder: of the files.
    :param columns: what an entry consists of.
    :param n_envs: number of environments.
    :param rows: entries kept of each environment.
    :param spaces: the spaces as strings; a folder made for others is refused.
    :raises ValueError: if the folder holds a replay with other columns, spaces or sizes.
    :raises OSError: if the disk is too small; the folder stays as it was.
    """

    def __init__(
        self, folder: Path, columns: dict[str, Column], n_envs: int, rows: int, spaces: dict[str, str]
    ) -> None:
        self.folder, self.n_envs, self.rows = folder, n_envs, rows
        shapes = {name: ((n_envs * rows, *c.shape), c.dtype) for name, c in columns.items()}
        shapes["number"] = ((n_envs * rows,), np.dtype(np.int64))
        wanted = {
            "format": 1,
            "n_envs": n_envs,
            "entries of each environment": rows,
            **spaces,
            **{f"column {name}": f"{dtype} {shape[1:]}" for name, (shape, dtype) in shapes.items()},
        }
        self.writable = False
        if not self.exists(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)  # so that no other process creates the files too
            _create_files({self._file(name): shape for name, shape in shapes.items()}, folder)
            _write_json(folder / DESCRIPTION, {**wanted, "id": uuid.uuid4().hex})
        found = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        self.id = found.pop("id")
        if found != wanted:
            names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
            differences = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} here" for name in names)
            raise ValueError(
                f"the replay in {folder} has another layout ({differences}): keep the settings it was made with, or "
                "use another folder; to act or to evaluate without it, load(..., replay_buffer_kwargs={})"
            )
        self._maps = {name: np.lib.format.open_memmap(self._file(name), mode="r+") for name in shapes}
        self.arrays = {name: np.asarray(file) for name, file in self._maps.items()}
        self._opened_at, self._restored = self.heads(), False

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the folder holds a replay."""
        return (folder / DESCRIPTION).exists()

    def write(self, row: np.ndarray, number: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """See :meth:`Storage.write`; the entries count once their numbers are written, at the end.

        :raises RuntimeError: if another buffer of this process has claimed the folder since, or after a fork.
        """
        if _LOCKS.get(self._lock) != self._claim:
            raise RuntimeError(f"{self.folder} is written by another agent by now: give each its own storage_path")
        self.arrays["number"][row] = 0
        for name, value in values.items():
            self.arrays[name][row] = value
        self.arrays["number"][row] = number + 1

    def claim(self, head: np.ndarray) -> None:
        """Become the only writer, and drop entries beyond ``head``, if the buffer was loaded from an older file.

        :param head: (n_envs,) entries of each environment, as the buffer knows them.
        :raises RuntimeError: if another process writes to the folder, or somebody has written to it meanwhile.
        """
        self._lock, self._claim = _lock(self.folder)
        expected, there = self._opened_at if self._restored else head, self.heads()
        if (there != expected).any():
            raise RuntimeError(
                f"another agent has written to {self.folder} since this one opened it ({there.sum()} entries instead "
                f"of {np.sum(expected)}): load this one again to continue with them, or give each its own storage_path"
            )
        number = self.arrays["number"].reshape(self.n_envs, self.rows)
        number[number > head[:, None]] = 0
        self.writable = True

    def heads(self) -> np.ndarray:
        """(n_envs,) entries ever written."""
        return self.arrays["number"].reshape(self.n_envs, self.rows).max(axis=1)

    def oldest(self, head: np.ndarray) -> np.ndarray:
        """(n_envs,) the smallest number from which all entries below ``head`` are complete and in order."""
        oldest = np.maximum(head - self.rows, 0)
        behind = np.arange(self.rows)
        for env, number in enumerate(self.arrays["number"].reshape(self.n_envs, self.rows)):
            wanted = head[env] - (head[env] - 1 - behind) % self.rows  # number + 1 of the newest entry of each row
            lost = wanted[(number != wanted) & (wanted > 0)]
            oldest[env] = lost.max(initial=oldest[env])
        return oldest

    def flush(self) -> None:
        """Write all pages to the disk."""
        for file in self._maps.values():
            file.flush()

    def dump(self, used: int) -> str:
        """The id of the replay: a pickle holds no entries."""
        return self.id

    def restore(self, dumped: Any) -> None:
        """Check that the folder holds the replay that was pickled.

        :raises ValueError: if it holds another one.
        """
        if dumped != self.id:
            raise ValueError(f"{self.folder} holds another replay than the one that was saved")
        self._restored = True

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.npy"


def open_storage(
    folder: Path | None, columns: dict[str, Column], n_envs: int, rows: int, spaces: dict[str, str]
) -> Storage:
    """The storage in a folder; in memory without one. The parameters are those of :class:`DiskStorage`."""
    return RamStorage(columns, n_envs, rows) if folder is None else DiskStorage(folder, columns, n_envs, rows, spaces)


def _create_files(shapes: dict[Path, tuple[tuple[int, ...], np.dtype]], folder: Path) -> None:
    """Make ``.npy`` files of zeros, and allocate the disk space of every byte.

    :raises OSError: if there is not enough; no file is left behind.
    """
    needed = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    free = shutil.disk_usage(folder).free
    try:
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for path, (shape, dtype) in shapes.items():
            header = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).offset
            _allocate(path, header)
    except OSError as error:
        for path in shapes:
            path.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror}: the replay in {folder} needs {needed} bytes, {free} are free: "
            "use a smaller buffer_size or another storage_path",
        ) from error


def _allocate(path: Path, header: int) -> None:
    """Allocate the disk space of a file that holds nothing but zeros after so many bytes."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        file.seek(header)  # macOS and Windows: zeros that are written take their space, others do not
        for begin in range(header, size, CHUNK):
            file.write(bytes(min(CHUNK, size - begin)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file completely or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _lock(folder: Path) -> tuple[tuple[int, int], int]:
    """Keep other processes from writing to the folder as long as this one lives.

    :return: which lock, and the number of the claim.
    :raises RuntimeError: if another process holds it.
    """
    if sys.platform == "win32":
        return (0, 0), _LOCKS.setdefault((0, 0), 0)
    path = folder / "lock"
    path.touch()
    inode = path.stat().st_dev, path.stat().st_ino
    if inode in _LOCKS:  # opening and closing it again would release the lock
        _LOCKS[inode] += 1
        return inode, _LOCKS[inode]
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise RuntimeError(f"{folder} is written by another process: give each run its own storage_path") from None
    _LOCKS[inode] = 0
    return inode, 0
