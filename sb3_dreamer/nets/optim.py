"""LaProp with adaptive gradient clipping, the paper's optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch as th


def clip_factor(norm: th.Tensor, param_norm: th.Tensor, clip: float) -> th.Tensor:
    """Adaptive gradient clipping (Brock et al. 2021, per tensor): factor that keeps |g| below clip * max(1e-3, |w|)."""
    return (clip * param_norm.clamp(min=1e-3) / norm.clamp(min=1e-30)).clamp(max=1.0)


class LaProp(th.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): divide by the RMS of the gradient first, then average; both bias-corrected.

    The learning rate rises linearly from zero over ``warmup_steps`` updates: update k (from 1) uses
    ``lr * min(1, (k - 1) / warmup_steps)``. Gradients are clipped per tensor, see :func:`clip_factor`.

    Where a gradient is not finite, nothing changes: no parameter, no moment, no count. This is decided on the device,
    the host does not wait for it.

    :param params: parameters or parameter groups, as for every torch optimizer.
    :param lr: learning rate after the warm-up.
    :param betas: decay of the momentum and of the squared gradient.
    :param eps: added to the root of the squared gradient.
    :param clip: largest ratio of gradient norm to parameter norm.
    :param warmup_steps: updates until the full learning rate is reached.
    :param lr_scale: factor on ``lr``, for groups that learn at another rate under the same schedule.
    """

    def __init__(
        self,
        params: Iterable[th.Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        clip: float = 0.3,
        warmup_steps: int = 1000,
        lr_scale: float = 1.0,
    ) -> None:
        rates = dict(lr=lr, warmup_steps=warmup_steps, lr_scale=lr_scale)
        super().__init__(params, dict(betas=betas, eps=eps, clip=clip, **rates))

    @th.no_grad()
    def step(self, loss: th.Tensor | None = None) -> th.Tensor:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        :param loss: the loss that was differentiated; if it is not finite, nothing changes either.
        :return: () bool, whether anything was learned.
        """
        if not is_capturing():
            self.put_rates_on_device()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        clipped = [clip_gradients(params, group["clip"]) for group, params in groups if params]
        finite = th.stack([norms.isfinite().all() for _, norms in clipped]).all()
        if loss is not None:
            finite = finite & loss.isfinite()
        for (group, params), (grads, _) in zip([g for g in groups if g[1]], clipped, strict=True):
            self._step_group(group, params, grads, finite)
        return finite

    @th.no_grad()
    def put_rates_on_device(self) -> None:
        """Where a step that was recorded in a CUDA graph reads the learning rates; no other step needs this call."""
        for group in self.param_groups:
            like = group["params"][0]
            group["rate"] = th.as_tensor(group.get("rate", 0.0), dtype=like.dtype, device=like.device)
            group["rate"].fill_(group["lr"] * group["lr_scale"])

    def _step_group(
        self, group: dict[str, Any], params: list[th.Tensor], grads: list[th.Tensor], finite: th.Tensor
    ) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"nu": th.zeros_like(p), "mu": th.zeros_like(p)}
        nu = [self.state[p]["nu"] for p in params]
        mu = [self.state[p]["mu"] for p in params]
        step = group["step"] = th.as_tensor(group.get("step", 0), dtype=params[0].dtype, device=params[0].device)
        step += finite
        beta1, beta2 = group["betas"]
        bad = ~finite
        for grad in grads:
            grad.masked_fill_(bad, 0.0)
        th._foreach_mul_(nu, th.where(finite, beta2, 1.0))
        th._foreach_addcmul_(nu, grads, grads, 1 - beta2)
        scale = th._foreach_div(nu, bias_correction(beta2, step))
        th._foreach_sqrt_(scale)
        th._foreach_add_(scale, group["eps"])
        th._foreach_mul_(mu, th.where(finite, beta1, 1.0))
        th._foreach_addcdiv_(mu, grads, scale, 1 - beta1)
        warmup = group["warmup_steps"]
        rate = group["rate"] * (((step - 1) / warmup).clamp(0.0, 1.0) if warmup else 1.0)
        th._foreach_sub_(params, th._foreach_mul(mu, finite * rate / bias_correction(beta1, step)))


def is_capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph instead of being run."""
    return th.cuda.is_available() and th.cuda.is_current_stream_capturing()


def bias_correction(beta: float, step: th.Tensor) -> th.Tensor:
    """Bias correction 1 - beta^step of a moving average that starts at zero, without cancellation; never 0."""
    return -th.expm1(step.clamp(min=1.0) * math.log(beta))


def clip_gradients(params: list[th.Tensor], clip: float) -> tuple[list[th.Tensor], th.Tensor]:
    """Gradients of ``params``, each scaled by its :func:`clip_factor`; the ``.grad`` themselves stay untouched.

    :return: the scaled gradients; (n,) norms before.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norms, param_norms = th.stack(th._foreach_norm(grads)), th.stack(th._foreach_norm(params))
    return list(th._foreach_mul(grads, list(clip_factor(norms, param_norms, clip).unbind()))), norms
