"""Sequence models: how the deterministic state moves. A new one is a class and a line in ``SEQUENCE_MODELS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import sample_onehot, straight_through, unimix_probs
from sb3_dreamer.nets.layers import (
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
    fast_tanh,
    norm_silu,
    to_autocast_dtype,
    trunc_normal_,
)
from sb3_dreamer.types import Size
from sb3_dreamer.world_model.context import Cache, Context, KeyValues
from sb3_dreamer.world_model.scan import FilterScan, Weights, by_block

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
        """See :meth:`SequenceModel.filter`.

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


def clip_to_unit(action: th.Tensor) -> th.Tensor:
    """Actions beyond [-1, 1] scaled onto it, with the gradient of the scaled action (paper's code): (..., A)."""
    return action / action.abs().clamp(min=1.0).detach()


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
        """See :meth:`SequenceModel.filter`."""
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


SEQUENCE_MODELS: dict[str, type[BlockGRU] | type[Transformer]] = {"gru": BlockGRU, "transformer": Transformer}
