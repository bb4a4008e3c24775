"""Planning at decision time: what the search finds, and what it must not change."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_dreamer import Dreamer
from sb3_dreamer.nets import layers
from sb3_dreamer.planning import Planner

SMALL = dict(model_size="debug", batch_size=4, batch_length=8, learning_starts=20, train_ratio=4, seed=0, device="cpu")


@pytest.fixture(scope="module")
def model() -> Dreamer:
    return Dreamer("MlpPolicy", "Pendulum-v1", **SMALL).learn(60)


def states(model: Dreamer, n: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
    carried = model.predict(observations, deterministic=True)[1]
    assert carried is not None
    return carried[0]


@pytest.mark.parametrize("wanted", [-0.6, 0.5])
def test_the_search_finds_the_first_action_of_the_best_plans(model: Dreamer, wanted: float, monkeypatch) -> None:
    planner = Planner(model, horizon=3, n_candidates=256, n_elites=8, iterations=3)
    monkeypatch.setattr(planner, "plan_returns", lambda starts, plans: -(plans[:, 0, 0] - wanted).square())
    np.testing.assert_allclose(planner.plan(states(model)), wanted, atol=0.05)


def test_each_environment_has_a_plan_of_its_own(model: Dreamer, monkeypatch) -> None:
    planner = Planner(model, horizon=2, n_candidates=256, iterations=3)
    goals = th.tensor([-0.5, 0.0, 0.5])

    def near(starts, plans):
        return -(plans[:, 0, 0] - goals.repeat_interleave(len(plans) // 3)).square()

    monkeypatch.setattr(planner, "plan_returns", near)
    np.testing.assert_allclose(planner.plan(states(model))[:, 0], [-0.5, 0.0, 0.5], atol=0.05)


def test_where_no_plan_is_better_the_policy_keeps_its_own(model: Dreamer, monkeypatch) -> None:
    packed = states(model)
    planner = Planner(model)
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: False)
    monkeypatch.setattr(planner, "plan_returns", lambda starts, plans: th.zeros(len(plans)))
    with th.inference_mode():
        features = model.policy.world_model.rssm.unpack(th.as_tensor(packed)).features
        own = model.policy.actor(features).mode().clamp(-1, 1)
    np.testing.assert_allclose(planner.plan(packed), own, atol=1e-6)
    np.testing.assert_allclose(planner.plan(packed, deterministic=False), own, atol=1e-6)


def test_a_plan_does_not_depend_on_the_other_environments(model: Dreamer, monkeypatch) -> None:
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: False)
    packed, planner = states(model, 1), Planner(model, horizon=3)
    np.testing.assert_allclose(planner.plan(packed.repeat(4, 0)), planner.plan(packed).repeat(4, 0), atol=1e-5)


def test_the_return_of_a_longer_plan_is_its_lambda_return(model: Dreamer) -> None:
    world_model, critic, decay = model.policy.world_model, model.policy.critic, model.gae_lambda
    state, plans = world_model.rssm.unpack(th.as_tensor(states(model))), th.full((3, 2, 1), 0.3)
    with th.inference_mode():
        returns = Planner(model, horizon=2).plan_returns(state, plans)
        steps = []
        for action in plans.unbind(1):
            state = world_model.rssm.imagine_step(state, action, sample=False)
            features = state.features
            steps.append(
                (world_model.predict_reward(features), world_model.predict_discount(features), critic.value(features))
            )
    (r1, d1, v1), (r2, d2, v2) = steps
    th.testing.assert_close(returns, r1 + d1 * ((1 - decay) * v1 + decay * (r2 + d2 * v2)))


def test_the_return_of_a_plan_is_the_reward_of_its_dream_and_the_value_after_it(model: Dreamer) -> None:
    world_model, critic = model.policy.world_model, model.policy.critic
    starts, plans = world_model.rssm.unpack(th.as_tensor(states(model))), th.zeros(3, 1, 1)
    with th.inference_mode():
        returns = Planner(model, horizon=1).plan_returns(starts, plans)
        after = world_model.rssm.imagine_step(starts, plans[:, 0], sample=False).features
        want = world_model.predict_reward(after) + world_model.predict_discount(after) * critic.value(after)
    th.testing.assert_close(returns, want)


def test_it_replaces_a_policy_and_its_state_holds_the_action_that_was_taken(model: Dreamer) -> None:
    planner = Planner(model, horizon=2, n_candidates=16)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    observations = np.zeros((4, 3), np.float32)
    actions, state = planner.predict(observations, deterministic=True)
    assert actions.shape == (4, 1)
    assert (np.abs(actions) <= 2).all()
    np.testing.assert_allclose(state[1], actions / 2, atol=1e-6)
    assert planner.predict(observations[0], episode_start=np.ones(1, bool))[0].shape == (1,)
    mean, _ = evaluate_policy(planner, gym.make("Pendulum-v1", max_episode_steps=5), 1, warn=False)
    assert -100 < float(np.mean(mean)) < 0
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())


def test_a_deterministic_plan_is_the_same_each_time_and_leaves_the_default_generator_alone(model: Dreamer) -> None:
    packed, planner, before = states(model), Planner(model, horizon=2, n_candidates=16), th.get_rng_state()
    first = planner.plan(packed)
    np.testing.assert_array_equal(planner.plan(packed), first)
    assert th.equal(th.get_rng_state(), before)
    assert not np.array_equal(planner.plan(packed, deterministic=False), planner.plan(packed, deterministic=False))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(horizon=0), "horizon=0 must be a whole number of at least 1"),
        (dict(n_candidates=4), "n_candidates=4 must be a whole number of at least 8"),
    ],
)
def test_invalid_values_are_refused(model: Dreamer, settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Planner(model, **settings)


def test_another_action_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Planner needs a Box action space, this one is Discrete\(2\)"):
        Planner(Dreamer("MlpPolicy", "CartPole-v1", model_size="debug", device="cpu"))
