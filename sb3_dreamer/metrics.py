"""Metrics of the updates, kept on the device until they are read: no update waits for the host."""

from __future__ import annotations

import torch as th

MAX_SKIPPED = 20


class Metrics:
    """Means of what the updates report, and a watch over the updates that were skipped.

    An update is skipped where its loss or a gradient is not finite; it counts in no mean.

    :param device: where the updates happen.
    """

    def __init__(self, device: th.device) -> None:
        self._updates = 0
        self._sums: th.Tensor | None = None  # of each metric, and how many
        self._skips = th.zeros(2, device=device)  # all, and in a row
        self._latest: dict[str, th.Tensor] = {}

    def add(self, metrics: dict[str, th.Tensor]) -> None:
        """Record the metrics of an update: name -> (), one of them "skipped_updates", 1 if nothing was learned.

        :raises ValueError: after many skipped ones in a row.
        """
        self._latest = metrics = dict(metrics)
        skipped = metrics.pop("skipped_updates").float()
        values = th.stack([*metrics.values(), 1 - skipped]).float()
        values = th.where(skipped.bool(), 0.0, values)
        self._sums = values if self._sums is None else self._sums + values
        self._skips = (self._skips + skipped) * th.stack([th.ones_like(skipped), skipped])
        self._updates += 1
        if self._updates % MAX_SKIPPED == 0:
            self._stop_if_stuck()

    def means(self) -> dict[str, float]:
        """The means since :meth:`reset`; those of skipped updates are not among them."""
        if self._sums is None:
            return {}
        *sums, count = self._sums.tolist()
        return {name: total / count for name, total in zip(self._latest, sums, strict=True)} if count else {}

    def reset(self) -> None:
        """Start a new averaging period."""
        self._sums = None

    def skips(self) -> int:
        """How many updates were skipped since this object was made."""
        return int(self._skips[0].item())

    def _stop_if_stuck(self) -> None:
        in_a_row = int(self._skips[1].item())
        if in_a_row < MAX_SKIPPED:
            return
        self._skips = self._skips * th.tensor([1.0, 0.0], device=self._skips.device)
        bad = [name for name, value in self._latest.items() if not value.isfinite().all()]
        raise ValueError(
            f"the last {in_a_row} updates were skipped, their loss or gradient was not finite "
            f"(not finite in the last: {', '.join(bad) or 'only the gradient'}). The parameters are those of the last "
            "good update, save() keeps them and save_replay_buffer() the data. Look for huge observations or rewards "
            "(VecNormalize scales both), or take a smaller learning_rate"
        )
