"""What a sequence model remembers of a moment beside h and z: nothing, or the keys and values that attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch as th

Index = th.Tensor | slice | tuple


class Context:
    """What a model remembers of a moment beside h and z: nothing, unless its own class says otherwise."""

    def __getitem__(self, index: Index) -> Context:
        return self

    def flatten(self) -> Context:
        """(B, T) moments -> (B * T) moments."""
        return self

    def detach(self) -> Context:
        """The same values without gradient."""
        return self

    def restart(self, is_first: th.Tensor) -> Context:
        """Forget everything where ``is_first`` (n,)."""
        return self


@dataclass
class Cache(Context):
    """Keys and values of what led to some moments. Many moments may lie on one row::

        a row of a tape    k_0  k_1  k_2  k_3  k_4  k_5 ...
                                |------ age -----|
                                                 end (excluded)

    The states of a training pass are such places on B rows; only those that are stepped from are ever copied out.

    :param tapes: of each layer the keys and values (2, rows, entries, M).
    :param row: (...) the row of each moment.
    :param end: (...) its place.
    :param age: (...) entries of the episode so far; older ones are never attended to.
    """

    tapes: tuple[th.Tensor, ...]
    row: th.Tensor
    end: th.Tensor
    age: th.Tensor

    def __getitem__(self, index: Index) -> Cache:
        return Cache(self.tapes, self.row[index], self.end[index], self.age[index])

    def flatten(self) -> Cache:
        """(B, T) moments -> (B * T) moments."""
        return Cache(self.tapes, self.row.flatten(), self.end.flatten(), self.age.flatten())

    def detach(self) -> Cache:
        """The same values without gradient."""
        return Cache(tuple(tape.detach() for tape in self.tapes), self.row, self.end, self.age)

    def restart(self, is_first: th.Tensor) -> Cache:
        """Forget everything where ``is_first`` (n,)."""
        return Cache(self.tapes, self.row, self.end, self.age * ~is_first)

    def last(self, length: int) -> list[th.Tensor]:
        """The last ``length`` keys and values before each of n moments, or all if the tape is shorter, of each layer:
        (2, n, length, M). Entries older than ``age`` hold anything."""
        length = min(length, self.tapes[0].shape[2])
        places = (self.end[:, None] + th.arange(-length, 0, device=self.end.device)).clamp(min=0)
        return [tape[:, self.row[:, None], places] for tape in self.tapes]
