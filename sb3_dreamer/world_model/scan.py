"""Filtering a batch of sequences with the block GRU, forward and backward written out.

The loop over time is the one part of training that no batching can avoid, and with a batch of 16 it costs kernel
launches and memory traffic, not arithmetic. So its backward pass is written by hand: in the loop only the gradients of
activations flow, on arrays small enough for the processor's cache; weight gradients are computed for all entries at
once, after it. Plain autograd over ``RSSM.observe_step`` gives the same numbers; the tests hold it to that::

    forward, t = 0 .. T-1                                   backward, t = T-1 .. 0
    s       = keep * [h, z]_{t-1}                           dz -> logits -> dy -> posterior -> dh
    x0, x1  = f(h' Wd), f(z' Wz)          f = SiLU(RMSNorm)  dh -> gates -> dx -> hidden
    x       = f(drive + [x0, x1] Ws + h' Wo)                     -> dx0, dx1 -> ds
    r, c, u = x Wg;  h = h' + sig(u-1) (tanh(sig(r) c) - h')
    z ~ softmax(f(seen + h Wp) Wl)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
import torch.nn.functional as F

from sb3_dreamer.nets.distributions import UNIMIX
from sb3_dreamer.nets.layers import fast_tanh, norm_constants, silu_backward

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
    """What the forward pass leaves for the backward pass, all (T, B, .)."""

    before: th.Tensor  # masked [h, z]_{t-1}
    inputs: th.Tensor  # [x0, x1]
    x: th.Tensor
    reset: th.Tensor  # sig(r)
    candidate: th.Tensor  # c
    squashed: th.Tensor  # tanh(sig(r) c)
    update: th.Tensor  # sig(u-1)
    after: th.Tensor  # [h, z]_t
    y: th.Tensor
    logits: th.Tensor


class NormSiluByEntry:
    """:class:`~sb3_dreamer.nets.layers.NormSilu` entry by entry: forward in any order, then backward.

    With q = sqrt(|a|^2 + n eps) the norm is v = g a / q sqrt(n), and da = (du - (du . u) u) / q where u = a / q.

    :param shape: (T, B, ..., n) of a.
    :param gain: g, (..., n).
    """

    def __init__(self, shape: tuple[int, ...], gain: th.Tensor) -> None:
        self.floor, self.root = norm_constants(shape[-1], gain.dtype)
        self.gain = gain * self.root
        self.unit, self.length = gain.new_empty(shape), gain.new_empty(*shape[:-1], 1)
        self.units, self.lengths = self.unit.unbind(0), self.length.unbind(0)
        self._gain_grad = th.zeros_like(self.units[0])

    def forward(self, t: int, a: th.Tensor) -> th.Tensor:
        """a of entry t -> SiLU(RMSNorm(a))."""
        q = th.hypot(th.linalg.vector_norm(a, 2, -1, True), self.floor, out=self.lengths[t])
        return F.silu(th.div(a, q, out=self.units[t]) * self.gain)

    def backward(self, t: int, dy: th.Tensor, out: th.Tensor) -> th.Tensor:
        """Gradient of the output of entry t -> gradient of a, written to ``out``."""
        unit = self.units[t]
        dv = silu_backward(dy, unit * self.gain)
        self._gain_grad.addcmul_(dv, unit)
        du = dv * self.gain
        along = th.linalg.vecdot(du, unit).unsqueeze(-1)
        return th.div(du.addcmul_(unit, along, value=-1), self.lengths[t], out=out)

    def gain_grad(self) -> th.Tensor:
        """Gradient of the gain, once all entries have gone backward; then another backward pass may begin."""
        grad = self._gain_grad.sum(0) * self.root
        self._gain_grad.zero_()
        return grad


class FilterScan(th.autograd.Function):
    """``(noise, keep, [h, z]_{-1}, drive, seen, *weights) -> ([h, z], logits)``, time first.

    :param noise: (T, B, 1, S) uniform numbers in [0, 1) that pick the classes.
    :param keep: (T, B, 1) 0 where an episode starts, else 1.
    :param start: (B, D + K * S). No gradient flows to it.
    :param drive: (T, B, D) the hidden layer's part that is known beforehand.
    :param seen: (T, B, hidden) the posterior's part that is known beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        noise: th.Tensor,
        keep: th.Tensor,
        start: th.Tensor,
        drive: th.Tensor,
        seen: th.Tensor,
        *weights: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor]:
        w = Weights(*weights)
        (length, batch, width), hidden, z_width, blocks = drive.shape, seen.shape[-1], len(w.logits_b), len(w.own)
        joint = width + z_width
        widths = (joint, 2 * hidden, width, width, width, width, width, joint, hidden, z_width)
        saved = Saved(*(drive.new_empty(length, batch, n) for n in widths))
        input_n = NormSiluByEntry((length, batch, 2, hidden), th.stack([w.deter_g, w.stoch_g]))
        hidden_n = NormSiluByEntry((length, batch, width), w.hidden_g)
        post_n = NormSiluByEntry((length, batch, hidden), w.post_g)
        input_w, input_b = input_layer(w), th.cat([w.deter_b, w.stoch_b])
        post_w, logits_w = w.post_w.t().contiguous(), w.logits_w.t().contiguous()
        gates_b = w.gates_b.view(blocks, 3, -1).clone()
        gates_b[:, 2] -= 1.0
        gates_b = gates_b.flatten(1)[:, None]
        limits = class_limits(noise, z_width // noise.shape[-1])
        state = start
        for t, (now, keep_t, drive_t, seen_t, limit) in enumerate(
            zip(steps(saved), keep, drive, seen, limits, strict=True)
        ):
            h = th.mul(state, keep_t, out=now.before)[:, :width]
            inputs = input_n.forward(t, th.addmm(input_b, now.before, input_w).view(batch, 2, hidden))
            now.inputs.view(batch, 2, hidden).copy_(inputs)
            shared, own = th.addmm(drive_t, now.inputs, w.shared), th.bmm(by_block(h, blocks), w.own)
            now.x.copy_(hidden_n.forward(t, by_block(shared, blocks).add_(own).transpose(0, 1).flatten(1)))
            gates = th.baddbmm(gates_b, by_block(now.x, blocks), w.gates_w)
            r, c, u = gates.view(blocks, batch, 3, -1).unbind(2)
            reset, candidate, squashed, update, deter = (
                by_block(x, blocks) for x in (now.reset, now.candidate, now.squashed, now.update, now.after[:, :width])
            )
            th.mul(th.sigmoid(r, out=reset), candidate.copy_(c), out=squashed)
            squashed.copy_(fast_tanh(squashed))
            th.lerp(by_block(h, blocks), squashed, th.sigmoid(u, out=update), out=deter)
            now.y.copy_(post_n.forward(t, th.addmm(seen_t, now.after[:, :width], post_w)))
            th.addmm(w.logits_b, now.y, logits_w, out=now.logits)
            draw(now.logits.view_as(limit), limit, out=now.after[:, width:].unflatten(1, limit.shape[1:]))
            state = now.after
        ctx.save_for_backward(keep, *saved, *weights)
        ctx.norms = input_n, hidden_n, post_n
        ctx.stoch = noise.shape[-1]
        return saved.after, saved.logits

    @staticmethod
    def backward(ctx: Any, d_after: th.Tensor, d_logits: th.Tensor) -> tuple[th.Tensor | None, ...]:
        keep, *tensors = ctx.saved_tensors
        saved, w = Saved(*tensors[: len(Saved._fields)]), Weights(*tensors[len(Saved._fields) :])
        input_n, hidden_n, post_n = ctx.norms
        (length, batch, width), hidden, blocks = saved.x.shape, saved.y.shape[-1], len(w.own)
        d_input, d_hidden, d_post, d_draw = map(th.empty_like, (saved.inputs, saved.x, saved.y, saved.logits))
        d_gates = saved.x.new_empty(length, batch, 3 * width)
        own_t, gates_t = (x.transpose(1, 2).contiguous() for x in (w.own, w.gates_w))
        shared_t, input_t = w.shared.t().contiguous(), input_layer(w).t().contiguous()
        carried = th.zeros_like(d_after[0])
        each = zip(steps(saved), keep, d_after, d_logits, strict=True)
        for t, (now, keep_t, d_after_t, d_logits_t) in reversed(list(enumerate(each))):
            # z_t to logits (straight through), posterior, h_t
            d_state = d_after_t + carried
            dl = softmax_backward(d_state[:, width:], now.logits, ctx.stoch)
            th.add(d_logits_t, dl, alpha=1 - UNIMIX, out=d_draw[t])
            post_n.backward(t, th.mm(d_draw[t], w.logits_w), out=d_post[t])
            dh = th.addmm(d_state[:, :width], d_post[t], w.post_w)
            # h_t to gates, hidden layer, h_{t-1}, z_{t-1}
            dh = gates_backward(dh, now, blocks, out=d_gates[t])
            dx = th.bmm(by_block(d_gates[t], blocks), gates_t).transpose(0, 1).flatten(1)
            hidden_n.backward(t, dx, out=d_hidden[t])
            d_inputs = th.mm(d_hidden[t], shared_t).view(batch, 2, hidden)
            input_n.backward(t, d_inputs, out=d_input[t].view(batch, 2, hidden))
            carried = th.mm(d_input[t], input_t)
            d_own = th.bmm(by_block(d_hidden[t], blocks), own_t)
            by_block(carried[:, :width], blocks).add_(d_own).add_(dh)
            carried.mul_(keep_t)

        deter, before = saved.after[..., :width], saved.before[..., :width]
        d_input_bias, d_input_gain = d_input.sum((0, 1)), input_n.gain_grad()
        weights = Weights(
            deter_w=outer(d_input[..., :hidden], before),
            deter_b=d_input_bias[:hidden],
            deter_g=d_input_gain[0],
            stoch_w=outer(d_input[..., hidden:], saved.before[..., width:]),
            stoch_b=d_input_bias[hidden:],
            stoch_g=d_input_gain[1],
            shared=outer(saved.inputs, d_hidden),
            own=block_outer(before, d_hidden, blocks),
            hidden_g=hidden_n.gain_grad(),
            gates_w=block_outer(saved.x, d_gates, blocks),
            gates_b=d_gates.sum((0, 1)),
            post_w=outer(d_post, deter),
            post_g=post_n.gain_grad(),
            logits_w=outer(d_draw, saved.y),
            logits_b=d_draw.sum((0, 1)),
        )
        return None, None, None, d_hidden, d_post, *weights


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


def draw(logits: th.Tensor, limit: th.Tensor, out: th.Tensor) -> None:
    """One-hot samples of the softmax with its uniform part, by inversion: (B, K, S), (B, K, S) -> ``out``."""
    reached = th.empty_like(limit)
    th.lt(limit, F.softmax(logits, -2).cumsum_(-2), out=reached)  # 0 ... 0 1 ... 1 along K
    out.copy_(reached)
    out[:, 1:].sub_(reached[:, :-1])


def softmax_backward(d_probs: th.Tensor, logits: th.Tensor, stoch: int) -> th.Tensor:
    """Gradient of the probabilities (B, K * S) -> gradient of the logits (B, K * S)."""
    probs = F.softmax(logits.unflatten(-1, (-1, stoch)), -2)
    weighted = d_probs.view_as(probs) * probs
    return weighted.addcmul_(probs, weighted.sum(-2, keepdim=True), value=-1).flatten(1)


def gates_backward(dh: th.Tensor, now: Saved, blocks: int, out: th.Tensor) -> th.Tensor:
    """Through h_t = h' + sig(u-1) (tanh(sig(r) c) - h') of one entry.

    :param dh: (B, D) gradient of h_t.
    :param now: what was saved of the entry.
    :param out: (B, 3 D) gradients of r, c, u, block by block, written here.
    :return: (G, B, D/G) gradient of h' along the direct path.
    """
    d_reset, d_candidate, d_update = out.view(len(dh), blocks, 3, -1).unbind(2)
    h = now.before[:, : dh.shape[1]]
    taken = dh * now.update
    d_update.copy_(sigmoid_backward(dh * (now.squashed - h), now.update).view_as(d_update))
    inner = th.addcmul(taken, taken * now.squashed, now.squashed, value=-1)  # at sig(r) c
    d_candidate.copy_((inner * now.reset).view_as(d_candidate))
    d_reset.copy_(sigmoid_backward(inner * now.candidate, now.reset).view_as(d_reset))
    return by_block(dh - taken, blocks)


def input_layer(w: Weights) -> th.Tensor:
    """(D + K * S, 2 hidden): the layers that read h and z as one."""
    return th.block_diag(w.deter_w.t(), w.stoch_w.t())


def steps(saved: Saved) -> Iterator[Saved]:
    """What was saved, one entry after the other: views (B, .)."""
    return map(Saved, *(x.unbind(0) for x in saved))


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
