"""LaProp with adaptive gradient clipping, the paper's optimiser."""

from __future__ import annotations

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

    :param params: parameters or parameter groups, as for every torch optimiser.
    :param lr: learning rate after the warm-up.
    :param betas: decay of the momentum and of the squared gradient.
    :param eps: added to the root of the squared gradient.
    :param clip: largest ratio of gradient norm to parameter norm.
    :param warmup_steps: updates until the full learning rate is reached.
    """

    def __init__(
        self,
        params: Iterable[th.Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        clip: float = 0.3,
        warmup_steps: int = 1000,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, clip=clip, warmup_steps=warmup_steps))

    @th.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        group["step"] = group.get("step", 0) + 1
        for p in params:
            if not self.state[p]:
                self.state[p] = {"nu": th.zeros_like(p), "mu": th.zeros_like(p)}
        grads = clip_gradients(params, group["clip"])
        (beta1, beta2), step = group["betas"], group["step"]
        nu = [self.state[p]["nu"] for p in params]
        mu = [self.state[p]["mu"] for p in params]
        th._foreach_mul_(nu, beta2)
        th._foreach_addcmul_(nu, grads, grads, 1 - beta2)
        scale = th._foreach_div(nu, 1 - beta2**step)
        th._foreach_sqrt_(scale)
        th._foreach_add_(scale, group["eps"])
        th._foreach_mul_(mu, beta1)
        th._foreach_addcdiv_(mu, grads, scale, 1 - beta1)
        warmup = group["warmup_steps"]
        rate = group["lr"] * (min(1.0, (step - 1) / warmup) if warmup else 1.0)
        th._foreach_add_(params, mu, alpha=-rate / (1 - beta1**step))


def clip_gradients(params: list[th.Tensor], clip: float) -> list[th.Tensor]:
    """Gradients of ``params``, each scaled by its :func:`clip_factor`; the ``.grad`` themselves stay untouched."""
    grads = [p.grad for p in params if p.grad is not None]
    norms, param_norms = th.stack(th._foreach_norm(grads)), th.stack(th._foreach_norm(params))
    return list(th._foreach_mul(grads, list(clip_factor(norms, param_norms, clip).unbind())))
