"""The paper's sequence model: a block-diagonal GRU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.layers import (
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
    clip_to_unit,
    fast_tanh,
    norm_silu,
    to_autocast_dtype,
    trunc_normal_,
)
from sb3_dreamer.types import Size
from sb3_dreamer.world_model.context import Context
from sb3_dreamer.world_model.scan import FilterScan, Weights, by_block

if TYPE_CHECKING:
    from sb3_dreamer.world_model.rssm import State


class BlockGRU(nn.Module):
    """Block-diagonal gated recurrent unit (paper, Methods "Model architecture").

    In the paper every block of the hidden layer reads its own share of h and, all blocks alike, the projections of
    (h, z, a). The part that all blocks share is one dense product here, the block's own part a block-diagonal one.

    :param stoch_width: K * S.
    :param action_width: A.
    :param size: widths.
    """

    parallel = False
    context_width = 0

    def __init__(self, stoch_width: int, action_width: int, size: Size) -> None:
        super().__init__()
        self.width, self.blocks, self.stoch = size.deter, size.blocks, size.stoch
        self.from_deter = Dense(size.deter, size.hidden)
        self.from_stoch = Dense(stoch_width, size.hidden)
        self.from_action = Dense(action_width, size.hidden)
        fan_in = size.deter + size.blocks * 3 * size.hidden
        self.hidden_own = nn.Parameter(th.empty(size.blocks, size.deter // size.blocks, size.deter // size.blocks))
        self.hidden_shared = nn.Parameter(th.empty(2 * size.hidden, size.deter))
        self.hidden_action = Linear(size.hidden, size.deter)
        for weight in (self.hidden_own, self.hidden_shared, self.hidden_action.weight):
            trunc_normal_(weight, fan_in)
        self.hidden_norm = RMSNorm(size.deter)
        self.gates = BlockLinear(size.deter, 3 * size.deter, size.blocks)

    def drive(self, action: th.Tensor) -> th.Tensor:
        """The part of the hidden layer that depends on the action alone: (..., A) -> (..., D)."""
        return self.hidden_action(self.from_action(clip_to_unit(action)))

    def step(self, deter: th.Tensor, stoch: th.Tensor, drive: th.Tensor) -> th.Tensor:
        """h_{t-1} (n, D), z_{t-1} (n, K * S), :meth:`drive` of a_{t-1} (n, D) -> h_t (n, D)."""
        inputs = th.cat([self.from_deter(deter), self.from_stoch(stoch)], -1)
        shared = th.addmm(drive, inputs, self.hidden_shared)
        h = by_block(deter, self.blocks)
        x = th.baddbmm(by_block(shared, self.blocks), h, self.hidden_own).transpose(0, 1).reshape(deter.shape)
        x = norm_silu(x.to(self.hidden_norm.weight.dtype), self.hidden_norm.weight)
        reset, candidate, update = self.gates.by_block(x).to(deter.dtype).chunk(3, -1)
        candidate = fast_tanh(th.sigmoid(reset) * candidate)
        return th.lerp(h, candidate, th.sigmoid(update - 1)).transpose(0, 1).reshape(deter.shape)

    def forward(
        self, deter: th.Tensor, stoch: th.Tensor, action: th.Tensor, context: Context
    ) -> tuple[th.Tensor, Context]:
        return self.step(deter, stoch, self.drive(action)), context

    def filter(
        self,
        posterior: Dense,
        to_logits: Linear,
        embed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor,
        start: State,
    ) -> tuple[th.Tensor, th.Tensor, Context]:
        """See :meth:`~sb3_dreamer.world_model.sequence.SequenceModel.filter`.

        What does not depend on the recurrence (the action's drive, the embedding's share of the posterior) is
        computed for all entries at once.
        """
        keep = (~is_first).to(embed.dtype).t()[..., None]
        from_deter, from_embed = posterior.linear.weight.split([self.width, embed.shape[-1]], -1)
        drive = self.drive(prev_action.transpose(0, 1).contiguous())
        seen = F.linear(embed.transpose(0, 1).contiguous(), from_embed, posterior.linear.bias)
        noise = th.rand(*keep.shape, self.stoch, device=embed.device, dtype=embed.dtype)
        weights = self._scan_weights(from_deter, posterior.norm.weight, to_logits)
        drive, seen = drive.to(keep.dtype), seen.to(keep.dtype)
        # the loop's products are small: on a CPU bfloat16 gains nothing
        kind = to_autocast_dtype(keep[:0]).dtype if embed.is_cuda else keep.dtype
        with th.autocast(embed.device.type, enabled=False):
            features, logits = FilterScan.apply(kind, noise, keep, start.features, drive, seen, *weights)
        return features.transpose(0, 1), logits.transpose(0, 1), start.context

    def _scan_weights(self, post_w: th.Tensor, post_g: th.Tensor, to_logits: Linear) -> Weights:
        deter, stoch = self.from_deter, self.from_stoch
        return Weights(
            *(deter.linear.weight, deter.linear.bias, deter.norm.weight),
            *(stoch.linear.weight, stoch.linear.bias, stoch.norm.weight),
            *(self.hidden_shared, self.hidden_own, self.hidden_norm.weight),
            *(self.gates.weight, self.gates.bias),
            *(post_w, post_g, to_logits.weight, to_logits.bias),
        )

    def pack(self, context: Context, like: th.Tensor) -> th.Tensor:
        """Nothing: (n, 0)."""
        return like[..., :0]

    def unpack(self, packed: th.Tensor) -> Context:
        """Nothing."""
        return Context()
