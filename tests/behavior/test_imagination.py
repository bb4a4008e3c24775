"""Lambda-returns with literal numbers, the return scale, and the time of dreams."""

from __future__ import annotations

from functools import partial

import pytest
import torch as th

from sb3_dreamer.behavior import imagination
from sb3_dreamer.behavior.actor_critic import Actor, discount_weights
from sb3_dreamer.behavior.imagination import ReturnScale, draw_starts, imagine, imagine_actions, lambda_returns
from sb3_dreamer.types import SIZES, Dream, Spec
from sb3_dreamer.world_model import WorldModel


def row(*values: float) -> th.Tensor:
    """A batch of one."""
    return th.tensor([values], dtype=th.float32)


def test_a_return_pairs_the_reward_of_the_next_entry_with_its_value() -> None:
    # lambda 0: R_t = r_{t+1} + d_{t+1} v_{t+1}
    returns = lambda_returns(row(100, 1, 2), row(0.5, 0.5, 0.5), row(100, 10, 20), 0.0)
    assert returns.tolist() == [[1 + 0.5 * 10, 2 + 0.5 * 20]]


def test_lambda_one_is_the_discounted_sum_up_to_the_bootstrap() -> None:
    returns = lambda_returns(row(100, 1, 2, 3), row(0.5, 0.5, 0.5, 0.5), row(9, 9, 9, 8), 1.0)
    assert returns.tolist() == [[1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 8)), 2 + 0.5 * (3 + 0.5 * 8), 3 + 0.5 * 8]]


def test_lambda_in_between_mixes_value_and_return() -> None:
    returns = lambda_returns(row(0, 1, 2), row(1, 0.9, 0.9), row(0, 10, 20), 0.95)
    last = 2 + 0.9 * 20
    assert returns.tolist()[0] == pytest.approx([1 + 0.9 * (0.05 * 10 + 0.95 * last), last])


def test_nothing_counts_after_a_terminal_entry() -> None:
    returns = lambda_returns(row(0, 1, 50, 60), row(1, 0.0, 1, 1), row(70, 80, 90, 95), 0.95)
    assert float(returns[0, 0]) == 1.0


def test_a_time_limit_bootstraps_with_the_value_of_its_last_entry() -> None:
    is_last = th.tensor([[False, True, False, False]])
    returns = lambda_returns(row(0, 1, 50, 60), row(1, 0.9, 1, 1), row(70, 80, 90, 95), 0.95, is_last)
    assert float(returns[0, 0]) == pytest.approx(1 + 0.9 * 80)


def test_the_return_scale_is_a_moving_percentile_range_and_never_below_one() -> None:
    scale = ReturnScale(rate=0.5)
    assert float(scale.update(th.zeros(10))) == 1.0
    assert float(scale.update(th.linspace(0, 100, 101))) == pytest.approx(45.0)
    assert (float(scale.low), float(scale.high)) == pytest.approx((2.5, 47.5))


def test_the_last_state_of_a_dream_has_no_weight_and_a_likely_end_lowers_those_after_it() -> None:
    dream = Dream(th.zeros(1, 4, 2), th.zeros(1, 3, 1), row(0, 0, 0, 0), row(1.0, 0.5, 0.5, 1.0))
    assert discount_weights(dream).tolist() == [[1.0, 0.5, 0.25, 0.0]]


def test_starts_are_drawn_from_all_states_and_none_twice() -> None:
    draws = [draw_starts(6, 3, th.device("cpu")).tolist() for _ in range(200)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert set().union(*draws) == set(range(6))
    assert draw_starts(4, None, th.device("cpu")).tolist() == [0, 1, 2, 3]


def test_a_dream_starts_at_its_start_and_given_its_own_actions_it_is_the_same_dream() -> None:
    size = SIZES["debug"]
    action_spec = Spec("vector", (2,))
    model = WorldModel({"obs": Spec("vector", (3,))}, action_spec, size)
    actor = Actor(model.feature_width, action_spec, size)
    start = model.rssm.initial(5)
    th.manual_seed(1)
    dream = imagine(model, actor, start, horizon=4)
    assert dream.features.shape == (5, 5, model.feature_width)
    assert (dream.action.shape, dream.reward.shape) == ((5, 4, 2), (5, 5))
    assert th.equal(dream.features[:, 0], start.features)
    assert th.equal(dream.reward, th.zeros(5, 5))  # a fresh reward head predicts zero
    again = imagine_actions(model, start, dream.action)
    deter = slice(0, size.deter)
    assert th.allclose(again.features[:, 1, deter], dream.features[:, 1, deter])


def test_a_dream_without_chance_begins_with_the_given_action_and_is_always_the_same() -> None:
    size, action_spec = SIZES["debug"], Spec("vector", (2,))
    model = WorldModel({"obs": Spec("vector", (3,))}, action_spec, size)
    actor = Actor(model.feature_width, action_spec, size)
    first = th.full((5, 2), 0.5)
    dreams = [imagine(model, actor, model.rssm.initial(5), 4, first, sample=False) for _ in range(2)]
    assert th.equal(dreams[0].features, dreams[1].features)
    assert th.equal(dreams[0].action[:, 0], first)
    later = dreams[0].features[:, 1:4]
    assert th.allclose(dreams[0].action[:, 1:], actor(later).mode(), atol=1e-6)
    probs = later[..., size.deter :].unflatten(-1, (size.classes, size.stoch))
    assert th.allclose(probs.sum(-2), th.ones(()), atol=1e-5)
    assert probs.max() < 0.99, "expectations, not choices"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_as_on_a_gpu_a_dream_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES["debug"]
    model = WorldModel({"obs": Spec("vector", (3,))}, Spec("vector", (2,)), size)
    actor = Actor(model.feature_width, Spec("vector", (2,)), size)
    dreams = []
    for fused in (lambda function: function, partial(th.compile, dynamic=False, fullgraph=True, backend="eager")):
        monkeypatch.setattr(imagination, "compile_on_cuda", lambda device, fused=fused: fused)
        th.manual_seed(0)
        dreams.append(imagine(model, actor, model.rssm.initial(4), 3, compiled=True))
    assert th.equal(dreams[0].features, dreams[1].features)
    assert th.equal(dreams[0].action, dreams[1].action)


@pytest.mark.parametrize("rssm_type", ["gru", "transformer"])
def test_a_dream_in_bfloat16_takes_the_same_step_within_its_precision(rssm_type: str) -> None:
    action_spec = Spec("vector", (2,))
    model = WorldModel({"obs": Spec("vector", (3,))}, action_spec, SIZES["debug"], rssm_type)
    start, action = model.rssm.initial(5), th.randn(5, 1, 2)
    exact = imagine_actions(model, start, action).features
    with th.autocast("cpu", th.bfloat16):
        fast = imagine_actions(model, start, action).features
    deter = slice(0, SIZES["debug"].deter)
    assert fast.dtype == th.bfloat16
    assert th.allclose(fast[:, 1, deter].float(), exact[:, 1, deter], atol=0.02)
