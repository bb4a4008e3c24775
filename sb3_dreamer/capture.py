"""One update as a CUDA graph: recorded once, then launched as a whole.

On a GPU an update is thousands of small kernels, and starting them from Python takes longer than running them. A graph
starts them all at once; it always reads the same batch and writes the same results::

    call        1 .. 3                     4                            5 ...
                run as it is               record, then replay          replay
    batch       each its own               copied into the graph's own, on the device
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch as th

from sb3_dreamer.types import Batch

Results = tuple[th.Tensor, dict[str, th.Tensor]]
Update = Callable[[Batch], Results]
Record = Callable[[Callable[[], Any]], Callable[[], None]]


def record_cuda_graph(work: Callable[[], Any]) -> Callable[[], None]:
    """Record what ``work`` launches, without running it; the result runs it."""
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph):
        work()
    return graph.replay


class CapturedUpdate:
    """Calls ``update``, as a graph where ``record`` can make one.

    What the update gives back belongs to the graph: the next call overwrites it. Whoever changes an object that the
    update works on, or a number that it read from Python, makes a new one of these.

    :param update: batch -> results; on the device alone, nothing in it waits for the host.
    :param record: turns work without arguments into a replay of it; None: always call ``update``.
    """

    calls_before = 3  # with each shape of batches: torch sets itself up and compiles, which a graph must not contain

    def __init__(self, update: Update, record: Record | None) -> None:
        self.update, self.record = update, record
        self.calls = 0
        self._like: Batch | None = None  # the first batch of these shapes
        self._batch: Batch | None = None  # the graph's own
        self._results: Results
        self._replay: Callable[[], None]

    def __call__(self, batch: Batch) -> Results:
        device = batch.reward.device
        with th.cuda.device(device) if device.type == "cuda" else nullcontext():  # a graph is of the current device
            return self._call(batch)

    def _call(self, batch: Batch) -> Results:
        if self.record is None:
            self.calls += 1
            return self.update(batch)
        if self._like is None or not same_shapes(self._like, batch):
            self._like, self._batch, self.calls = batch, None, 0
        self.calls += 1
        if self.calls <= self.calls_before:
            return self._on_the_side(batch)
        if self._batch is None:
            self._batch = map_tensors(th.clone, batch)
            try:
                self._replay = self.record(self._run)
            except BaseException:
                self._batch = None  # the next call records again
                raise
        else:
            map_tensors(lambda mine, given: mine.copy_(given), self._batch, batch)
        self._replay()
        return self._results

    def _run(self) -> None:
        assert self._batch is not None
        self._results = self.update(self._batch)

    def _on_the_side(self, batch: Batch) -> Results:
        """Outside of the default stream, where the gradients' kernels may be recorded later."""
        if batch.reward.device.type != "cuda":
            return self.update(batch)
        side, main = th.cuda.Stream(), th.cuda.current_stream()
        side.wait_stream(main)
        with th.cuda.stream(side):
            results = self.update(batch)
        main.wait_stream(side)
        return results


def map_tensors(function: Callable[..., th.Tensor], *batches: Batch) -> Batch:
    """A batch of what ``function`` makes of the tensors at the same place in each of the batches."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        parts = [getattr(batch, field.name) for batch in batches]
        if isinstance(parts[0], dict):
            fields[field.name] = {key: function(*(part[key] for part in parts)) for key in parts[0]}
        else:
            fields[field.name] = function(*parts) if isinstance(parts[0], th.Tensor) else parts[0]
    return Batch(**fields)


def same_shapes(one: Batch, other: Batch) -> bool:
    """Whether all tensors of two batches have the same shapes and types."""
    same: list[bool] = []

    def compare(mine: th.Tensor, given: th.Tensor) -> th.Tensor:
        same.append(mine.shape == given.shape and mine.dtype == given.dtype)
        return mine

    map_tensors(compare, one, other)
    return all(same)
