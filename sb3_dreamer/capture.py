"""One update as a CUDA graph: recorded once, then launched as a whole.

On a GPU an update is thousands of small kernels, and starting them from Python takes longer than running them. A graph
starts them all at once; it always reads the same batch and writes the same results::

    call        1 .. 3                     4                            5 ...
                run as it is               record, then replay          replay
    batch       each its own               copied into the graph's own, on the device
"""

from __future__ import annotations

import copy
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

    The results belong to the graph; the next call overwrites them. Make a new CapturedUpdate whenever an object that
    the update uses is replaced or a Python number that it reads changes.

    :param update: batch -> results; on the device alone, nothing in it waits for the host.
    :param record: turns work without arguments into a replay of it; None: always call ``update``.
    """

    calls_before = 3  # with each shape of batches: torch sets itself up and compiles, which a graph must not contain

    def __init__(self, update: Update, record: Record | None) -> None:
        self.update, self.record = update, record
        self.calls = 0
        self._form: dict[str, tuple[th.Size, th.dtype]] = {}  # of the batches so far
        self._batch: Batch | None = None  # the graph's own
        self._results: Results | None = None
        self._replay: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type[CapturedUpdate], tuple[Update, Record | None]]:
        """A copy, which calls a copied model's ``update``, records a graph of its own."""
        return CapturedUpdate, (self.update, self.record)

    def __call__(self, batch: Batch) -> Results:
        device = batch.reward.device
        # a graph is recorded on the current device
        with th.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._call(batch)

    def _call(self, batch: Batch) -> Results:
        if self.record is None:
            self.calls += 1
            return self.update(batch)
        given = tensors(batch)
        if self._form != (form := {name: (x.shape, x.dtype) for name, x in given.items()}):
            self._form, self._batch, self.calls = form, None, 0
        self.calls += 1
        if self.calls <= self.calls_before:
            return self._on_the_side(batch)
        if self._batch is None:
            self._batch = copy.deepcopy(batch)
            try:
                self._replay = self.record(self._run)
            except BaseException:
                self._batch = None  # the next call records again
                raise
        else:
            for name, own in tensors(self._batch).items():
                own.copy_(given[name])
        assert self._replay is not None
        self._replay()
        assert self._results is not None
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


def tensors(batch: Batch) -> dict[str, th.Tensor]:
    """All tensors of a batch by name, those of a dictionary as "field/key"."""
    found = {}
    for field in dataclasses.fields(Batch):
        value = getattr(batch, field.name)
        parts = {f"{field.name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {}
        found.update(parts or {field.name: value})
    return {name: value for name, value in found.items() if isinstance(value, th.Tensor)}
