"""Sequence models: how the deterministic state moves. A new one is a class and a line in ``SEQUENCE_MODELS``."""

from __future__ import annotations

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.layers import BlockLinear, Dense, RMSNorm, fast_tanh, trunc_normal_
from sb3_dreamer.types import Size


class BlockGRU(nn.Module):
    """Block-diagonal gated recurrent unit (paper, Methods "Model architecture").

    In the paper every block of the hidden layer reads its own share of h and, all blocks alike, the projections of
    (h, z, a). The part that all blocks share is one dense product here, the block's own part a block-diagonal one.

    :param stoch_width: K * S.
    :param action_width: A.
    :param size: widths.
    """

    def __init__(self, stoch_width: int, action_width: int, size: Size) -> None:
        super().__init__()
        self.width, self.blocks = size.deter, size.blocks
        self.from_deter = Dense(size.deter, size.hidden)
        self.from_stoch = Dense(stoch_width, size.hidden)
        self.from_action = Dense(action_width, size.hidden)
        fan_in = size.deter + size.blocks * 3 * size.hidden
        self.hidden_own = nn.Parameter(th.empty(size.blocks, size.deter // size.blocks, size.deter // size.blocks))
        self.hidden_shared = nn.Parameter(th.empty(3 * size.hidden, size.deter))
        self.hidden_bias = nn.Parameter(th.zeros(size.deter))
        trunc_normal_(self.hidden_own, fan_in)
        trunc_normal_(self.hidden_shared, fan_in)
        self.hidden_norm = RMSNorm(size.deter)
        self.gates = BlockLinear(size.deter, 3 * size.deter, size.blocks)

    def drive(self, action: th.Tensor) -> th.Tensor:
        """The part of the hidden layer that depends on the action alone: (..., A) -> (..., D)."""
        projected = self.from_action(action / action.abs().clamp(min=1.0).detach())
        hidden = projected.shape[-1]
        return th.matmul(projected, self.hidden_shared[2 * hidden :]) + self.hidden_bias

    def step(self, deter: th.Tensor, stoch: th.Tensor, drive: th.Tensor) -> th.Tensor:
        """h_{t-1} (n, D), z_{t-1} (n, K * S), :meth:`drive` of a_{t-1} (n, D) -> h_t (n, D)."""
        inputs = th.cat([self.from_deter(deter), self.from_stoch(stoch)], -1)
        shared = th.addmm(drive, inputs, self.hidden_shared[: inputs.shape[-1]])
        h = deter.view(-1, self.blocks, self.width // self.blocks).transpose(0, 1)  # (n, D) -> (G, n, D/G)
        own = th.bmm(h, self.hidden_own).transpose(0, 1).reshape(deter.shape)
        x = F.silu(self.hidden_norm(shared + own))
        reset, candidate, update = self.gates.by_block(x).to(deter.dtype).chunk(3, -1)
        candidate = fast_tanh(th.sigmoid(reset) * candidate)
        return th.lerp(h, candidate, th.sigmoid(update - 1)).transpose(0, 1).reshape(deter.shape)

    def recurrent_weights(self) -> tuple[th.Tensor, ...]:
        """The first eleven of :class:`~sb3_dreamer.world_model.scan.Weights`."""
        deter, stoch = self.from_deter, self.from_stoch
        return (
            *(deter.linear.weight, deter.linear.bias, deter.norm.weight),
            *(stoch.linear.weight, stoch.linear.bias, stoch.norm.weight),
            *(self.hidden_shared[: -self.from_action.linear.out_features], self.hidden_own, self.hidden_norm.weight),
            *(self.gates.weight, self.gates.bias),
        )


SEQUENCE_MODELS: dict[str, type[BlockGRU]] = {"gru": BlockGRU}
