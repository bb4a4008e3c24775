import pytest
import torch as th

from sb3_dreamer.behavior.actor_critic import Actor, Critic, advantages
from sb3_dreamer.types import SIZES, Dream, Spec


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


def test_centered_advantages_have_mean_zero_at_each_step_and_differ_as_before():
    dream = dream_of([[1.0, 1.0, 1.0]] * 2)
    got = advantages(dream, RETURNS, VALUES, th.tensor(2.0), center=True)
    assert got.tolist() == [[1.0, -0.5], [-1.0, 0.5]]


def test_a_critic_that_is_off_by_as_much_everywhere_changes_no_centered_advantage():
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
def test_no_gradient_reaches_the_critic_through_the_advantage(center: bool):
    values = VALUES.clone().requires_grad_()
    assert not advantages(dream_of([[1.0, 1.0, 1.0]] * 2), RETURNS, values, th.tensor(1.0), center).requires_grad


def test_an_actor_begins_with_actions_near_the_middle():
    th.manual_seed(0)
    actor = Actor(8, Spec("vector", (2,)), SIZES["debug"])
    assert actor(th.randn(100, 8)).mode().abs().max() < 0.1


def test_the_slow_critic_begins_as_the_critic():
    critic = Critic(3, SIZES["debug"])
    th.testing.assert_close(critic.slow.state_dict(), critic.fast.state_dict(), rtol=0, atol=0)


def test_the_slow_critic_follows_by_its_share_where_the_critic_has_learned():
    critic = Critic(3, SIZES["debug"])
    for slow, fast in zip(critic.slow.parameters(), critic.fast.parameters(), strict=True):
        slow.data.zero_()
        fast.data.fill_(1.0)
    for learned, expected in ((True, 0.1), (False, 0.1), (True, 0.19)):
        critic.update_slow(0.9, th.tensor(learned))
        for slow in critic.slow.parameters():
            th.testing.assert_close(slow.data, th.full_like(slow, expected))
