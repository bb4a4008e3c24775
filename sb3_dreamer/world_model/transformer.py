"""A sequence model with a longer memory: a causal transformer with a cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import sample_onehot, straight_through, unimix_probs
from sb3_dreamer.nets.layers import Dense, Linear, RMSNorm, clip_to_unit, trunc_normal_
from sb3_dreamer.types import Size
from sb3_dreamer.world_model.context import Cache, Context, KeyValues

if TYPE_CHECKING:
    from sb3_dreamer.world_model.rssm import State


class AttentionLayer(nn.Module):
    """Self-attention and a two-layer MLP, each on the normed input and added to it.

    Positions enter as a learned bias on the attention by head and by distance (Raffel et al. 2020), which starts from
    straight lines of different slope (Press et al. 2022): the same in a sequence and in a cache that slides.

    :param width: M.
    :param heads: how many.
    :param window: number of distances, 0 being the entry itself.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.query_key_value, self.attended = Linear(width, 3 * width), Linear(width, width)
        slopes = th.logspace(-8 / heads, -8, heads, base=2.0)
        self.bias = nn.Parameter(-slopes[:, None] * th.arange(window))
        self.mlp = nn.Sequential(Linear(width, 2 * width), nn.SiLU(), Linear(2 * width, width))

    def forward(self, x: th.Tensor, memory: KeyValues, distance: th.Tensor, seen: th.Tensor) -> th.Tensor:
        """One layer for T new entries that follow P old ones: (n, T, M) -> (n, T, M).

        Attention is computed in the dtype of the memory: on a CPU, bfloat16 is several times slower for single queries.

        :param memory: the old entries; the new ones are added.
        :param distance: (T, P + T) how far back from each new entry, within the window.
        :param seen: (n, 1, T, P + T) bool, what may be attended to.
        """
        query, *new = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.query_key_value(self.norm(x)).chunk(3, -1)
        )
        key, value = memory.append(th.stack(new))[:, :, :, -distance.shape[1] :]
        bias = self.bias[:, distance].masked_fill(~seen, -th.inf)
        with th.autocast(x.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(query.to(key.dtype), key, value, attn_mask=bias)
        x = x + self.attended(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Causal transformer over tokens (z_{t-1}, a_{t-1}); h_t is its output at the newest of them.

    Attention reaches ``window`` entries back at most and never across the start of an episode, in a sequence of the
    replay as in the cache of a single step: both are one and the same computation. About as many weights as the GRU.

    :param stoch_width: K * S.
    :param action_width: A.
    :param size: widths; M is twice ``hidden``, and there are as many heads as ``blocks``.
    :raises ValueError: if the heads do not divide M.
    """

    parallel = True
    window = 64  # the default batch_length: with shorter sequences, acting looks farther back than any update did
    layers = 2

    def __init__(self, stoch_width: int, action_width: int, size: Size) -> None:
        super().__init__()
        self.width, self.heads, self.stoch = 2 * size.hidden, size.blocks, size.stoch
        if self.width % self.heads:
            raise ValueError(
                f"hidden={size.hidden} and blocks={size.blocks} do not fit: each of the {size.blocks} heads takes an "
                f"equal share of 2 * hidden = {self.width}; make blocks a divisor of it"
            )
        self.context_width = 1 + self.layers * 2 * (self.window - 1) * self.width
        self.token = Linear(stoch_width + action_width, self.width)
        trunc_normal_(self.token.bias, 1)  # z = a = 0 where an episode starts, and a norm is steep at zero
        self.stack = nn.ModuleList(AttentionLayer(self.width, self.heads, self.window) for _ in range(self.layers))
        self.norm = RMSNorm(self.width)
        self.out = Dense(self.width, size.deter)

    def forward(
        self, deter: th.Tensor, stoch: th.Tensor, action: th.Tensor, context: Context
    ) -> tuple[th.Tensor, Context]:
        assert isinstance(context, Cache)
        age = context.age + 1
        h, memories, places = self.attend(stoch[:, None], action[:, None], age[:, None], context)
        row = th.arange(len(age), device=age.device)
        return h[:, 0], Cache(memories, row, places.expand_as(row), age, tip=memories[0].used)

    def filter(
        self,
        posterior: Dense,
        to_logits: Linear,
        embed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor,
        start: State,
    ) -> tuple[th.Tensor, th.Tensor, Context]:
        """See :meth:`~sb3_dreamer.world_model.sequence.SequenceModel.filter`."""
        assert isinstance(start.context, Cache)
        logits = to_logits(posterior(embed)).to(start.stoch.dtype)
        probs = unimix_probs(logits.unflatten(-1, (-1, self.stoch)), -2)
        stoch = straight_through(sample_onehot(probs, -2), probs).flatten(-2)
        before = th.cat([start.stoch[:, None], stoch[:, :-1]], 1) * ~is_first[..., None]
        number = th.arange(embed.shape[1], device=embed.device)
        began = th.where(is_first, number, -start.context.age[:, None]).cummax(1).values
        age = number - began + 1
        h, memories, places = self.attend(before, prev_action, age, start.context)
        row = th.arange(len(age), device=age.device)[:, None].expand_as(age)
        return th.cat([h, stoch], -1), logits, Cache(memories, row, places.expand_as(age), age)

    def attend(
        self, stoch: th.Tensor, action: th.Tensor, age: th.Tensor, before: Cache
    ) -> tuple[th.Tensor, tuple[KeyValues, ...], th.Tensor]:
        """T new entries after what n caches hold.

        :param stoch: (n, T, K * S) z_{t-1}.
        :param action: (n, T, A) a_{t-1}.
        :param age: (n, T) entries of the episode so far, the new one included.
        :param before: n caches.
        :return: h (n, T, D); memories with the new entries; the places (T,) after each of them.
        """
        length = age.shape[1]
        memories = before.extendable(self.window - 1, length)
        used = memories[0].used
        past = min(used, self.window - 1)
        place = th.arange(-past, length, device=age.device)
        distance = place[past:, None] - place
        seen = (distance >= 0) & (distance < age.clamp(max=self.window)[:, None, :, None])
        distance = distance.clamp(0, self.window - 1)
        x = self.token(th.cat([stoch, clip_to_unit(action)], -1)).to(self.norm.weight.dtype)
        for layer, memory in zip(self.stack, memories, strict=True):
            x = layer(x, memory, distance, seen)
        return self.out(self.norm(x)), memories, place[past:] + used + 1

    def pack(self, context: Context, like: th.Tensor) -> th.Tensor:
        """[age, the last keys and values of all layers], zeros where there are none."""
        assert isinstance(context, Cache)
        kept = th.stack([memory.data for memory in context.last(self.window - 1, room=0)])
        kept = F.pad(kept, (0, 0, self.window - 1 - kept.shape[4], 0)).movedim(2, 0)  # (n, layers, 2, H, window - 1, .)
        age = context.age.clamp(max=self.window)
        older = th.arange(self.window - 1, 0, -1, device=age.device) > age[:, None]
        kept = kept.masked_fill(older[:, None, None, None, :, None], 0.0)
        return th.cat([age[:, None], kept.flatten(1)], -1).to(like.dtype)

    def unpack(self, packed: th.Tensor) -> Context:
        """Inverse of :meth:`pack`; (n, 0) is unpacked to n fresh contexts."""
        n = packed.shape[0]
        age, kept = packed.tensor_split([1], -1)
        length = kept.shape[1] * (self.window - 1) // (self.context_width - 1)
        kept = kept.reshape(n, self.layers, 2, self.heads, length, self.width // self.heads).movedim(0, 2)
        row = th.arange(n, device=packed.device)
        memories = tuple(KeyValues(layer, length) for layer in kept)
        return Cache(memories, row, th.full_like(row, length), age.sum(-1).long())
