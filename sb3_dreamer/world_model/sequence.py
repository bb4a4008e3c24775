"""Sequence models: how the deterministic state moves. A new one is a class and a line in ``SEQUENCE_MODELS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch as th

from sb3_dreamer.nets.layers import Dense, Linear
from sb3_dreamer.world_model.context import Context
from sb3_dreamer.world_model.gru import BlockGRU
from sb3_dreamer.world_model.transformer import Transformer

if TYPE_CHECKING:
    from sb3_dreamer.world_model.rssm import State


class SequenceModel(Protocol):
    """The interface of sequence models: all that the rest of the package relies on.

    :param parallel: whether a sequence is filtered all at once. Then z_t is drawn before h_t is there: the posterior
        must not read h, and z and the context are all that the next step needs.
    :param context_width: floats of a packed context.
    """

    parallel: bool
    context_width: int

    def __call__(
        self, deter: th.Tensor, stoch: th.Tensor, action: th.Tensor, context: Context
    ) -> tuple[th.Tensor, Context]:
        """h_{t-1} (n, D), z_{t-1} (n, K * S), a_{t-1} (n, A), n contexts -> h_t (n, D), n contexts."""

    def filter(
        self,
        posterior: Dense,
        to_logits: Linear,
        embed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor,
        start: State,
    ) -> tuple[th.Tensor, th.Tensor, Context]:
        """Steps and samples of the posterior over whole sequences.

        :param posterior: reads [h_t, embedding], or the embedding alone if the model is ``parallel``.
        :param to_logits: from there to the logits of z_t.
        :param embed: (B, T, E).
        :param prev_action: (B, T, A), zero where ``is_first``.
        :param is_first: (B, T) bool.
        :param start: B states before the first entry.
        :return: [h, z] (B, T, D + K * S), z with the gradient of its probabilities; logits of z; contexts (B, T).
        """

    def pack(self, context: Context, like: th.Tensor) -> th.Tensor:
        """n contexts -> (n, context_width), in the dtype of ``like`` (n, .); zeros for the initial state."""

    def unpack(self, packed: th.Tensor) -> Context:
        """Inverse of :meth:`pack`; (n, 0) is unpacked to n fresh contexts."""


SEQUENCE_MODELS: dict[str, type[BlockGRU] | type[Transformer]] = {"gru": BlockGRU, "transformer": Transformer}
