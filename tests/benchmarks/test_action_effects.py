from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from benchmarks import action_effects
from benchmarks.action_effects import Moment, compare, moments, real_return
from sb3_dreamer import Dreamer

GAMMA = 0.9


class Recorder(gym.Wrapper):
    """Where the simulator was before each step, and the reward of it."""

    def reset(self, **kwargs: Any) -> Any:
        self.positions: list[np.ndarray] = []
        self.rewards: list[float] = []
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        self.positions.append(self.unwrapped.data.qpos.copy())
        outcome = super().step(action)
        self.rewards.append(outcome[1])
        return outcome


@pytest.fixture(scope="module")
def model() -> Dreamer:
    return Dreamer("MlpPolicy", "HalfCheetah-v4", model_size="debug", gamma=GAMMA, seed=0, device="cpu")


@pytest.fixture
def env() -> Recorder:
    return Recorder(gym.make("HalfCheetah-v4"))


@pytest.fixture
def place(model: Dreamer, env: Recorder, monkeypatch: pytest.MonkeyPatch) -> Moment:
    monkeypatch.setattr(action_effects, "EPISODES", 1)
    monkeypatch.setattr(action_effects, "STEPS", 40)
    return moments(model, env, 3, np.random.default_rng(0))[0]


def test_set_back_the_same_actions_bring_what_they_brought(model: Dreamer, env: Recorder, place: Moment):
    t = next(t for t, at in enumerate(env.positions) if np.array_equal(at, place.simulator[0]))
    expected = np.dot([1, GAMMA, GAMMA**2], env.rewards[t : t + 3])
    actions = model.policy.actions.decode(place.actions)
    assert real_return(env, place, actions, GAMMA) == pytest.approx(expected, rel=1e-6)
    assert abs(real_return(env, place, actions + 0.5, GAMMA) - expected) > 0.01


def test_a_model_that_knows_the_returns_is_distinguished_from_one_that_has_them_backwards(
    model: Dreamer, env: Recorder, place: Moment, monkeypatch: pytest.MonkeyPatch
):
    def oracle(sign: int) -> Any:
        def returns(_: Dreamer, moment: Moment, candidates: np.ndarray) -> np.ndarray:
            decoded = map(model.policy.actions.decode, candidates)
            return sign * np.array([real_return(env, moment, actions, GAMMA) for actions in decoded])

        return returns

    for sign in (1, -1):
        monkeypatch.setattr(action_effects, "dreamed_returns", oracle(sign))
        result = compare(model, env, [place], 0.3, 6, np.random.default_rng(1))
        assert result["correlation"] == pytest.approx(sign, abs=1e-3)
        assert result["std_real"] == result["std_dreamed"] > 0


def test_a_dreamed_reward_counts_as_far_as_the_dream_is_expected_to_last(
    model: Dreamer, place: Moment, monkeypatch: pytest.MonkeyPatch
):
    world_model = model.policy.world_model
    monkeypatch.setattr(world_model, "predict_reward", lambda features: th.ones(features.shape[:-1]))
    monkeypatch.setattr(world_model, "predict_discount", lambda features: th.full(features.shape[:-1], 0.5))
    returns = action_effects.dreamed_returns(model, place, np.stack([place.actions] * 2))
    np.testing.assert_allclose(returns, [1.75, 1.75])
