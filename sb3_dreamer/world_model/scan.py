"""Filtering a batch of sequences with the block GRU, forward and backward written out.

The loop over time is the one part of training that no batching can avoid, and with a batch of 16 it costs kernel
launches, not arithmetic. So its backward pass is written by hand: inside the loop only the gradients of activations
flow; every derivative that does not depend on the flowing gradient, and every weight gradient, is computed for all
entries at once, outside. Plain autograd over ``RSSM.observe_step`` gives the same numbers, and the tests hold it to that::

    forward, t = 0 .. T-1                                   backward, t = T-1 .. 0
    h', z'  = keep * (h, z)                                 dz -> logits -> dy -> posterior -> dh
    x0, x1  = f(h' Wd), f(z' Wz)          f = SiLU(RMSNorm)  dh -> gates -> dx -> hidden
    x       = f(drive + [x0, x1] Ws + h' Wo)                     -> dx0, dx1, dh', dz'
    r, c, u = x Wg;  h = h' + sig(u-1) (tanh(sig(r) c) - h')
    z ~ softmax(f(seen + h Wp) Wl)
"""

from __future__ import annotations

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
        self.scaled = self.normed / a.shape[-1]

    def at(self, t: int, dy: th.Tensor, out: th.Tensor) -> th.Tensor:
        """Gradient with respect to ``a[t]``, written to ``out``."""
        dn = dy * self.slope_gain[t]
        along = (dn * self.scaled[t]).sum(-1, keepdim=True)
        return th.mul(th.addcmul(dn, self.normed[t], along, value=-1), self.rstd[t], out=out)

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
    def forward(  # type: ignore[override]
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
        for t in range(length):
            h, z = th.mul(deter, keep[t], out=tape.h[t]), th.mul(stoch, keep[t], out=tape.z[t])
            tape.inputs[t, :, :hidden] = norm_silu(th.addmm(w.deter_b, h, w.deter_w.t(), out=tape.deter_a[t]), w.deter_g)
            tape.inputs[t, :, hidden:] = norm_silu(th.addmm(w.stoch_b, z, w.stoch_w.t(), out=tape.stoch_a[t]), w.stoch_g)
            shared = th.addmm(drive[t], tape.inputs[t], w.shared)
            th.add(shared, block_product(h, w.own), out=tape.hidden_a[t])
            tape.x[t] = norm_silu(tape.hidden_a[t], w.hidden_g)
            th.add(block_product(tape.x[t], w.gates_w), w.gates_b, out=tape.gates[t])
            reset, candidate, update = tape.gates[t].view(batch, blocks, 3, -1).unbind(2)
            candidate = fast_tanh(th.sigmoid(reset) * candidate)
            deter = tape.deter[t]
            th.lerp(h.view_as(candidate), candidate, th.sigmoid(update - 1), out=deter.view_as(candidate))
            th.addmm(seen[t], deter, w.post_w.t(), out=tape.post_a[t])
            tape.y[t] = norm_silu(tape.post_a[t], w.post_g)
            logits = th.addmm(w.logits_b, tape.y[t], w.logits_w.t(), out=tape.logits[t])
            probs = unimix_probs(logits.view(batch, -1, noise.shape[-1]), -2)
            stoch = tape.stoch[t]
            stoch.copy_(sample_onehot_with(probs, noise[t], -2).view_as(stoch))
        ctx.save_for_backward(keep, *tape, *weights)
        ctx.stoch = noise.shape[-1]
        return tape.deter, tape.stoch, tape.logits

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_deter: th.Tensor, d_stoch: th.Tensor, d_logits: th.Tensor
    ) -> tuple[th.Tensor | None, ...]:
        keep, *saved = ctx.saved_tensors
        tape, w = Tape(*saved[: len(Tape._fields)]), Weights(*saved[len(Tape._fields) :])
        grads = Tape(*(th.empty_like(x) for x in tape))  # gradients of what the tape holds, by the same names
        length, batch, width = tape.h.shape
        hidden, blocks = w.deter_w.shape[0], w.own.shape[0]

        by_norm = [
            NormSiluGrad(a, g)
            for a, g in (
                (tape.deter_a, w.deter_g),
                (tape.stoch_a, w.stoch_g),
                (tape.hidden_a, w.hidden_g),
                (tape.post_a, w.post_g),
            )
        ]
        deter_n, stoch_n, hidden_n, post_n = by_norm
        softmax = F.softmax(tape.logits.view(length, batch, -1, ctx.stoch), -2)
        own_t, gates_t = w.own.transpose(1, 2), w.gates_w.transpose(1, 2)
        dh_next, dz_next = th.zeros_like(d_deter[0]), th.zeros_like(d_stoch[0])
        for t in range(length - 1, -1, -1):
            # z_t to logits (straight through), posterior, h_t
            dz = (d_stoch[t] + dz_next).view_as(softmax[t])
            along = (dz * softmax[t]).sum(-2, keepdim=True)
            dl = (softmax[t] * (dz - along)).view_as(d_logits[t])
            th.add(d_logits[t], dl, alpha=1 - UNIMIX, out=grads.logits[t])
            th.mm(grads.logits[t], w.logits_w, out=grads.y[t])
            post_n.at(t, grads.y[t], out=grads.post_a[t])
            dh = th.addmm(d_deter[t] + dh_next, grads.post_a[t], w.post_w)
            # h_t to gates, hidden layer, h_{t-1}, z_{t-1}
            dg = grads.gates[t].view(batch, blocks, 3, -1)
            slopes, carry = gate_derivatives(tape.gates[t], tape.h[t], blocks)
            th.mul(dh.view(batch, blocks, 1, -1), slopes, out=dg)
            grads.x[t] = block_product(grads.gates[t], gates_t)
            hidden_n.at(t, grads.x[t], out=grads.hidden_a[t])
            th.mm(grads.hidden_a[t], w.shared.t(), out=grads.inputs[t])
            deter_n.at(t, grads.inputs[t, :, :hidden], out=grads.deter_a[t])
            stoch_n.at(t, grads.inputs[t, :, hidden:], out=grads.stoch_a[t])
            dh = th.addmm(dh * carry, grads.deter_a[t], w.deter_w)
            dh_next = (dh + block_product(grads.hidden_a[t], own_t)) * keep[t]
            dz_next = th.mm(grads.stoch_a[t], w.stoch_w) * keep[t]

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


def gate_derivatives(gates: th.Tensor, h: th.Tensor, blocks: int) -> tuple[th.Tensor, th.Tensor]:
    """Of one entry: d h_t / d (reset, candidate, update), (B, G, 3, D/G), and d h_t / d h' directly, (B, D)."""
    reset, candidate, update = gates.view(len(h), blocks, 3, -1).unbind(2)
    reset, update = th.sigmoid(reset), th.sigmoid(update - 1)
    carry = 1 - update
    squashed = fast_tanh(reset * candidate)
    d_candidate = th.addcmul(update, update * squashed, squashed, value=-1) * reset
    d_reset = d_candidate * candidate * (1 - reset)
    d_update = (squashed - h.view_as(squashed)) * update * carry
    return th.stack([d_reset, d_candidate, d_update], 2), carry.view_as(h)


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
