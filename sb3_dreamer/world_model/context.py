"""What a sequence model remembers of a step besides h and z: nothing, or the keys and values that attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch as th

Index = th.Tensor | slice | tuple


class Context:
    """What a sequence model remembers of a step besides h and z. The base class remembers nothing."""

    def __getitem__(self, index: Index) -> Context:
        return self

    def flatten(self) -> Context:
        """(B, T) steps -> (B * T) steps."""
        return self

    def detach(self) -> Context:
        """The same values without gradient."""
        return self


class KeyValues:
    """Keys and values of one layer. What is written stays; new entries come after the last one.

    :param data: (2, rows, heads, places, width of a head); what lies after the entries in use is never read.
    :param used: entries in use.
    """

    def __init__(self, data: th.Tensor, used: int) -> None:
        self.data, self.used = data, used

    def append(self, new: th.Tensor) -> th.Tensor:
        """Write entries (2, rows, heads, T, .) in the dtype of the memory; return all entries in use."""
        end = self.used + new.shape[3]
        self.data[:, :, :, self.used : end] = new
        self.used = end
        return self.data[:, :, :, :end]

    def copy(self, row: th.Tensor, end: th.Tensor, length: int, room: int) -> KeyValues:
        """The ``length`` entries before n places, each on a row of its own, with room for more.

        Places before the first entry of a row hold arbitrary values; the mask hides them.
        """
        places = (end[:, None] + th.arange(-length, 0, device=end.device)).clamp(min=0)
        entries = self.data.transpose(2, 3)[:, row[:, None], places].transpose(2, 3)
        data = self.data.new_empty(*entries.shape[:3], length + room, entries.shape[4])
        data[:, :, :, :length] = entries
        return KeyValues(data, length)


@dataclass
class Cache(Context):
    """Keys and values of what led to some steps. Many steps may lie on one row::

        a row of a memory    k_0  k_1  k_2  k_3  k_4  k_5 ...
                                  |------ age -----|
                                                   end (excluded)

    The states of a training pass are places on B rows; only what is stepped from is ever copied out.

    :param memories: one for each layer.
    :param row: (...) the row of each step.
    :param end: (...) its place on that row.
    :param age: (...) entries of the episode so far; older ones are never attended to.
    :param tip: the common place of all steps if step i is the newest entry of row i for all i: then memories grow in
        place.
    """

    memories: tuple[KeyValues, ...]
    row: th.Tensor
    end: th.Tensor
    age: th.Tensor
    tip: int | None = None

    spare = 16  # extra places, so that not every step copies the window

    def __getitem__(self, index: Index) -> Cache:
        return Cache(self.memories, self.row[index], self.end[index], self.age[index])

    def flatten(self) -> Cache:
        """(B, T) steps -> (B * T) steps."""
        return Cache(self.memories, self.row.flatten(), self.end.flatten(), self.age.flatten())

    def detach(self) -> Cache:
        """The same values without gradient."""
        memories = tuple(
            KeyValues(memory.data[:, :, :, : memory.used].detach(), memory.used) for memory in self.memories
        )
        return Cache(memories, self.row, self.end, self.age)

    def last(self, length: int, room: int) -> tuple[KeyValues, ...]:
        """Copies of the last entries before n steps: ``length`` of them, or all if the memories are shorter."""
        length = min(length, self.memories[0].used)
        return tuple(memory.copy(self.row, self.end, length, room) for memory in self.memories)

    def extendable(self, length: int, new: int) -> tuple[KeyValues, ...]:
        """Memories with at least the last ``length`` entries (or all) and room for ``new`` more.

        These are the memories themselves if nothing else has been appended since and no gradient needs them unchanged.
        """
        if th.is_grad_enabled():
            return self.last(length, new)
        if all(t.used == self.tip and t.used + new <= t.data.shape[3] for t in self.memories):
            return self.memories
        return self.last(length, new + self.spare)
