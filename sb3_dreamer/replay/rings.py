"""Which entries are stored, in which rows, and which sequences of them are served next.

Each environment has its own ring of rows and counts all entries ever written; entry ``n`` lies in row ``n % rows``.
The count of entries is the write head. No sequence crosses it, because sequences are drawn as entry numbers::

    rows = 8, head = 23
    numbers    ... 13 14 | 15   16   17   18   19   20   21   22 | 23 ...
    overwritten          | kept                                  | not yet written
                           ^    |--- sequence of 4 ---|
                      oldest    first start that is served: the entry before it is still there,
                                so its action (prev_action) and its latent (start) are known
"""

from __future__ import annotations

from collections import deque

import numpy as np


class Rings:
    """Write heads and the choice of sequences.

    :param n_envs: number of environments.
    :param rows: entries kept of each environment.
    :param length: entries T of a sequence.
    """

    def __init__(self, n_envs: int, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self.head = np.zeros(n_envs, np.int64)  # entries ever written
        self.lower_bound = np.zeros(n_envs, np.int64)  # entries below this number are lost
        self._queued_until = np.zeros(n_envs, np.int64)  # entries below this number have been queued
        self._queue: deque[tuple[int, int]] = deque(maxlen=n_envs * (rows // length))
        self.reseed()

    def reseed(self) -> None:
        """Seed the replay's own generator, which is pickled, from numpy's global one, which SB3 seeds."""
        self._rng = np.random.default_rng(np.random.randint(2**31 - 1))  # noqa: NPY002

    def resume(self, head: np.ndarray, lower_bound: np.ndarray) -> None:
        """Start from entries that were written before, by another process perhaps; none of them counts as new."""
        self.head, self.lower_bound, self._queued_until = head.copy(), lower_bound, head.copy()

    def advance(self, envs: np.ndarray, new: bool = True) -> None:
        """Count one new entry for each of ``envs``; every T new ones are queued as a sequence.

        :param envs: their numbers.
        :param new: False for recorded experience, which is not queued but drawn uniformly.
        """
        self.head[envs] += 1
        if not new:
            self._queued_until[envs] = self.head[envs]
        for env in np.flatnonzero(self.head - self._queued_until >= self.length):
            self._queue.append((int(env), int(self._queued_until[env])))
            self._queued_until[env] += self.length

    def row(self, env: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Rows of entries, in arrays of shape (n_envs * rows, ...)."""
        return env * self.rows + number % self.rows

    def oldest(self) -> np.ndarray:
        """(n_envs,) number of the oldest entry kept."""
        return np.maximum(self.head - self.rows, self.lower_bound)

    def stored(self) -> np.ndarray:
        """(n_envs,) entries kept."""
        return self.head - self.oldest()

    def stream(self, env: int, newest: int | None = None) -> np.ndarray:
        """(n,) rows of the entries kept of one environment, oldest first.

        :param env: its number.
        :param newest: at most this many of the newest entries.
        """
        head, oldest = int(self.head[env]), int(self.oldest()[env])
        begin = oldest if newest is None else max(oldest, head - newest)
        return self.row(np.full(head - begin, env), np.arange(begin, head))

    def servable(self, since: np.ndarray | int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(n_envs,) the first start that can be served, and how many starts there are from it on.

        :param since: (n_envs,) no sequence begins before these entries.
        """
        oldest = self.oldest()
        first_start = oldest + (oldest > 0)  # entry 0 begins an episode, any other needs the entry before it
        first_start = np.maximum(first_start, since)
        return first_start, np.maximum(self.head - self.length + 1 - first_start, 0)

    def draw(self, batch_size: int, since: np.ndarray | None = None) -> np.ndarray:
        """Choose sequences: up to half from the queue, newest first; the rest uniformly over all starts.

        :param batch_size: number of sequences B.
        :param since: (n_envs,) draw uniformly over the starts from these numbers on, and leave the queue as it is.
        :return: (B, 2) environments and numbers of the first entries.
        :raises ValueError: if no environment has enough entries.
        """
        first_start, count = self.servable(0 if since is None else since)
        total = int(count.sum())
        if total == 0:
            raise ValueError(
                f"no sequence to sample: the environments have {self.stored().tolist()} entries, "
                f"a sequence needs {self.length} of one environment"
            )
        fresh: list[tuple[int, int]] = []
        while since is None and self._queue and 2 * len(fresh) + 2 <= batch_size:
            env, start = self._queue.pop()
            if start >= first_start[env]:
                fresh.append((env, start))
        drawn = self._rng.integers(total, size=batch_size - len(fresh))
        until = np.cumsum(count)
        envs = np.searchsorted(until, drawn, side="right")
        starts = first_start[envs] + drawn - (until - count)[envs]
        return np.concatenate([np.array(fresh, np.int64).reshape(-1, 2), np.stack([envs, starts], axis=1)])
