"""Latents that the model has refreshed, and that are written back into the replay."""

from __future__ import annotations

import numpy as np
import torch as th

from sb3_dreamer.replay.rings import Rings

FLOAT16_MAX = 65504.0


class PendingLatents:
    """Refreshed latents of sampled sequences, which are copied to the host as float16, clipped to its range.

    :param index: (B, 2) the ``index`` of the batch.
    :param latents: (B, T, L); the copy from a GPU is asynchronous.
    """

    def __init__(self, index: np.ndarray, latents: th.Tensor) -> None:
        half = latents.detach().clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        self._arrived = None
        if half.device.type == "cuda":
            half = th.empty(half.shape, dtype=half.dtype, pin_memory=True).copy_(half, non_blocking=True)
            self._arrived = th.cuda.Event()
            self._arrived.record()
        else:
            half = half.cpu()
        self._index, self._half = index, half

    @property
    def arriving(self) -> bool:
        """Whether :meth:`write` may have to wait."""
        return self._arrived is not None

    def write(self, stored: np.ndarray, rings: Rings) -> None:
        """Write them to the replay, except to entries that were overwritten since.

        :param stored: (n_envs * rows, L) the column of the latents.
        :param rings: where the entries lie.
        :raises ValueError: for NaN.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if not np.isfinite(self._half.sum(dtype=th.float32).item()):
            raise ValueError("latents hold NaN: the state of the model has diverged, nothing was written back")
        half = self._half.numpy()
        env, number = self._index[:, :1], self._index[:, 1:] + np.arange(half.shape[1])
        row, kept = rings.row(env, number), number >= rings.oldest()[env]
        if kept.all():
            stored[row] = half
        else:
            stored[row[kept]] = half[kept]
