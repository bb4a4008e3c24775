"""Numbers that follow the data, beside the weights."""

from __future__ import annotations

import torch as th
from torch import nn


class RunningStatistics(nn.Module):
    """Persistent buffers whose last change can be taken back: an update that is skipped leaves no trace."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, th.Tensor] = {}

    def snapshot(self) -> None:
        """Note the present values; to be called before they change."""
        self._before = {name: value.clone() for name, value in self.state_dict().items()}

    def rollback_unless(self, learned: th.Tensor) -> None:
        """Take what changed since :meth:`snapshot` back unless something was ``learned`` (() bool) from it."""
        for name, before in self._before.items():
            now = self.get_buffer(name)
            now.copy_(th.where(learned, now, before))
