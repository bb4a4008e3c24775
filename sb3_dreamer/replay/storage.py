"""Where the entries lie: arrays of rows in memory, or memory-mapped files in a folder.

Both know rows and columns only; what the rows mean in time is the buffer's business.
"""

from __future__ import annotations

import numpy as np

from sb3_dreamer.replay.columns import Column


class RamStorage:
    """Arrays (n_envs * rows, *shape), one per column. The pages of rows never written cost nothing.

    :param columns: what an entry is made of.
    :param n_envs: number of environments.
    :param rows: entries kept of each.
    """

    def __init__(self, columns: dict[str, Column], n_envs: int, rows: int) -> None:
        self.n_envs, self.rows = n_envs, rows
        self.arrays = {name: np.zeros((n_envs * rows, *c.shape), c.dtype) for name, c in columns.items()}

    def write(self, row: np.ndarray, number: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Write one entry of each of some environments.

        :param row: (n,) where.
        :param number: (n,) how many entries came before this one in its environment.
        :param values: column name -> (n, *shape).
        """
        for name, value in values.items():
            self.arrays[name][row] = value

    def filled(self, used: int) -> dict[str, np.ndarray]:
        """The first ``used`` rows of each environment, (n_envs, used, *shape)."""
        return {name: a.reshape(self.n_envs, self.rows, *a.shape[1:])[:, :used] for name, a in self.arrays.items()}

    def refill(self, filled: dict[str, np.ndarray]) -> None:
        """Put back what ``filled`` gave."""
        for name, part in self.filled(next(iter(filled.values())).shape[1]).items():
            part[:] = filled[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())
