"""Filtering a batch of sequences with the block GRU, forward and backward written out.

The loop over time is the one part of training that no batching can avoid, and with a batch of 16 it costs kernel
launches and memory traffic, not arithmetic. So its backward pass is written by hand: in the loop only the gradients of
activations flow, on arrays small enough for the processor's cache; weight gradients are computed for all entries at
once, after it. On a GPU what happens to one entry is compiled. Plain autograd over ``RSSM.observe_step`` gives the same
numbers; the tests hold it to that::

    forward, t = 0 .. T-1                                   backward, t = T-1 .. 0
    s       = keep * [h, z]_{t-1}                           dz -> logits -> dy -> posterior -> dh
    x0, x1  = f(h' Wd), f(z' Wz)          f = SiLU(RMSNorm)  dh -> gates -> dx -> hidden
    x       = f(drive + [x0, x1] Ws + h' Wo)                     -> dx0, dx1 -> ds
    r, c, u = x Wg;  h = h' + sig(u-1) (tanh(sig(r) c) - h')
    z ~ softmax(f(seen + h Wp) Wl)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch as th
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from sb3_dreamer.nets.distributions import UNIMIX
from sb3_dreamer.nets.layers import compile_on_cuda, fast_tanh, norm_constants, norm_silu_backward, norm_silu_to

sigmoid_backward = th.ops.aten.sigmoid_backward.default


class Weights(NamedTuple):
    """Parameters of the recurrence. ``_w`` as in ``nn.Linear`` (out, in), ``_g`` the scale of the norm after it."""

    deter_w: th.Tensor
    deter_b: th.Tensor
    deter_g: th.Tensor
    stoch_w: th.Tensor
    stoch_b: th.Tensor
    stoch_g: th.Tensor
    shared: th.Tensor  # (2 hidden, D)
    own: th.Tensor  # (G, D/G, D/G)
    hidden_g: th.Tensor
    gates_w: th.Tensor  # (G, D/G, 3 D/G)
    gates_b: th.Tensor
    post_w: th.Tensor
    post_g: th.Tensor
    logits_w: th.Tensor
    logits_b: th.Tensor


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass, all (T, B, .); ``_u`` and ``_q`` of the norms."""

    before: th.Tensor  # masked [h, z]_{t-1}
    inputs_u: th.Tensor
    inputs_q: th.Tensor
    inputs: th.Tensor  # [x0, x1]
    x_u: th.Tensor
    x_q: th.Tensor
    x: th.Tensor
    reset: th.Tensor  # sig(r)
    candidate: th.Tensor  # c
    squashed: th.Tensor  # tanh(sig(r) c)
    update: th.Tensor  # sig(u-1)
    after: th.Tensor  # [h, z]_t
    y_u: th.Tensor
    y_q: th.Tensor
    y: th.Tensor
    logits: th.Tensor


class Gradients(NamedTuple):
    """What the backward pass leaves for the weights: (T, B, .) at the outputs of the layers."""

    inputs: th.Tensor
    hidden: th.Tensor
    gates: th.Tensor
    post: th.Tensor
    logits: th.Tensor


class FilterScan(th.autograd.Function):
    """``(kind, noise, keep, [h, z]_{-1}, drive, seen, *weights) -> ([h, z], logits)``, time first.

    :param kind: type of the products in the loop.
    :param noise: (T, B, 1, S) uniform numbers in [0, 1) that pick the classes.
    :param keep: (T, B, 1) 0 where an episode starts, else 1.
    :param start: (B, D + K * S). No gradient flows to it.
    :param drive: (T, B, D) the hidden layer's part that is known beforehand.
    :param seen: (T, B, hidden) the posterior's part that is known beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kind: th.dtype,
        noise: th.Tensor,
        keep: th.Tensor,
        start: th.Tensor,
        drive: th.Tensor,
        seen: th.Tensor,
        *weights: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        start, drive, seen, *weights = (x.detach() for x in (start, drive, seen, *weights))  # type: ignore[assignment]
        w = Weights(*weights)
        (length, batch, width), hidden, z_width, blocks = drive.shape, seen.shape[-1], len(w.logits_b), len(w.own)
        joint = width + z_width
        widths = (joint, 2 * hidden, 2, 2 * hidden, width, 1, *[width] * 5, joint, hidden, 1, hidden, z_width)
        saved = Saved(*(drive.new_empty(length, batch, n) for n in widths))
        input_g, hidden_g, post_g = gains(w)
        floor, wide_floor = (norm_constants(n, drive.dtype, drive.device)[0] for n in (hidden, width))
        input_w, input_b = input_layer(w).to(kind), th.cat([w.deter_b, w.stoch_b])
        shared_w, own_w, gates_w = w.shared.to(kind), w.own.to(kind), w.gates_w.to(kind)
        post_w, logits_w = (x.t().to(kind).contiguous() for x in (w.post_w, w.logits_w))
        gates_b = w.gates_b.view(blocks, 3, -1).clone()
        gates_b[:, 2] -= 1.0
        gates_b = gates_b.flatten(1)[:, None]

        def entry(
            now: Saved, state: th.Tensor, keep: th.Tensor, drive: th.Tensor, seen: th.Tensor, limit: th.Tensor
        ) -> None:
            h = th.mul(state, keep, out=now.before)[:, :width]
            inputs = affine(input_b, now.before, input_w).view(batch, 2, hidden)
            now.inputs.copy_(norm_silu_to(inputs, input_g, floor, now.inputs_u, now.inputs_q).flatten(1))
            shared, own = affine(drive, now.inputs, shared_w), product(by_block(h, blocks), own_w)
            x = shared.view(batch, blocks, -1).add(own.transpose(0, 1)).flatten(1)
            now.x.copy_(norm_silu_to(x, hidden_g, wide_floor, now.x_u, now.x_q))
            gates = affine(gates_b, by_block(now.x, blocks), gates_w).view(blocks, batch, 3, -1)
            r, c, u = (gate.transpose(0, 1).flatten(1) for gate in gates.unbind(2))
            now.candidate.copy_(c)
            now.squashed.copy_(fast_tanh(th.sigmoid(r, out=now.reset) * c))
            deter = th.lerp(h, now.squashed, th.sigmoid(u, out=now.update))
            now.y.copy_(norm_silu_to(affine(seen, deter, post_w), post_g, floor, now.y_u, now.y_q))
            now.logits.copy_(affine(w.logits_b, now.y, logits_w))
            now.after.copy_(th.cat([deter, draw(now.logits.view_as(limit), limit)], 1))

        if any(ctx.needs_input_grad):  # training; a few sequences of another size are not worth it
            entry = compile_on_cuda(drive.device)(entry)
        state, limits = start, class_limits(noise, z_width // noise.shape[-1])
        for now, *known in zip(steps(saved), keep, drive, seen, limits, strict=True):
            entry(now, state, *known)
            state = now.after
        ctx.save_for_backward(keep, *saved, *weights)
        ctx.kind, ctx.stoch = kind, noise.shape[-1]
        return saved.after, saved.logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_after: th.Tensor, d_logits: th.Tensor) -> tuple[th.Tensor | None, ...]:
        keep, *tensors = (x.detach() for x in ctx.saved_tensors)
        saved, w = Saved(*tensors[: len(Saved._fields)]), Weights(*tensors[len(Saved._fields) :])
        kind, stoch = ctx.kind, ctx.stoch
        (length, batch, width), hidden, blocks = saved.x.shape, saved.y.shape[-1], len(w.own)
        widths = (2 * hidden, width, 3 * width, hidden, len(w.logits_b))
        d = Gradients(*(saved.x.new_empty(length, batch, n) for n in widths))
        input_g, hidden_g, post_g = gains(w)
        d_input_g, d_hidden_g, d_post_g = (g.new_zeros(batch, *g.shape) for g in (input_g, hidden_g, post_g))
        post_w, logits_w = w.post_w.to(kind), w.logits_w.to(kind)
        own_w, gates_w = (x.transpose(1, 2).to(kind).contiguous() for x in (w.own, w.gates_w))
        shared_w, input_w = (x.t().to(kind).contiguous() for x in (w.shared, input_layer(w)))

        @compile_on_cuda(d_after.device)
        def entry(
            now: Saved, d: Gradients, carried: th.Tensor, keep: th.Tensor, d_after: th.Tensor, d_logits: th.Tensor
        ) -> th.Tensor:
            # z_t to logits (straight through), posterior, h_t
            d_state = d_after + carried
            dl = softmax_backward(d_state[:, width:], now.logits, stoch)
            th.add(d_logits, dl, alpha=1 - UNIMIX, out=d.logits)
            norm_silu_backward(product(d.logits, logits_w), post_g, now.y_u, now.y_q, d.post, d_post_g)
            dh = affine(d_state[:, :width], d.post, post_w)
            # h_t to gates, hidden layer, h_{t-1}, z_{t-1}
            d_gates, d_direct = gates_backward(dh, now, blocks)
            d.gates.copy_(d_gates)
            dx = product(by_block(d.gates, blocks), gates_w).transpose(0, 1).flatten(1)
            norm_silu_backward(dx, hidden_g, now.x_u, now.x_q, d.hidden, d_hidden_g)
            norm_silu_backward(product(d.hidden, shared_w), input_g, now.inputs_u, now.inputs_q, d.inputs, d_input_g)
            d_own = product(by_block(d.hidden, blocks), own_w).transpose(0, 1).flatten(1)
            d_before = product(d.inputs, input_w).to(d_after.dtype)
            d_before[:, :width].add_(d_own).add_(d_direct)
            return d_before.mul_(keep)

        carried = th.zeros_like(d_after[0])
        for now, d_now, *known in reversed([*zip(steps(saved), steps(d), keep, d_after, d_logits, strict=True)]):
            carried = entry(now, d_now, carried, *known)

        deter, before = saved.after[..., :width], saved.before[..., :width]
        d_bias = d.inputs.sum((0, 1))
        root, wide_root = (norm_constants(n, w.post_g.dtype, w.post_g.device)[1] for n in (hidden, width))
        d_inputs_g = d_input_g.sum(0) * root
        d_weights = Weights(
            deter_w=outer(d.inputs[..., :hidden], before),
            deter_b=d_bias[:hidden],
            deter_g=d_inputs_g[0],
            stoch_w=outer(d.inputs[..., hidden:], saved.before[..., width:]),
            stoch_b=d_bias[hidden:],
            stoch_g=d_inputs_g[1],
            shared=outer(saved.inputs, d.hidden),
            own=block_outer(before, d.hidden, blocks),
            hidden_g=d_hidden_g.sum(0) * wide_root,
            gates_w=block_outer(saved.x, d.gates, blocks),
            gates_b=d.gates.sum((0, 1)),
            post_w=outer(d.post, deter),
            post_g=d_post_g.sum(0) * root,
            logits_w=outer(d.logits, saved.y),
            logits_b=d.logits.sum((0, 1)),
        )
        return None, None, None, None, d.hidden, d.post, *d_weights


def gains(w: Weights) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Scales of the norms, times the root of their width: of the input layer (2, hidden), hidden (D,), posterior."""
    inputs = th.stack([w.deter_g, w.stoch_g])
    scaled = (g * norm_constants(g.shape[-1], g.dtype, g.device)[1] for g in (inputs, w.hidden_g, w.post_g))
    return tuple(scaled)  # type: ignore[return-value]


def affine(bias: th.Tensor, x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """``bias + x @ weight``, one matrix or one for each block, multiplied in the type of ``weight``."""
    if x.dtype == weight.dtype:
        return th.addmm(bias, x, weight) if x.ndim == 2 else th.baddbmm(bias, x, weight)
    return bias + product(x, weight)


def product(x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """``x @ weight``, in the type of ``weight``."""
    return x.to(weight.dtype) @ weight


def class_limits(noise: th.Tensor, classes: int) -> th.Tensor:
    """Where the cumulative softmax must reach for each class to be chosen, or one before it::

        noise < (1 - UNIMIX) cumulative_k + UNIMIX k / K        k = 1 .. K

    :param noise: (T, B, 1, S).
    :return: (T, B, K, S); that of the last class is below all that can be reached.
    """
    k = th.arange(1, classes + 1, device=noise.device, dtype=noise.dtype)[:, None]
    limits = (noise - UNIMIX / classes * k) / (1 - UNIMIX)
    limits[:, :, -1].fill_(-1.0)
    return limits


def draw(logits: th.Tensor, limit: th.Tensor) -> th.Tensor:
    """One-hot samples of the softmax with its uniform part, by inversion: (B, K, S), (B, K, S) -> (B, K * S)."""
    reached = th.empty_like(limit)
    th.lt(limit, F.softmax(logits, -2).cumsum_(-2), out=reached)  # 0 ... 0 1 ... 1 along K
    onehot = reached.clone()
    onehot[:, 1:].sub_(reached[:, :-1])
    return onehot.flatten(1)


def softmax_backward(d_probs: th.Tensor, logits: th.Tensor, stoch: int) -> th.Tensor:
    """Gradient of the probabilities (B, K * S) -> gradient of the logits (B, K * S)."""
    probs = F.softmax(logits.unflatten(-1, (-1, stoch)), -2)
    weighted = d_probs.view_as(probs) * probs
    return weighted.addcmul_(probs, weighted.sum(-2, keepdim=True), value=-1).flatten(1)


def gates_backward(dh: th.Tensor, now: Saved, blocks: int) -> tuple[th.Tensor, th.Tensor]:
    """Through h_t = h' + sig(u-1) (tanh(sig(r) c) - h') of one entry.

    :param dh: (B, D) gradient of h_t.
    :param now: what was saved of the entry.
    :return: (B, 3 D) gradients of r, c, u, block by block; (B, D) gradient of h' along the direct path.
    """
    taken = dh * now.update
    d_update = sigmoid_backward(dh * (now.squashed - now.before[:, : dh.shape[1]]), now.update)
    inner = th.addcmul(taken, taken * now.squashed, now.squashed, value=-1)  # at sig(r) c
    d_reset = sigmoid_backward(inner * now.candidate, now.reset)
    gates = (d_reset, inner * now.reset, d_update)
    return th.stack([d.unflatten(1, (blocks, -1)) for d in gates], 2).flatten(1), dh - taken


def input_layer(w: Weights) -> th.Tensor:
    """(D + K * S, 2 hidden): the layers that read h and z as one."""
    return th.block_diag(w.deter_w.t(), w.stoch_w.t())


Parts = TypeVar("Parts", Saved, Gradients)


def steps(parts: Parts) -> Iterator[Parts]:
    """One entry after the other: views (B, .)."""
    return map(type(parts), *(x.unbind(0) for x in parts))


def by_block(x: th.Tensor, blocks: int) -> th.Tensor:
    """A view, blocks first: (B, G * i) -> (G, B, i)."""
    return x.unflatten(1, (blocks, -1)).transpose(0, 1)


def outer(left: th.Tensor, right: th.Tensor) -> th.Tensor:
    """Sum over entries of outer products: (T, B, m), (T, B, n) -> (m, n)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def block_outer(left: th.Tensor, right: th.Tensor, blocks: int) -> th.Tensor:
    """Block by block: (T, B, G * m), (T, B, G * n) -> (G, m, n)."""
    left, right = (by_block(x.flatten(0, 1), blocks) for x in (left, right))
    return th.bmm(left.transpose(1, 2), right)
