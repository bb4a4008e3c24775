from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dreamer import Dreamer
from sb3_dreamer.behavior.imagination import imagine
from sb3_dreamer.dreams import collect, find_trouble, horizon_errors, open_loop, signs_of, trouble
from sb3_dreamer.dreams.trouble import TROUBLES, RealReturns, information, returns_to_go
from tests.dreams.dial import Dial

HEALTHY = dict(
    kl=3.0, kl_capacity=44.0, dead_latents=0.1, rewarded=0.5, imagined_return=11.0, real_return=10.0, return_scale=4.0
) | dict(overconfidence=1.0, error_ratio=0.4, reward_error_ratio=0.5)


def test_a_healthy_model_has_no_trouble():
    assert find_trouble(HEALTHY) == {}


@pytest.mark.parametrize(
    ("name", "signs", "says"),
    [
        ("dreams_too_optimistic", {"imagined_return": 30.0}, "predict a return of 30, real episodes have 10"),
        ("kl_collapse", {"kl": 0.001}, "KL 0.001 nats"),
        ("kl_explosion", {"kl": 60.0}, "by 60 nats, more than a uniform guess (44)"),
        ("dead_latents", {"dead_latents": 0.95}, "95% of the latents"),
        ("no_reward", {"rewarded": 0.0, "real_return": 0.0, "imagined_return": 0.0}, "No reward in the data"),
        ("worse_than_persistence", {"error_ratio": 1.5}, "error 1.50 times as large"),
        ("rewards_unknown", {"reward_error_ratio": 2.5}, "rewards is 2.5 times that"),
    ],
)
def test_every_trouble_is_named_with_its_numbers_and_what_to_try(name: str, signs: dict[str, float], says: str):
    found = find_trouble(HEALTHY | signs)
    assert list(found) == [name]
    assert says in found[name]
    assert any(word in found[name] for word in ("Try", "try", "Look", "look", "Give"))


@pytest.mark.parametrize(
    ("imagined", "real", "too_optimistic"), [(-20, -1500, True), (-1400, -1500, False), (30, 25, False), (5, -5, True)]
)
def test_dreams_are_too_optimistic_below_zero_as_well(imagined: float, real: float, too_optimistic: bool):
    found = find_trouble(HEALTHY | {"imagined_return": imagined, "real_return": real})
    assert ("dreams_too_optimistic" in found) == too_optimistic


def test_a_rare_reward_that_was_not_sampled_is_no_trouble():
    assert find_trouble(HEALTHY | {"rewarded": 0.0, "real_return": 0.1, "imagined_return": 0.0}) == {}


def test_every_trouble_has_a_case_above():
    assert len(TROUBLES) == 7


def test_what_is_not_known_is_no_trouble():
    assert find_trouble(HEALTHY | {"real_return": float("nan"), "error_ratio": float("nan")}) == {}


def test_information_of_a_latent_is_the_entropy_of_what_it_separates():
    always, sorts = th.tensor([1.0, 0.0]), th.eye(2)
    post = th.stack([th.stack([always, sorts[i % 2]], -1) for i in range(8)]) * 0.998 + 0.001  # (8, K=2, S=2)
    nats = information(post.view(2, 4, 2, 2))
    assert nats[0].abs() < 1e-6
    np.testing.assert_allclose(nats[1], np.log(2), atol=0.01)


def test_returns_to_go_of_an_episode_that_ends_for_good():
    np.testing.assert_allclose(returns_to_go(np.array([1.0, 2.0, 4.0]), True, 0.5), [3.0, 4.0, 4.0])


def test_an_episode_that_was_cut_short_goes_on_with_its_mean_reward():
    np.testing.assert_allclose(returns_to_go(np.full(7, 3.0), False, 0.9), np.full(7, 30.0))


def test_real_returns_keep_environments_apart_and_the_newest_episodes():
    real = RealReturns(gamma=0.5, newest=1)
    assert np.isnan(real.mean)
    real.add([True, True], np.array([1.0, 10.0]), np.array([False, False]), [{}, {}])
    real.add([False, False], np.array([2.0, 10.0]), np.array([True, False]), [{}, {}])
    assert real.mean == 2.0  # of 1 + 2 / 2 and 2
    real.add([True, False], np.array([0.0, 10.0]), np.array([False, True]), [{}, {"TimeLimit.truncated": True}])
    np.testing.assert_allclose(real.mean, 20.0)


def test_what_was_cut_is_no_part_of_the_next_episode():
    real = RealReturns(gamma=0.5)
    real.add([True], np.array([100.0]), np.array([False]), [{}])  # then learn() was stopped
    real.add([True], np.array([2.0]), np.array([True]), [{}])
    assert real.mean == 2.0


class Named(gym.Wrapper):
    """The dial as a Dict, one key of which is called as the reward is."""

    def __init__(self) -> None:
        super().__init__(Dial())
        self.observation_space = gym.spaces.Dict(reward=self.env.observation_space)

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return {"reward": obs}, info

    def step(self, action: Any) -> Any:
        obs, *rest = self.env.step(action)
        return {"reward": obs}, *rest


def test_an_observation_called_reward_does_not_hide_the_reward_of_the_task():
    model = Dreamer("MultiInputPolicy", Named(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Named]), 120, sequence_length=24)
    batch = replay.peek(4)
    errors = horizon_errors(open_loop(model.policy, batch, samples=4))
    assert errors.keys() == {"reward", "reward of the task"}
    sign = signs_of(model, batch, errors)["reward_error_ratio"]
    assert sign == errors["reward of the task"].ratio(model.imagination_horizon)
    assert sign != errors["reward"].ratio(model.imagination_horizon)


def test_dreams_begin_where_an_episode_goes_on(monkeypatch: pytest.MonkeyPatch):
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Dial]), 120, sequence_length=24)
    batch = replay.peek(4)
    over = th.zeros_like(batch.is_terminal)
    over[:, 3:] = True
    begun: list[int] = []

    def note(world_model: Any, actor: Any, start: Any, horizon: int) -> Any:
        begun.append(len(start.features))
        return imagine(world_model, actor, start, horizon)

    monkeypatch.setattr(trouble, "imagine", note)
    errors = horizon_errors(open_loop(model.policy, batch, samples=4))
    signs_of(model, replace(batch, is_terminal=over), errors)
    assert begun == [12]


def test_what_is_not_known_of_images_is_left_out_of_means():
    nan = float("nan")
    assert trouble.mean_of_known([1.0, nan, 3.0]) == 2.0
    assert np.isnan(trouble.mean_of_known([nan]))


def test_signs_of_an_untrained_model():
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, real_return = collect(model, DummyVecEnv([Dial]), 120, sequence_length=24)
    batch = replay.peek(4)
    errors = horizon_errors(open_loop(model.policy, batch, samples=4))
    signs = signs_of(model, batch, errors, real_return)
    assert signs["imagined_return"] == 0.0  # reward head and critic begin at exactly zero
    assert signs["return_scale"] == 1.0
    np.testing.assert_allclose(signs["kl_capacity"], 4 * np.log(4))
    np.testing.assert_allclose(signs["rewarded"], (batch.reward != 0).float().mean())
    assert signs["real_return"] == real_return > 0
    assert signs["kl"] > 0
