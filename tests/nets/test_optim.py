"""LaProp, its warm-up and adaptive clipping, against numbers worked out by hand."""

from __future__ import annotations

import copy

import pytest
import torch as th

from sb3_dreamer.nets.optim import LaProp, clip_gradients


def step(optimizer: LaProp, param: th.Tensor, grad: list[float]) -> list[float]:
    """One update with the given gradient."""
    param.grad = th.tensor(grad)
    optimizer.step()
    return list(param.detach().tolist())


def test_the_first_update_of_a_warm_up_does_not_move() -> None:
    param = th.nn.Parameter(th.ones(2))
    optimizer = LaProp([param], lr=0.1, warmup_steps=10)
    assert step(optimizer, param, [1.0, -1.0]) == [1.0, 1.0]
    assert step(optimizer, param, [1.0, -1.0]) == pytest.approx([0.99, 1.01])  # a tenth of lr 0.1


def test_without_warm_up_the_first_update_is_one_learning_rate_whatever_the_gradient() -> None:
    param = th.nn.Parameter(th.zeros(2))
    optimizer = LaProp([param], lr=0.1, clip=1e9, warmup_steps=0)
    step(optimizer, param, [1e-6, -1e6])
    assert param.detach().tolist() == pytest.approx([-0.1, 0.1], rel=1e-4)


def test_the_gradient_is_normalised_before_it_is_averaged() -> None:
    param = th.nn.Parameter(th.zeros(1))
    optimizer = LaProp([param], lr=1.0, betas=(0.5, 0.5), clip=1e9, warmup_steps=0)
    step(optimizer, param, [1.0])
    first = float(param.detach())
    step(optimizer, param, [2.0])
    # nu = (0.25 + 2) / 0.75 = 3, u = 2 / sqrt(3); mu = (0.25 + 0.5 u) / 0.75
    assert float(param.detach()) - first == pytest.approx(-(0.25 + 0.5 * 2 / 3**0.5) / 0.75, rel=1e-5)


def test_gradients_are_clipped_to_a_share_of_the_norm_of_each_tensor() -> None:
    large, small = th.nn.Parameter(th.tensor([3.0, 4.0])), th.nn.Parameter(th.zeros(1))
    large.grad, small.grad = th.tensor([30.0, 40.0]), th.tensor([1.0])
    clipped, norms = clip_gradients([large, small], clip=0.3)
    assert clipped[0].tolist() == pytest.approx([0.9, 1.2])  # norm 50 -> 0.3 * 5
    assert clipped[1].tolist() == pytest.approx([0.3e-3])  # parameters of norm zero count as 1e-3
    assert norms.tolist() == [50.0, 1.0]
    assert large.grad.tolist() == [30.0, 40.0]


def test_a_gradient_of_zero_does_not_move_and_does_not_divide_by_zero() -> None:
    param = th.nn.Parameter(th.ones(1))
    optimizer = LaProp([param], lr=0.1, warmup_steps=0)
    assert step(optimizer, param, [0.0]) == [1.0]


def test_the_state_survives_a_state_dict() -> None:
    param, twin = th.nn.Parameter(th.ones(2)), th.nn.Parameter(th.ones(2))
    first, second = LaProp([param], lr=0.1, warmup_steps=0), LaProp([twin], lr=0.1, warmup_steps=0)
    step(first, param, [1.0, 2.0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    twin.data.copy_(param.data)
    assert step(first, param, [0.5, -1.0]) == step(second, twin, [0.5, -1.0])


def test_a_group_may_learn_at_a_share_of_the_rate() -> None:
    slow, fast = th.nn.Parameter(th.zeros(1)), th.nn.Parameter(th.zeros(1))
    groups = [{"params": [fast]}, {"params": [slow], "lr_scale": 0.2}]
    optimizer = LaProp(groups, lr=0.1, clip=1e9, warmup_steps=0)
    slow.grad, fast.grad = th.ones(1), th.ones(1)
    optimizer.step()
    assert [float(fast.detach()), float(slow.detach())] == pytest.approx([-0.1, -0.02])
