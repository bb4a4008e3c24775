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


class Tape:
    """Keys and values of one layer. What is written stays; new entries come after the last one.

    :param data: (2, rows, heads, places, width of a head); what lies after the entries in use is never read.
    :param used: entries in use.
    """

    def __init__(self, data: th.Tensor, used: int) -> None:
        self.data, self.used = data, used

    def append(self, new: th.Tensor) -> th.Tensor:
        """Write entries (2, rows, heads, T, .), in the dtype of the tape, and give all in use."""
        end = self.used + new.shape[3]
        self.data[:, :, :, self.used : end] = new
        self.used = end
        return self.data[:, :, :, :end]

    def copy(self, row: th.Tensor, end: th.Tensor, length: int, room: int) -> Tape:
        """The ``length`` entries before n places, each on a row of its own, with room for more. Before the first
        entry of a row lies anything."""
        places = (end[:, None] + th.arange(-length, 0, device=end.device)).clamp(min=0)
        entries = self.data.transpose(2, 3)[:, row[:, None], places].transpose(2, 3)
        data = self.data.new_empty(*entries.shape[:3], length + room, entries.shape[4])
        data[:, :, :, :length] = entries
        return Tape(data, length)


@dataclass
class Cache(Context):
    """Keys and values of what led to some moments. Many moments may lie on one row::

        a row of a tape    k_0  k_1  k_2  k_3  k_4  k_5 ...
                                |------ age -----|
                                                 end (excluded)

    The states of a training pass are places on B rows; only what is stepped from is ever copied out.

    :param tapes: of each layer.
    :param row: (...) the row of each moment.
    :param end: (...) its place.
    :param age: (...) entries of the episode so far; older ones are never attended to.
    :param tip: set where moment i is the newest entry of row i for all i, so that tapes grow in place: that place.
    """

    tapes: tuple[Tape, ...]
    row: th.Tensor
    end: th.Tensor
    age: th.Tensor
    tip: int | None = None

    spare = 16  # places for the steps to come, so that not every one of them copies the window

    def __getitem__(self, index: Index) -> Cache:
        return Cache(self.tapes, self.row[index], self.end[index], self.age[index])

    def flatten(self) -> Cache:
        """(B, T) moments -> (B * T) moments."""
        return Cache(self.tapes, self.row.flatten(), self.end.flatten(), self.age.flatten())

    def detach(self) -> Cache:
        """The same values without gradient."""
        tapes = tuple(Tape(tape.data[:, :, :, : tape.used].detach(), tape.used) for tape in self.tapes)
        return Cache(tapes, self.row, self.end, self.age)

    def last(self, length: int, room: int) -> tuple[Tape, ...]:
        """Copies of the last entries before n moments: ``length`` of them, or all if the tapes are shorter."""
        length = min(length, self.tapes[0].used)
        return tuple(tape.copy(self.row, self.end, length, room) for tape in self.tapes)

    def extendable(self, length: int, new: int) -> tuple[Tape, ...]:
        """Tapes with at least the last ``length`` entries (or all) and room for ``new`` more.

        These are the tapes themselves if no one else has gone on from here, and if no gradient needs them as they are.
        """
        if th.is_grad_enabled():
            return self.last(length, new)
        if all(t.used == self.tip and t.used + new <= t.data.shape[3] for t in self.tapes):
            return self.tapes
        return self.last(length, new + self.spare)
