"""Layers of the paper: RMSNorm and SiLU everywhere, truncated-normal weights, block-diagonal linear maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

import torch as th
import torch.nn.functional as F
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
silu_backward = th.ops.aten.silu_backward.default

# Standard deviation of a unit normal truncated to [-2, 2] is 1 / 1.1368.
TRUNCATION_GAIN = 1.1368


def trunc_normal_(weight: th.Tensor, fan_in: int, scale: float = 1.0) -> th.Tensor:
    """Fill with a normal truncated at two sigma, standard deviation ``scale / sqrt(fan_in)``, in place."""
    with th.no_grad():
        return nn.init.trunc_normal_(weight, 0.0, 1.0, -2.0, 2.0).mul_(scale * TRUNCATION_GAIN / math.sqrt(fan_in))


class Linear(nn.Linear):
    """``nn.Linear`` with the paper's initialization.

    :param scale: factor on the initial weights; 0 makes the layer predict exactly zero at the start.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(in_features, out_features)

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, self.in_features, self.scale)
        nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the last dimension with a learned scale (Zhang and Sennrich 2019)."""

    eps = 1e-4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.ones(width))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def norm_silu(x: th.Tensor, gain: th.Tensor) -> th.Tensor:
    """SiLU(RMSNorm(x)) over the last dimension, scaled by ``gain``: (..., n), (n,) -> (..., n)."""
    if x.is_cuda:
        return F.silu(F.rms_norm(x, gain.shape, gain, RMSNorm.eps))
    if th.is_grad_enabled():
        return NormSilu.apply(x, gain)
    floor, root = norm_constants(x.shape[-1], x.dtype, x.device)
    return F.silu((x / floored_length(x, floor).div_(root)).mul_(gain), inplace=True)


def floored_length(x: th.Tensor, floor: th.Tensor) -> th.Tensor:
    """sqrt(|x|^2 + floor^2) over the last dimension, (..., 1): torch's own norm is twice as many steps."""
    return th.linalg.vector_norm(x, 2, -1, True).hypot_(floor)


@cache
def norm_constants(n: int, dtype: th.dtype, device: th.device) -> tuple[th.Tensor, th.Tensor]:
    """sqrt(n eps) and sqrt(n), () each: dividing by a Python number is slower than by a tensor."""
    floor, root = th.tensor([(n * RMSNorm.eps) ** 0.5, n**0.5], dtype=dtype, device=device)
    return floor, root


class NormSilu(th.autograd.Function):
    """:func:`norm_silu` with a backward pass written out: torch's on a CPU is many small steps and takes twice as long.

    With q = sqrt(|x|^2 + n eps) and u = x / q the norm is v = u g sqrt(n), and dx = (du - (du . u) u) / q.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, gain: th.Tensor) -> th.Tensor:
        floor, root = norm_constants(x.shape[-1], x.dtype, x.device)
        gain = gain * root
        length = floored_length(x, floor)
        unit = x / length
        ctx.save_for_backward(unit, length, gain)
        return F.silu(unit * gain)

    @staticmethod
    def backward(ctx: Any, d_out: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        unit, length, gain = ctx.saved_tensors
        dv = silu_backward(d_out, unit * gain)
        d_gain = (dv * unit).flatten(0, -2).sum(0) * unit.shape[-1] ** 0.5
        du = dv.mul_(gain)
        along = th.linalg.vecdot(du, unit).unsqueeze(-1)
        return du.addcmul_(unit, along, value=-1).div_(length), d_gain


def norm_silu_to(a: th.Tensor, gain: th.Tensor, floor: th.Tensor, unit: th.Tensor, length: th.Tensor) -> th.Tensor:
    """Forward pass of :class:`NormSilu` that writes what :func:`norm_silu_backward` needs into given arrays.

    :param a: (B, ..., n).
    :param gain: g sqrt(n).
    :param floor: sqrt(n eps).
    :param unit: u is written here.
    :param length: q is written here.
    """
    unit, length = unit.view_as(a), length.view(*a.shape[:-1], 1)
    th.hypot(th.linalg.vector_norm(a, 2, -1, True), floor, out=length)
    return F.silu(th.div(a, length, out=unit) * gain)


def norm_silu_backward(
    dy: th.Tensor, gain: th.Tensor, unit: th.Tensor, length: th.Tensor, out: th.Tensor, d_gain: th.Tensor
) -> None:
    """Gradient of the output of :func:`norm_silu_to` -> gradient of a, to ``out``.

    :param d_gain: (B, ..., n), the gradient of ``gain`` is added to it, member by member; all take its shape.
    """
    unit, length = unit.view_as(d_gain), length.view(*d_gain.shape[:-1], 1)
    dv = silu_backward(dy.view_as(d_gain).to(unit.dtype), unit * gain)
    d_gain.addcmul_(dv, unit)
    du = dv.mul_(gain)
    along = th.linalg.vecdot(du, unit).unsqueeze(-1)
    th.div(du.addcmul_(unit, along, value=-1), length, out=out.view_as(d_gain))


class Dense(nn.Module):
    """Linear, RMSNorm, SiLU: (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features)
        self.norm = RMSNorm(out_features)

    def forward(self, x: th.Tensor) -> th.Tensor:
        linear, gain = self.linear, self.norm.weight  # functions, since to call two more modules takes longer
        y = F.linear(x, linear.weight, linear.bias)
        return norm_silu(y if y.dtype == gain.dtype else y.to(gain.dtype), gain)


class MLP(nn.Sequential):
    """``layers`` times Dense: (..., in) -> (..., units)."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        widths = [in_features] + [units] * layers
        super().__init__(*(Dense(i, o) for i, o in pairwise(widths)))


class BlockLinear(nn.Module):
    """A block-diagonal linear map: (..., blocks * i) -> (..., blocks * o), block g of the output reads block g only.

    :raises ValueError: if the blocks do not divide both widths.
    """

    def __init__(self, in_features: int, out_features: int, blocks: int) -> None:
        super().__init__()
        if in_features % blocks or out_features % blocks:
            raise ValueError(
                f"blocks={blocks} do not divide a layer of {in_features} inputs and {out_features} outputs: "
                "make deter, and for images depth, a multiple of blocks"
            )
        self.blocks = blocks
        weight = th.empty(blocks, in_features // blocks, out_features // blocks)
        self.weight = nn.Parameter(trunc_normal_(weight, in_features))
        self.bias = nn.Parameter(th.zeros(out_features))

    def forward(self, x: th.Tensor) -> th.Tensor:
        rows = x.reshape(-1, self.weight.shape[0] * self.weight.shape[1])
        return self.by_block(rows).transpose(0, 1).reshape(*x.shape[:-1], -1)

    def by_block(self, x: th.Tensor) -> th.Tensor:
        """The same, blocks first: (n, G * i) -> (G, n, o)."""
        bias = self.bias.view(self.blocks, 1, -1)
        return th.baddbmm(bias, x.view(-1, self.blocks, self.weight.shape[1]).transpose(0, 1), self.weight)


def fast_bfloat16(device: th.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cpu":
        # not every version of torch has these
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(th.cpu, name, bool)() for name in names)
    return device.type == "cuda" and th.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision(device: th.device) -> th.autocast:
    """Autocast to bfloat16 on devices that multiply it faster than float32."""
    return th.autocast(device.type, th.bfloat16, enabled=fast_bfloat16(device))


def to_autocast_dtype(x: th.Tensor) -> th.Tensor:
    """``x`` in the type that autocast casts it to before every product; ``x`` itself outside of autocast."""
    kind = x.device.type
    return x.to(th.get_autocast_dtype(kind)) if th.is_autocast_enabled(kind) else x


def clip_to_unit(action: th.Tensor) -> th.Tensor:
    """Actions beyond [-1, 1] scaled onto it, with the gradient of the scaled action (paper's code): (..., A)."""
    return action / action.abs().clamp(min=1.0).detach()


def fast_tanh(x: th.Tensor) -> th.Tensor:
    """tanh(x) as 1 - 2 sigmoid(-2 x), within 3e-7; several times faster on CPUs where tanh is not vectorized."""
    return th.rsub(th.sigmoid(-2 * x), 1, alpha=2)


@cache
def can_compile() -> bool:
    """Whether torch.compile works for the GPU of this machine: tried once, on a single number.

    Before torch 2.8, writes to rows that are not aligned to 16 bytes are compiled wrongly.
    """
    if th.__version__ < "2.8":
        return False
    try:
        return bool(th.compile(lambda x: x + 1)(th.zeros(1, device="cuda")) == 1)
    except Exception as error:  # a missing Triton, compiler, header, folder: each raises something of its own
        warnings.warn(f"torch.compile does not work here, so updates take about twice as long: {error}", stacklevel=2)
        return False


def compile_on_cuda(device: th.device) -> Callable[[Function], Function]:
    """A decorator: on a GPU all that a function does between two matrix products becomes one kernel, where possible.

    In a CUDA graph an update takes as long as its kernels, and most of them are too small to be busy. The first call
    compiles, which takes seconds. On a CPU the function stays as it is.
    """
    if device.type == "cuda" and can_compile():
        return partial(th.compile, dynamic=False)  # type: ignore[return-value]
    return lambda function: function
