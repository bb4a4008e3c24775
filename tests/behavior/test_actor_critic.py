from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_dreamer.behavior.actor_critic import Actor, actor_loss, advantages
from sb3_dreamer.behavior.imagination import imagine, lambda_returns
from sb3_dreamer.types import SIZES, Dream, Spec
from sb3_dreamer.world_model.rssm import State


def dream_of(discount: list[list[float]]) -> Dream:
    """Trajectories of which nothing matters but how likely they go on, (N, H+1)."""
    table = th.tensor(discount)
    return Dream(features=table[..., None], action=table[:, :-1, None], reward=th.zeros_like(table), discount=table)


RETURNS = th.tensor([[5.0, 1.0], [1.0, 3.0]])
VALUES = th.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]])


def test_the_advantage_is_what_an_action_returned_beyond_the_value_in_units_of_the_scale():
    dream = dream_of([[1.0, 1.0, 1.0]] * 2)
    got = advantages(dream, RETURNS, VALUES, th.tensor(2.0), center=False)
    assert got.tolist() == [[2.0, 0.0], [0.0, 1.0]]


def test_centred_advantages_have_mean_zero_at_each_step_and_differ_as_before():
    dream = dream_of([[1.0, 1.0, 1.0]] * 2)
    got = advantages(dream, RETURNS, VALUES, th.tensor(2.0), center=True)
    assert got.tolist() == [[1.0, -0.5], [-1.0, 0.5]]


def test_a_critic_that_is_off_by_as_much_everywhere_changes_no_centred_advantage():
    dream = dream_of([[1.0, 0.9, 0.8], [0.7, 0.6, 0.5]])
    right, lagging = (
        advantages(dream, RETURNS, VALUES + off, th.tensor(2.0), center=True)
        for off in (0.0, th.tensor([7.0, -3.0, 1.0]))
    )
    th.testing.assert_close(right, lagging)


def test_dreams_that_are_over_do_not_count_in_the_mean():
    dream = dream_of([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    got = advantages(dream, RETURNS, VALUES, th.tensor(1.0), center=True)
    assert got[0].tolist() == [0.0, 0.0]
    everything_over = advantages(dream_of([[0.0, 0.0, 0.0]] * 2), RETURNS, VALUES, th.tensor(1.0), center=True)
    assert everything_over.isfinite().all()


@pytest.mark.parametrize("center", [True, False])
def test_centring_leaves_the_gradient_of_a_dream_as_it_is(center: bool):
    returns = RETURNS.clone().requires_grad_()
    dream = dream_of([[1.0, 1.0, 1.0]] * 2)
    advantages(dream, returns, VALUES, th.tensor(2.0), center).sum().backward()
    assert returns.grad is not None
    assert returns.grad.tolist() == [[0.5, 0.5], [0.5, 0.5]]


class Walk(nn.Module):
    """A world of one dimension: the action is added to the place, being at x is worth -x^2 a step."""

    @property
    def rssm(self) -> "Walk":
        return self

    def imagine_step(self, state: State, action: th.Tensor, sample: bool = True) -> State:
        return State(state.features + action, 1)

    def predict_reward(self, features: th.Tensor) -> th.Tensor:
        return -features.squeeze(-1).square()

    def predict_discount(self, features: th.Tensor) -> th.Tensor:
        return th.full_like(features.squeeze(-1), 0.9)


def walked(differentiable: bool, ent_coef: float = 0.0, horizon: int = 1) -> tuple[Actor, th.Tensor, Dream]:
    """An actor after the backward pass of its loss on dreams from the places 1 to 4; values are all zero."""
    walk: Any = Walk()
    th.manual_seed(0)
    actor = Actor(1, Spec("vector", (1,)), SIZES["debug"])
    dream = imagine(walk, actor, State(th.arange(1.0, 5.0)[:, None], 1), horizon, differentiable=differentiable)
    values = th.zeros(4, horizon + 1)
    returns = lambda_returns(dream.reward, dream.discount, values, 0.5)
    advantage = advantages(dream, returns, values, th.tensor(2.0), center=True)
    loss, _ = actor_loss(actor, dream, advantage, ent_coef, 0.9 * 0.5)
    loss.backward()
    return actor, loss, dream


def test_the_gradient_through_the_dream_is_that_of_what_the_action_leads_to():
    # d/da of -(x + a)^2 / 2, weight 0.9 where every dream goes on, one quarter for each of the four
    actor, _, dream = walked(differentiable=True)
    place = dream.features[:, 1].detach()
    policy = actor(dream.features[:, 0].detach())
    slope = (0.9 / 4 * place).detach()
    noise = ((dream.action[:, 0] - policy.mean) / policy.std).detach()
    want = th.autograd.grad((slope * (policy.mean + policy.std * noise)).sum(), list(actor.parameters()))
    for parameter, gradient in zip(actor.parameters(), want, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient)


def test_a_dream_without_gradient_teaches_by_what_was_better_than_the_others():
    actor, _, dream = walked(differentiable=False)
    assert not dream.features.requires_grad
    reward = -dream.features[:, 1, 0].square() / 2
    policy = actor(dream.features[:, 0])
    gain = 0.9 * ((reward - reward.mean()) * policy.log_prob(dream.action[:, 0])).mean()
    for parameter, gradient in zip(actor.parameters(), th.autograd.grad(-gain, list(actor.parameters())), strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient)


def test_an_action_counts_in_the_returns_before_it_divided_by_how_much_the_last_one_does():
    # R_t is the sum of d^(j - t - 1) r_j over the later states j, and all places after an action move with it
    actor, _, dream = walked(differentiable=True, horizon=3)
    place, d = dream.features[..., 0].detach(), 0.9 * 0.5
    slope = th.zeros(4, 3)
    for action in range(3):
        for t in range(3):
            for j in range(max(t, action) + 1, 4):
                slope[:, action] -= 0.9 ** (t + 1) * d ** (j - t - 1) * place[:, j] / (1 + d + d**2)
    mean = actor(dream.features[:, :3].detach()).mean.detach()[..., 0]
    assert actor.out.bias.grad is not None
    assert actor.out.bias.grad[0].item() == pytest.approx(-(slope * (1 - mean**2)).mean().item(), rel=1e-5)


def test_entropy_counts_the_same_however_the_actor_learns():
    losses = [[walked(how, ent_coef)[1].item() for ent_coef in (0.0, 1.0)] for how in (True, False)]
    (through, with_entropy), (reinforced, and_entropy) = losses
    assert with_entropy - through == pytest.approx(and_entropy - reinforced, rel=1e-5)
    assert with_entropy != through
