"""The world model as a VecEnv: SB3's contract, and the model's numbers."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import DreamVecEnv, Guard, LatentVecEnv
from sb3_dreamer.hybrid.dream_env import STARTS_PER_DREAM
from sb3_dreamer.hybrid.real_states import real_states
from sb3_dreamer.nets import layers
from sb3_dreamer.planning import Planner
from tests.hybrid.conftest import SMALL, pendulum


def push(env: DreamVecEnv) -> np.ndarray:
    return np.full((env.num_envs, 1), 1.0, np.float32)


def test_dreams_start_from_real_states(dreamer: Dreamer):
    obs = DreamVecEnv(dreamer, 8).reset()
    stored = dreamer.replay_buffer._storage.arrays["obs/obs"]
    assert obs.shape == (8, 3)
    assert all((stored == one).all(-1).any() for one in obs)


class Anything(gym.Env):
    """Random observations of a space."""

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    "space", [spaces.Discrete(5), spaces.Box(-1, 1, (2,), np.float64), spaces.Box(0, 9, (2,), np.int16)], ids=str
)
def test_observations_are_of_the_spaces_own_type_from_the_start(space: spaces.Space):
    env = Anything(space)
    dreams = DreamVecEnv(Dreamer("MlpPolicy", env, **SMALL).learn(60), 3)
    real = np.asarray(space.sample()).dtype
    assert dreams.reset().dtype == dreams.step(np.zeros(3, int))[0].dtype == real


def test_the_state_belongs_to_the_observation(dreamer: Dreamer):
    env = DreamVecEnv(dreamer, 16, horizon=1)
    real = real_states(dreamer, 16 * STARTS_PER_DREAM)

    def check(obs: np.ndarray) -> None:
        for packed, one in zip(dreamer.policy.world_model.rssm.pack(env._state), obs, strict=True):
            (moment,) = (real.packed == packed).all(-1).nonzero().flatten().tolist()
            np.testing.assert_array_equal(real.obs["obs"][moment], one)

    check(env.reset())
    obs, _, dones, _ = env.step(push(env))
    assert dones.all()
    check(obs)


def test_a_step_is_the_models(monkeypatch: pytest.MonkeyPatch):
    model = Dreamer("MlpPolicy", pendulum(2), **SMALL).learn(60)
    world_model = model.policy.world_model
    with th.no_grad():  # at the start rewards are near zero, and without biases a norm sees the sign of an action alone
        world_model.reward_head.out.weight.normal_(0, 0.2)
        for name, weight in world_model.rssm.sequence.named_parameters():
            if "action" in name:
                weight.normal_()
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: False)
    env = DreamVecEnv(model, 64)
    env.reset()
    state = env._state
    th.manual_seed(5)
    obs, rewards, dones, infos = env.step(push(env))
    th.manual_seed(5)
    with th.no_grad():
        features = world_model.rssm.imagine_step(state, th.full((64, 1), 0.5)).features
        expected, decoded = world_model.predict_reward(features), world_model.predict_obs(features)["obs"].numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)
    inside = decoded.clip(env.observation_space.low, env.observation_space.high)
    np.testing.assert_allclose(obs[~dones], inside[~dones], rtol=1e-4, atol=1e-5)
    assert (rewards.dtype, dones.dtype, obs.dtype, len(infos)) == (np.float32, bool, np.float32, 64)


def test_the_horizon_is_a_time_limit_with_the_last_observation(dreamer: Dreamer):
    env = DreamVecEnv(dreamer, 4, horizon=3)
    dreamer.policy.world_model.continue_head[-1].bias.data.add_(50.0)  # never terminal
    try:
        env.reset()
        for last in (False, False, True):
            obs, _, dones, infos = env.step(push(env))
            assert dones.tolist() == [last] * 4
    finally:
        dreamer.policy.world_model.continue_head[-1].bias.data.sub_(50.0)
    assert all(info["TimeLimit.truncated"] for info in infos)
    assert not np.allclose(np.stack([info["terminal_observation"] for info in infos]), obs)
    assert env._age.tolist() == [0] * 4


def test_the_model_terminates_dreams(dreamer: Dreamer):
    env = DreamVecEnv(dreamer, 4)
    env.reset()
    dreamer.policy.world_model.continue_head[-1].bias.data.sub_(50.0)
    try:
        _, _, dones, infos = env.step(push(env))
    finally:
        dreamer.policy.world_model.continue_head[-1].bias.data.add_(50.0)
    assert dones.all()
    assert not any(info["TimeLimit.truncated"] for info in infos)


def test_terminations_are_sampled_with_their_probability(dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        dreamer.policy.world_model, "predict_continue", lambda features: th.full(features.shape[:-1], 0.7)
    )
    th.manual_seed(0)
    env = DreamVecEnv(dreamer, 2_000)
    env.reset()
    _, _, dones, infos = env.step(push(env))
    assert abs(dones.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2_000)
    assert not any(infos[i]["TimeLimit.truncated"] for i in np.flatnonzero(dones))


def test_a_step_before_the_first_reset_is_refused(dreamer: Dreamer):
    env = DreamVecEnv(dreamer, 2)
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\)"):
        env.step(push(env))


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.zeros((1, 1)), r"actions have shape \(1, 1\), 3 dreams need \(3, 1\)"),
        (np.zeros((3, 2)), r"actions have shape \(3, 2\), 3 dreams need \(3, 1\)"),
        (np.array([[0.0], [np.nan], [0.0]]), "actions contain NaN or infinite values"),
    ],
)
def test_actions_of_another_shape_or_not_finite_are_refused(dreamer: Dreamer, actions: np.ndarray, words: str):
    env = DreamVecEnv(dreamer, 3)
    env.reset()
    with pytest.raises(ValueError, match=words):
        env.step(actions)


def test_ppo_trains_in_it_unchanged_and_the_model_stays_as_it_is(dreamer: Dreamer):
    before = {name: value.clone() for name, value in dreamer.policy.state_dict().items()}
    steps = dreamer.num_timesteps
    PPO("MlpPolicy", DreamVecEnv(dreamer, 16, horizon=5), n_steps=8, batch_size=64, device="cpu").learn(256)
    assert dreamer.num_timesteps == steps
    assert all(th.equal(before[name], value) for name, value in dreamer.policy.state_dict().items())


@pytest.mark.parametrize(("n_envs", "horizon"), [(0, 5), (4, 0)])
def test_invalid_values_are_refused(dreamer: Dreamer, n_envs: int, horizon: int):
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        DreamVecEnv(dreamer, n_envs, horizon)


def test_one_dream_of_an_agent_with_many_environments():
    model = Dreamer("MlpPolicy", pendulum(20), **SMALL).learn(800)
    assert DreamVecEnv(model, n_envs=1, horizon=5).reset().shape == (1, 3)


@pytest.mark.parametrize(
    "use",
    [Planner, DreamVecEnv, lambda ppo: Guard(ppo, ppo), lambda ppo: LatentVecEnv(ppo, ppo.env)],
    ids=["Planner", "DreamVecEnv", "Guard", "LatentVecEnv"],
)
def test_an_algorithm_without_a_world_model_is_refused(use):
    with pytest.raises(TypeError, match="uses the world model of a Dreamer, and PPO has none"):
        use(PPO("MlpPolicy", pendulum(), device="cpu"))


def test_an_empty_replay_is_refused():
    with pytest.raises(ValueError, match="DreamVecEnv needs experience"):
        DreamVecEnv(Dreamer("MlpPolicy", pendulum(), **SMALL))


def test_no_real_environment_is_behind_it(dreamer: Dreamer):
    with pytest.raises(AttributeError, match="only the real environment has"):
        DreamVecEnv(dreamer, 2).env_method("close_door")


class TestFromAGivenState:
    def test_all_dreams_start_there(self, dreamer: Dreamer):
        obs = np.array([[0.6, -0.8, 1.0]], np.float32)
        _, state = dreamer.predict(obs, deterministic=True)
        env = DreamVecEnv(dreamer, 4, start=state)
        seen = env.reset()
        decoded = dreamer.policy.world_model.rssm.unpack(th.as_tensor(state[0])).features
        with th.no_grad():
            expected = dreamer.policy.world_model.predict_obs(decoded)["obs"].numpy()
        np.testing.assert_allclose(seen, np.repeat(expected, 4, 0).clip(*pendulum_bounds(env)), atol=1e-5)

    def test_they_start_there_again_when_they_have_ended(self, dreamer: Dreamer):
        _, state = dreamer.predict(np.array([[0.6, -0.8, 1.0]], np.float32), deterministic=True)
        env = DreamVecEnv(dreamer, 4, horizon=1, start=state)
        first = env.reset()
        again, _, dones, _ = env.step(push(env))
        assert dones.all()
        np.testing.assert_array_equal(again, first)

    def test_no_replay_is_needed(self):
        model = Dreamer("MlpPolicy", pendulum(), **SMALL)
        _, state = model.predict(np.array([[0.6, -0.8, 1.0]], np.float32))
        DreamVecEnv(model, 2, start=state).reset()

    @pytest.mark.parametrize("shape", [(2, 5), (5,)])
    def test_a_state_of_another_model_is_refused(self, dreamer: Dreamer, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match="give the state that predict"):
            DreamVecEnv(dreamer, 2, start=(np.zeros(shape, np.float32), np.zeros((2, 1), np.float32)))

    def test_a_state_that_is_not_finite_is_refused(self, dreamer: Dreamer):
        packed, action = dreamer.policy.initial_state(1)
        packed[0, 3] = np.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            DreamVecEnv(dreamer, 2, start=(packed, action))

    def test_an_empty_state_is_refused(self, dreamer: Dreamer):
        packed, action = dreamer.policy.initial_state(0)
        with pytest.raises(ValueError, match="give the state that predict"):
            DreamVecEnv(dreamer, 2, start=(packed, action))

    def test_a_state_that_its_owner_changes_later_changes_no_dream(self, dreamer: Dreamer):
        _, state = dreamer.predict(np.array([[0.6, -0.8, 1.0]], np.float32), deterministic=True)
        env = DreamVecEnv(dreamer, 4, start=state)
        first = env.reset()
        state[0][:] = 9.0
        env._restart(np.arange(4), np.ones(4, bool), {"obs": first.copy()}, [{} for _ in range(4)])
        assert env._state.features.abs().max() < 9.0


def pendulum_bounds(env: DreamVecEnv) -> tuple[np.ndarray, np.ndarray]:
    return env.observation_space.low, env.observation_space.high
