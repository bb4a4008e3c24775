"""Data classes, and the conventions for shapes and time that all modules share. Read this first.

Dimension key, used in every shape comment::

    B  sequences in a batch          T  entries of a sequence
    N  imagined trajectories         H  imagination horizon
    A  width of an encoded action    F  width of the model features (D + K * S)
    D  deterministic state           S  categorical latents, K classes each
    L  width of replayed latents     P  width of a packed state, which ``predict`` carries
    E  width of an embedding         M  width of the transformer
    G  blocks of a layer             n  any number of rows
    (...)  any leading dimensions    C, H, W  channels, height and width of an image

Time. Entry ``t`` holds what belongs to one moment, and the model at ``t`` is given the action *before* it::

    entry        0          1          2         ...  n (last)
    observation  o_0        o_1        o_2            o_n
    reward       0          r_1        r_2            r_n        r_t came WITH o_t
    is_first     1          0          0              0
    is_last      0          0          0              1          is_terminal too, unless it was a time limit
    action       a_0        a_1        a_2            0          a_t was chosen AFTER seeing o_t
    prev_action  0          a_0        a_1            a_{n-1}    what moved the world from t-1 to t
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch as th

Kind = Literal["vector", "image", "discrete", "binary"]
Observation = np.ndarray | dict[str, np.ndarray]  # one or many, as environments give them


@dataclass(frozen=True)
class Spec:
    """What the networks need to know of one observation or action space.

    :param kind: "vector" (floats; actions scaled to [-1, 1]), "image" (uint8, channels first), "discrete" (one or
        more integers), or "binary" (zeros and ones).
    :param shape: shape of one raw element, without batch dimensions.
    :param classes: for "discrete" only, the number of values of each integer.
    :param start: for "discrete" only, the smallest value of each integer.
    """

    kind: Kind
    shape: tuple[int, ...]
    classes: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of floats once encoded: one-hot vectors for "discrete", the flat size otherwise."""
        return sum(self.classes) if self.kind == "discrete" else prod(self.shape)


@dataclass(frozen=True)
class Size:
    """Widths of the networks; named and chosen as in the paper (Nature 2025, Extended Data Table 3) and its code.

    :param deter: width D of the deterministic state.
    :param hidden: width of the layers inside the sequence model.
    :param classes: classes K of each categorical latent.
    :param units: width of the MLPs.
    :param depth: channels of the first image layer.
    :param stoch: number S of categorical latents.
    :param blocks: blocks of the block-diagonal recurrent weights.
    """

    deter: int
    hidden: int
    classes: int
    units: int
    depth: int
    stoch: int = 32
    blocks: int = 8


SIZES: dict[str, Size] = {
    "debug": Size(deter=32, hidden=8, classes=4, units=16, depth=2, stoch=4, blocks=4),
    "size1m": Size(deter=512, hidden=64, classes=4, units=64, depth=4),
    "size12m": Size(deter=2048, hidden=256, classes=16, units=256, depth=16),
    "size25m": Size(deter=3072, hidden=384, classes=24, units=384, depth=24),
    "size50m": Size(deter=4096, hidden=512, classes=32, units=512, depth=32),
    "size100m": Size(deter=6144, hidden=768, classes=48, units=768, depth=48),
    "size200m": Size(deter=8192, hidden=1024, classes=64, units=1024, depth=64),
}


@dataclass
class Batch:
    """``B`` sequences of ``T`` consecutive entries, as the replay serves them.

    :param obs: key -> (B, T, *shape) in the dtype of storage; a space that is no Dict has the single key "obs".
    :param prev_action: (B, T, A) a_{t-1}, encoded as floats; zero where ``is_first``.
    :param reward: (B, T) r_t, which came with o_t; zero where ``is_first``.
    :param is_first: (B, T) bool, the first entry of an episode: the state is reset here.
    :param is_terminal: (B, T) bool, the episode ended here for good.
    :param is_last: (B, T) bool, the last entry of an episode, terminal or cut short.
    :param start: (B, L) latents of the entry before the first one, zeros where there is none.
    :param index: (B, 2) where the sequences lie in the replay, to write refreshed states back.
    """

    obs: dict[str, th.Tensor]
    prev_action: th.Tensor
    reward: th.Tensor
    is_first: th.Tensor
    is_terminal: th.Tensor
    is_last: th.Tensor
    start: th.Tensor
    index: np.ndarray


@dataclass
class Dream:
    """``N`` imagined trajectories of ``H`` actions; all without gradient.

    :param features: (N, H+1, F) features of the start state and the H states after it.
    :param action: (N, H, A) the action taken at each state but the last.
    :param reward: (N, H+1) predicted reward r_t of the state itself; entry 0 is that of the start.
    :param discount: (N, H+1) predicted probability that the episode continues, times gamma.
    """

    features: th.Tensor
    action: th.Tensor
    reward: th.Tensor
    discount: th.Tensor
