"""The guard: risk as the share of dreams that end badly, and which controller acts then."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.dreams.__main__ import main as dreams
from sb3_dreamer.hybrid import DreamVecEnv, Guard, LatentVecEnv
from sb3_dreamer.planning import Planner
from sb3_dreamer.world_model import WorldModel
from tests.hybrid.agents import SMALL, pendulum


class Constant:
    """A fallback that always does the same."""

    def __init__(self, dreamer: Dreamer, action: float = 2.0) -> None:
        self.observation_space, self.action_space = dreamer.observation_space, dreamer.action_space
        self.action = action
        self.seen: list[Any] = []

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        self.seen.append(obs)
        return np.full((*np.shape(obs)[:-1], 1), self.action, np.float32), state


@contextmanager
def continues_with(dreamer: Dreamer, probability: float) -> Iterator[None]:
    """The model predicts this continue probability in every state."""
    out = dreamer.policy.world_model.continue_head[-1]
    before = out.weight.clone(), out.bias.clone()
    goal = th.tensor(probability * dreamer.gamma)
    with th.no_grad():
        out.weight.zero_()
        out.bias.fill_(th.logit(goal, eps=1e-7).item())
    try:
        yield
    finally:
        with th.no_grad():
            out.weight.copy_(before[0])
            out.bias.copy_(before[1])


def observe(n: int = 1) -> np.ndarray:
    return np.tile(np.float32([1.0, 0.0, 0.1]), (n, 1))


def test_the_risk_is_the_share_of_dreams_that_end_within_the_horizon(dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
    guard = Guard(dreamer, Constant(dreamer), horizon=7, n_dreams=4)
    packed, _ = dreamer.policy.initial_state(2)
    cont = th.full((8, 8), 0.9)  # of a head that is never quite sure
    cont[0, 7] = cont[1, 1] = cont[7, 3] = 0.4  # two of the first four dreams, one of the others
    cont[2, 0] = 0.0  # the present state is not part of the dream
    discount = cont * dreamer.gamma
    monkeypatch.setattr(WorldModel, "predict_discount", lambda model, features: discount)
    np.testing.assert_allclose(guard.risk(packed), [0.5, 0.25])


def test_dreamer_acts_where_the_risk_is_small(dreamer: Dreamer):
    fallback = Constant(dreamer)
    guard = Guard(dreamer, fallback, horizon=5)
    with continues_with(dreamer, 1.0):
        action, state = guard.predict(observe(2), deterministic=True)
    own, (packed, encoded) = dreamer.predict(observe(2), deterministic=True)
    np.testing.assert_array_equal(action, own)
    np.testing.assert_array_equal(state.packed, packed)
    np.testing.assert_array_equal(state.action, encoded)
    assert (guard.decisions, guard.taken_over) == (2, 0)


def test_the_fallback_acts_where_the_risk_is_large_and_the_model_remembers_its_action(dreamer: Dreamer):
    guard = Guard(dreamer, Constant(dreamer), horizon=5)
    with continues_with(dreamer, 0.0):
        action, state = guard.predict(observe(2))
    np.testing.assert_array_equal(action, [[2.0], [2.0]])
    np.testing.assert_array_equal(state.action, [[1.0], [1.0]])  # encoded: of the bounds -2 and 2
    assert (guard.decisions, guard.taken_over) == (2, 2)


def test_a_dreamer_as_fallback_remembers_what_was_done_and_not_what_it_would_have_done(dreamer: Dreamer):
    other = Dreamer("MlpPolicy", "Pendulum-v1", **SMALL | dict(seed=5))
    guard, starts = Guard(dreamer, other, horizon=2), np.array([False, False])
    with continues_with(dreamer, 1.0):
        done, state = guard.predict(observe(2), deterministic=True)
        np.testing.assert_allclose(state.memory[1], done / 2, atol=1e-6)
        _, state = guard.predict(observe(2), state, starts, deterministic=True)
    _, (packed, would) = other.predict(observe(2), deterministic=True)
    assert not np.allclose(would, done / 2, atol=1e-3)
    _, (packed, _) = other.predict(observe(2), (packed, done / 2), starts, deterministic=True)
    np.testing.assert_allclose(state.memory[0], packed, atol=1e-5)


def test_a_fallback_may_leave_out_the_axis_of_its_one_action(dreamer: Dreamer):
    fallback = Constant(dreamer)
    fallback.predict = lambda obs, *_: (np.array([0.25, 1.0], np.float32), None)
    with continues_with(dreamer, 0.0):
        actions, _ = Guard(dreamer, fallback, horizon=2).predict(observe(2))
    np.testing.assert_array_equal(actions, [[0.25], [1.0]])


def test_dreamer_remembers_under_a_guard(dreamer: Dreamer):
    guard, starts, state, own = Guard(dreamer, Constant(dreamer), horizon=2), np.array([False]), None, None
    with continues_with(dreamer, 1.0):
        for _ in range(3):
            actions, state = guard.predict(observe(), state, starts, deterministic=True)
            alone, own = dreamer.predict(observe(), own, starts, deterministic=True)
            np.testing.assert_array_equal(actions, alone)
    np.testing.assert_array_equal(state.packed, own[0])


def test_the_state_of_another_policy_is_refused(dreamer: Dreamer):
    _, state = dreamer.predict(observe())
    with pytest.raises(ValueError, match=r"Guard.predict\(\) got a state of another policy"):
        Guard(dreamer, Constant(dreamer)).predict(observe(), state)


def test_a_model_that_learned_normalized_is_not_used_without_its_statistics(tmp_path):
    env = VecNormalize(pendulum())
    Dreamer("MlpPolicy", env, **SMALL).learn(60).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="its environment has none"):
        raw = Dreamer.load(tmp_path / "model", env=pendulum())
    with pytest.raises(ValueError, match="Guard needs the statistics of VecNormalize"):
        Guard(raw, Constant(raw))
    alone = Dreamer.load(tmp_path / "model")
    with pytest.raises(ValueError, match="DreamVecEnv needs the statistics of VecNormalize"):
        DreamVecEnv(alone, 4, start=alone.policy.initial_state(1))
    with pytest.raises(
        ValueError, match="the model has learned with VecNormalize around its observations, and env is without"
    ):
        LatentVecEnv(alone, pendulum())
    other = Dreamer("MlpPolicy", pendulum(), **SMALL)
    for teacher in (alone, Planner(alone)):
        with pytest.raises(
            ValueError, match="the fallback seems to be trained with VecNormalize and cannot act without"
        ):
            Guard(other, teacher)
    with pytest.raises(SystemExit, match="was trained with VecNormalize, so it dreams in normalized units"):
        dreams([str(tmp_path / "model.zip"), "--env", "Pendulum-v1", "--out", str(tmp_path / "page")])


def test_a_model_whose_rewards_alone_were_normalized_acts_without_statistics(tmp_path):
    env = VecNormalize(pendulum(), norm_obs=False)
    Dreamer("MlpPolicy", env, **SMALL).learn(60).save(tmp_path / "model")
    raw = Dreamer.load(tmp_path / "model", env=pendulum())  # without a warning
    assert raw.trained_with_vecnormalize
    obs, _ = Guard(raw, raw).predict(observe())
    assert obs.shape == LatentVecEnv(raw, pendulum()).reset()[:, :1].shape == (1, 1)
    alone = Dreamer.load(tmp_path / "model")
    assert len(DreamVecEnv(alone, 4, start=alone.policy.initial_state(1)).reset()) == 4
    with pytest.raises(ValueError, match="DreamVecEnv needs the statistics of VecNormalize"):
        DreamVecEnv(alone, 4)  # of the replay's rewards


@pytest.mark.parametrize("acts", [0.0, 1.0])
def test_one_observation_alone_gives_one_action(dreamer: Dreamer, acts: float):
    with continues_with(dreamer, acts):
        action, state = Guard(dreamer, Constant(dreamer), horizon=2).predict(observe()[0])
    assert action.shape == (1,)
    assert action.dtype == np.float32
    assert len(state.packed) == 1


def test_a_test_holds_until_the_next_one_and_a_takeover_until_the_next_episode(dreamer: Dreamer):
    guard = Guard(dreamer, Constant(dreamer), horizon=5, every=3)
    with continues_with(dreamer, 1.0):
        _, state = guard.predict(observe(2), None, np.array([True, True]))
    seen = []
    with continues_with(dreamer, 0.0):
        for starts in ([False, False], [False, True], [False, False]):
            _, state = guard.predict(observe(2), state, np.array(starts))
            seen.append(state.taken_over.tolist())
    assert seen == [[False, False], [False, True], [True, True]]
    with continues_with(dreamer, 1.0):
        for starts in ([False, False], [False, False], [False, False], [True, False]):
            _, state = guard.predict(observe(2), state, np.array(starts))
            seen.append(state.taken_over.tolist())
    assert seen[3:] == [[True, True]] * 3 + [[False, True]]


def test_dreams_with_nan_are_risky(dreamer: Dreamer):
    guard = Guard(dreamer, Constant(dreamer), horizon=2, max_risk=0.99)
    with continues_with(dreamer, 1.0):
        dreamer.policy.world_model.continue_head[-1].bias.data.fill_(float("nan"))
        _, state = guard.predict(observe())
    assert state.taken_over.tolist() == [True]


def test_unsafe_states_are_risky_although_they_end_no_episode(dreamer: Dreamer):
    asked = []

    def unsafe(obs: np.ndarray) -> np.ndarray:
        asked.append(obs)
        return np.arange(len(obs)) < 6  # both states of the first three dreams, of eight

    guard = Guard(dreamer, Constant(dreamer), horizon=2, n_dreams=4, unsafe=unsafe)
    packed, _ = dreamer.policy.initial_state(2)
    with continues_with(dreamer, 1.0):
        np.testing.assert_allclose(guard.risk(packed), [0.75, 0.0], atol=0.01)
    assert asked[0].shape == (16, 3)
    assert np.abs(asked[0][:, :2]).max() <= 1.0  # in the bounds of the space


def test_a_predicate_that_returns_no_bool_for_each_observation_is_refused(dreamer: Dreamer):
    guard = Guard(dreamer, Constant(dreamer), horizon=2, n_dreams=4, unsafe=lambda obs: obs[:, 2])
    with pytest.raises(ValueError, match=r"unsafe\(\) returned float32 of shape \(8,\) for 8 observations"):
        guard.predict(observe())


def test_a_recurrent_fallback_remembers_what_it_saw_while_dreamer_acted(dreamer: Dreamer):
    teacher = RecurrentPPO("MlpLstmPolicy", pendulum(), n_steps=16, batch_size=16, seed=0, device="cpu")
    guard = Guard(dreamer, teacher, horizon=2, every=1)
    state, memory = None, None
    for probability in (1.0, 1.0, 0.0):
        obs = observe() * (1 + probability)
        with continues_with(dreamer, probability):
            action, state = guard.predict(obs, state, np.array([state is None]))
        expected, memory = teacher.predict(obs, memory, np.array([memory is None]), deterministic=True)
    np.testing.assert_allclose(action, expected)


def test_each_sees_the_units_that_it_was_trained_with():
    env = VecNormalize(pendulum())
    dreamer = Dreamer("MlpPolicy", env, **SMALL).learn(60)
    env.obs_rms.mean[:] = 100.0
    seen: list[np.ndarray] = []

    def unsafe(obs: np.ndarray) -> np.ndarray:
        seen.append(obs)
        return np.zeros(len(obs), bool)

    fallback = Constant(dreamer)
    env.training = False
    guard = Guard(dreamer, fallback, vec_normalize=False, horizon=2, unsafe=unsafe)
    raw = observe() + 100
    guard.predict(env.normalize_obs(raw))
    np.testing.assert_allclose(fallback.seen[0], raw, atol=1e-4)
    assert (np.abs(seen[0] - 100) < 50).all()  # normalized it would be at most 10


def test_a_custom_controller_needs_no_more_than_predict(dreamer: Dreamer):
    class Still:
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            return np.zeros((len(obs), 1), np.float32), None

    with continues_with(dreamer, 0.0):
        guard = Guard(dreamer, Still(), horizon=2)
        assert guard.predict(observe(2))[0].tolist() == [[0.0], [0.0]]
        assert guard.predict(observe()[0])[0].tolist() == [0.0]  # it always sees a batch


def test_actions_of_a_custom_controller_are_clipped_and_reshaped(dreamer: Dreamer):
    class Strong:
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            return [3.0] * len(obs), None

    with continues_with(dreamer, 0.0):
        actions, _ = Guard(dreamer, Strong(), horizon=2).predict(observe(2))
    assert actions.tolist() == [[2.0], [2.0]]


@pytest.mark.parametrize("given", [np.zeros((2, 1)), (np.zeros((2, 3)), None)], ids=["no pair", "too many"])
def test_a_controller_that_returns_invalid_actions_is_named(dreamer: Dreamer, given: Any):
    class Wrong:
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            return given

    with (
        continues_with(dreamer, 0.0),
        pytest.raises(
            ValueError, match=r"(?s)the fallback's predict\(\) returned .* for 2 observations: it must return a pair"
        ),
    ):
        Guard(dreamer, Wrong(), horizon=2).predict(observe(2))


def test_a_controller_that_returns_nan_is_named(dreamer: Dreamer):
    with pytest.raises(ValueError, match=r"the fallback's predict\(\) returned NaN"):
        Guard(dreamer, Constant(dreamer, np.nan), horizon=2).predict(observe(2))


def test_a_controller_that_cannot_be_called_as_in_sb3_is_refused(dreamer: Dreamer):
    class Simple:
        def predict(self, obs):
            return np.zeros((len(obs), 1), np.float32)

    with pytest.raises(TypeError, match=r"the fallback has predict\(obs\): it is called as in SB3"):
        Guard(dreamer, Simple())


class FromTwo(gym.Env[np.ndarray, np.int64]):
    """Choices with a start of 2."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2, start=2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: np.int64) -> Any:
        assert action in self.action_space
        return np.zeros(3, np.float32), 1.0, False, False, {}


def test_choices_may_have_a_start_if_no_algorithm_of_sb3_is_involved():
    class Second:
        def predict(self, obs, state=None, episode_start=None, deterministic=False):
            return np.full(len(obs), 3), None

    model = Dreamer("MlpPolicy", FromTwo(), **SMALL)
    with continues_with(model, 0.0):
        for fallback in (Second(), model):
            assert Guard(model, fallback, horizon=2).predict(observe(2))[0].min() >= 2
        assert Guard(model, Second(), horizon=2).predict(observe(2))[0].tolist() == [3, 3]
    with pytest.raises(ValueError, match="count from 0"):
        Guard(model, PPO("MlpPolicy", "CartPole-v1", device="cpu"))


def test_it_can_be_evaluated_as_any_policy(dreamer: Dreamer):
    guard = Guard(dreamer, PPO("MlpPolicy", pendulum(), device="cpu"), horizon=2)
    mean, _ = evaluate_policy(guard, VecMonitor(pendulum(2)), n_eval_episodes=2)
    assert -500 < mean < 0
    assert guard.decisions == 100


def test_what_cannot_work_is_refused(dreamer: Dreamer, tmp_path):
    fallback = Constant(dreamer)
    for wrong in (dict(horizon=0), dict(n_dreams=0), dict(every=0)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            Guard(dreamer, fallback, **wrong)
    with pytest.raises(ValueError, match=r"max_risk=1.5 must be from 0 to 1"):
        Guard(dreamer, fallback, max_risk=1.5)
    with pytest.raises(ValueError, match="the fallback's observations are"):
        Guard(dreamer, SAC("MlpPolicy", "MountainCarContinuous-v0", buffer_size=10, device="cpu"))
    dreamer.save(tmp_path / "alone")
    with pytest.raises(ValueError, match="needs a model with an environment"):
        Guard(Dreamer.load(tmp_path / "alone", device="cpu"), fallback)


def test_a_fallback_with_a_memory_observes_what_was_done_in_its_place(dreamer: Dreamer):
    guard = Guard(dreamer, dreamer)
    _, state = guard.predict(observe(2), deterministic=True)
    taken = np.array([[0.5], [-1.5]], np.float32)
    new_state = guard.with_action(state, taken)
    encoded = dreamer.policy.actions.encode(taken)
    assert not np.allclose(state.action, encoded)
    np.testing.assert_array_equal(new_state.action, encoded)
    np.testing.assert_array_equal(new_state.memory[1], encoded)
    np.testing.assert_array_equal(new_state.memory[0], state.memory[0])
