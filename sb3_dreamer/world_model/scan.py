"""Filtering a batch of sequences with the block GRU, forward and backward written out.

The loop over time is the one part of training that no batching can avoid, and with a batch of 16 it costs kernel
launches, not arithmetic. So its backward pass is written by hand: inside the loop only the gradients of activations
flow; every derivative that does not depend on the flowing gradient, and every weight gradient, is computed for all
entries at once, outside. Plain autograd over ``RSSM.observe_step`` gives the same numbers; the tests hold it to that::

    forward, t = 0 .. T-1                                   backward, t = T-1 .. 0
    h', z'  = keep * (h, z)                                 dz -> logits -> dy -> posterior -> dh
    x0, x1  = f(h' Wd), f(z' Wz)          f = SiLU(RMSNorm)  dh -> gates -> dx -> hidden
    x       = f(drive + [x0, x1] Ws + h' Wo)                     -> dx0, dx1, dh', dz'
    r, c, u = x Wg;  h = h' + sig(u-1) (tanh(sig(r) c) - h')
    z ~ softmax(f(seen + h Wp) Wl)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
import torch.nn.functional as F

from sb3_dreamer.nets.distributions import UNIMIX, sample_onehot_with, unimix_probs
from sb3_dreamer.nets.layers import RMSNorm, fast_tanh


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


class Tape(NamedTuple):
    """What the forward pass leaves for the backward pass, all (T, B, .)."""

    h: th.Tensor  # masked h_{t-1}
    z: th.Tensor  # masked z_{t-1}
    deter_a: th.Tensor  # products before each norm
    stoch_a: th.Tensor
    inputs: th.Tensor  # [x0, x1]
    hidden_a: th.Tensor
    x: th.Tensor
    gates: th.Tensor
    deter: th.Tensor  # h_t
    post_a: th.Tensor
    y: th.Tensor
    logits: th.Tensor
    stoch: th.Tensor  # z_t


def norm_silu(a: th.Tensor, gain: th.Tensor) -> th.Tensor:
    """SiLU(RMSNorm(a))."""
    return F.silu(F.rms_norm(a, gain.shape, gain, RMSNorm.eps))


class NormSiluGrad:
    """Derivatives of :func:`norm_silu` for all entries at once; :meth:`at` applies them to the gradient of one."""

    def __init__(self, a: th.Tensor, gain: th.Tensor) -> None:
        self.rstd = (a.square().mean(-1, keepdim=True) + RMSNorm.eps).rsqrt_()
        self.normed = a * self.rstd
        v = self.normed * gain
        s = th.sigmoid(v)
        self.slope = s.addcmul(v * s, 1 - s)  # dSiLU/dv
        self.slope_gain = self.slope * gain
        self.by_entry = list(zip(self.slope_gain, self.normed, self.normed / a.shape[-1], self.rstd, strict=True))

    def at(self, t: int, dy: th.Tensor, out: th.Tensor) -> th.Tensor:
        """Gradient with respect to ``a[t]``, written to ``out``."""
        slope_gain, normed, scaled, rstd = self.by_entry[t]
        dn = dy * slope_gain
        along = (dn * scaled).sum(-1, keepdim=True)
        return th.mul(th.addcmul(dn, normed, along, value=-1), rstd, out=out)

    def gain_grad(self, dy: th.Tensor) -> th.Tensor:
        """Gradient with respect to the gain, from dy of all entries."""
        return (dy * self.slope * self.normed).sum((0, 1))


class FilterScan(th.autograd.Function):
    """``(noise, keep, h_{-1}, z_{-1}, drive, seen, *weights) -> (h, z, logits)``, time first.

    :param noise: (T, B, 1, S) uniform numbers in [0, 1) that pick the classes.
    :param keep: (T, B, 1) 0 where an episode starts, else 1.
    :param deter0: (B, D); stoch0: (B, K * S). No gradient flows to these.
    :param drive: (T, B, D) the hidden layer's part that is known beforehand.
    :param seen: (T, B, hidden) the posterior's part that is known beforehand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        noise: th.Tensor,
        keep: th.Tensor,
        deter0: th.Tensor,
        stoch0: th.Tensor,
        drive: th.Tensor,
        seen: th.Tensor,
        *weights: th.Tensor,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        w = Weights(*weights)
        length, batch, width = drive.shape
        hidden, z_width, blocks = w.deter_w.shape[0], stoch0.shape[-1], w.own.shape[0]
        widths = (width, z_width, hidden, hidden, 2 * hidden, width, width, 3 * width, width, hidden, hidden)
        tape = Tape(*(drive.new_empty(length, batch, n) for n in (*widths, z_width, z_width)))
        deter, stoch = deter0, stoch0
        for now, keep_t, noise_t, drive_t, seen_t in zip(steps(tape), keep, noise, drive, seen, strict=True):
            h, z = th.mul(deter, keep_t, out=now.h), th.mul(stoch, keep_t, out=now.z)
            now.inputs[:, :hidden] = norm_silu(th.addmm(w.deter_b, h, w.deter_w.t(), out=now.deter_a), w.deter_g)
            now.inputs[:, hidden:] = norm_silu(th.addmm(w.stoch_b, z, w.stoch_w.t(), out=now.stoch_a), w.stoch_g)
            th.add(th.addmm(drive_t, now.inputs, w.shared), block_product(h, w.own), out=now.hidden_a)
            now.x.copy_(norm_silu(now.hidden_a, w.hidden_g))
            th.add(block_product(now.x, w.gates_w), w.gates_b, out=now.gates)
            reset, candidate, update = now.gates.view(batch, blocks, 3, -1).unbind(2)
            candidate = fast_tanh(th.sigmoid(reset) * candidate)
            deter = now.deter
            th.lerp(h.view_as(candidate), candidate, th.sigmoid(update - 1), out=deter.view_as(candidate))
            th.addmm(seen_t, deter, w.post_w.t(), out=now.post_a)
            now.y.copy_(norm_silu(now.post_a, w.post_g))
            th.addmm(w.logits_b, now.y, w.logits_w.t(), out=now.logits)
            probs = unimix_probs(now.logits.view(batch, -1, noise.shape[-1]), -2)
            stoch = now.stoch.copy_(sample_onehot_with(probs, noise_t, -2).flatten(1))
        ctx.save_for_backward(keep, *tape, *weights)
        ctx.stoch = noise.shape[-1]
        return tape.deter, tape.stoch, tape.logits

    @staticmethod
    def backward(ctx: Any, d_deter: th.Tensor, d_stoch: th.Tensor, d_logits: th.Tensor) -> tuple[th.Tensor | None, ...]:
        keep, *saved = ctx.saved_tensors
        tape, w = Tape(*saved[: len(Tape._fields)]), Weights(*saved[len(Tape._fields) :])
        grads = Tape(*(th.empty_like(x) for x in tape))  # gradients of what the tape holds, by the same names
        hidden, blocks = w.deter_w.shape[0], w.own.shape[0]
        deter_n = NormSiluGrad(tape.deter_a, w.deter_g)
        stoch_n = NormSiluGrad(tape.stoch_a, w.stoch_g)
        hidden_n = NormSiluGrad(tape.hidden_a, w.hidden_g)
        post_n = NormSiluGrad(tape.post_a, w.post_g)
        softmax = F.softmax(tape.logits.unflatten(-1, (-1, ctx.stoch)), -2)
        own_t, gates_t, shared_t = w.own.transpose(1, 2), w.gates_w.transpose(1, 2), w.shared.t()
        dh_next, dz_next = th.zeros_like(d_deter[0]), th.zeros_like(d_stoch[0])
        each = zip(steps(tape), steps(grads), keep, d_deter, d_stoch, d_logits, softmax, strict=True)
        for t, (now, grad, keep_t, d_deter_t, d_stoch_t, d_logits_t, probs) in reversed(list(enumerate(each))):
            # z_t to logits (straight through), posterior, h_t
            dz = (d_stoch_t + dz_next).view_as(probs)
            dl = probs * (dz - (dz * probs).sum(-2, keepdim=True))
            th.add(d_logits_t, dl.flatten(1), alpha=1 - UNIMIX, out=grad.logits)
            post_n.at(t, th.mm(grad.logits, w.logits_w, out=grad.y), out=grad.post_a)
            dh = th.addmm(d_deter_t + dh_next, grad.post_a, w.post_w)
            # h_t to gates, hidden layer, h_{t-1}, z_{t-1}
            dh = gates_backward(dh, now.gates, now.h, blocks, out=grad.gates)
            grad.x.copy_(block_product(grad.gates, gates_t))
            hidden_n.at(t, grad.x, out=grad.hidden_a)
            th.mm(grad.hidden_a, shared_t, out=grad.inputs)
            deter_n.at(t, grad.inputs[:, :hidden], out=grad.deter_a)
            stoch_n.at(t, grad.inputs[:, hidden:], out=grad.stoch_a)
            dh = th.addmm(dh, grad.deter_a, w.deter_w)
            dh_next = (dh + block_product(grad.hidden_a, own_t)) * keep_t
            dz_next = th.mm(grad.stoch_a, w.stoch_w) * keep_t

        weights = Weights(
            deter_w=outer(grads.deter_a, tape.h),
            deter_b=grads.deter_a.sum((0, 1)),
            deter_g=deter_n.gain_grad(grads.inputs[..., :hidden]),
            stoch_w=outer(grads.stoch_a, tape.z),
            stoch_b=grads.stoch_a.sum((0, 1)),
            stoch_g=stoch_n.gain_grad(grads.inputs[..., hidden:]),
            shared=outer(tape.inputs, grads.hidden_a),
            own=block_outer(tape.h, grads.hidden_a, blocks),
            hidden_g=hidden_n.gain_grad(grads.x),
            gates_w=block_outer(tape.x, grads.gates, blocks),
            gates_b=grads.gates.sum((0, 1)),
            post_w=outer(grads.post_a, tape.deter),
            post_g=post_n.gain_grad(grads.y),
            logits_w=outer(grads.logits, tape.y),
            logits_b=grads.logits.sum((0, 1)),
        )
        return None, None, None, None, grads.hidden_a, grads.post_a, *weights


def gates_backward(dh: th.Tensor, gates: th.Tensor, h: th.Tensor, blocks: int, out: th.Tensor) -> th.Tensor:
    """Through h_t = h' + sig(u-1) (tanh(sig(r) c) - h') of one entry.

    :param dh: (B, D) gradient of h_t.
    :param gates: (B, 3 D) what the gates were computed from: block by block r, c, u.
    :param h: (B, D) h'.
    :param out: (B, 3 D) gradient of ``gates``, written here.
    :return: (B, D) gradient of h' along the direct path.
    """
    reset, candidate, update = gates.view(len(h), blocks, 3, -1).unbind(2)
    d_reset, d_candidate, d_update = out.view(len(h), blocks, 3, -1).unbind(2)
    reset, update, dh = th.sigmoid(reset), th.sigmoid(update - 1), dh.view_as(reset)
    squashed, taken = fast_tanh(reset * candidate), dh * update
    carried = dh - taken
    dc = th.addcmul(taken, taken * squashed, squashed, value=-1) * reset
    d_candidate.copy_(dc)
    th.mul(dc * candidate, 1 - reset, out=d_reset)
    th.mul(carried * update, squashed - h.view_as(reset), out=d_update)
    return carried.reshape(h.shape)


def steps(tape: Tape) -> Iterator[Tape]:
    """The tape of one entry after the other: views (B, .)."""
    return map(Tape, *(x.unbind(0) for x in tape))


def block_product(x: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """Block-diagonal product: (B, G * i), (G, i, o) -> (B, G * o)."""
    return th.bmm(x.view(-1, weight.shape[0], weight.shape[1]).transpose(0, 1), weight).transpose(0, 1).flatten(1)


def outer(left: th.Tensor, right: th.Tensor) -> th.Tensor:
    """Sum over entries of outer products: (T, B, m), (T, B, n) -> (m, n)."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def block_outer(left: th.Tensor, right: th.Tensor, blocks: int) -> th.Tensor:
    """Block by block: (T, B, G * m), (T, B, G * n) -> (G, m, n)."""
    left, right = (x.flatten(0, 1).unflatten(-1, (blocks, -1)).transpose(0, 1) for x in (left, right))
    return th.bmm(left.transpose(1, 2), right)
