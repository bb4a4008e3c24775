"""predict(): a state for each environment, as RecurrentPPO carries it."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dreamer import Dreamer
from sb3_dreamer.policies import DreamerPolicy, MlpPolicy

DEBUG = dict(model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=500, train_ratio=8,
             imagination_horizon=2, imagination_starts=2, seed=0, device="cpu")  # fmt: skip


class Spaces(gym.Env):
    """Observations and actions of the given spaces, episodes of six steps."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 6
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, {}


LINE = spaces.Box(-1, 1, (3,))
FORCE = spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0]), dtype=np.float64)


@pytest.fixture(scope="module")
def model() -> Dreamer:
    return Dreamer("MlpPolicy", Spaces(LINE, FORCE), **DEBUG).learn(40)


def observations(n: int) -> np.ndarray:
    return np.random.default_rng(n).uniform(-1, 1, (n, 3)).astype(np.float32)


def equal(first, second) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_single_observation_gives_a_single_action_of_the_space(model):
    action, state = model.predict(observations(1)[0])
    assert (action.shape, action.dtype) == ((2,), np.float64)
    assert FORCE.contains(action)
    assert [part.shape[0] for part in state] == [1, 1]
    assert all(isinstance(part, np.ndarray) and part.dtype == np.float32 for part in state)


def test_forgetting_the_state_is_noticed_at_the_tenth_call_in_a_row(model):
    last, *rest = observations(10)
    model.predict(last, model.policy.initial_state(1))
    for obs in rest:
        model.predict(obs)
    for obs in rest:
        model.predict(obs, episode_start=np.ones(1))  # each begins an episode, which is what no state means
    for obs in rest:
        model.predict(obs)
    with pytest.warns(UserWarning, match="10 times in a row without a state.*model.predict\\(obs, state") as noticed:
        model.predict(last)
    assert noticed[0].filename == __file__


def test_a_batch_may_have_another_size_than_the_training(model):
    actions, state = model.predict(observations(5))
    assert actions.shape == (5, 2)
    assert [part.shape[0] for part in state] == [5, 5]
    model.predict(observations(5), state, np.zeros(5, bool))


def test_each_environment_has_a_state_of_its_own(model):
    together, state = model.predict(observations(4), deterministic=True)
    together, state = model.predict(observations(4)[::-1], state, deterministic=True)
    for i in range(4):
        _, alone = model.predict(observations(4)[i], deterministic=True)
        action, alone = model.predict(observations(4)[::-1][i], alone, deterministic=True)
        assert action == pytest.approx(together[i], abs=1e-5)
        assert alone[0][0] == pytest.approx(state[0][i], abs=1e-5)


def test_the_past_matters_until_an_episode_starts(model):
    obs = observations(2)
    fresh, fresh_state = model.predict(obs, deterministic=True)
    _, state = model.predict(observations(2)[::-1], deterministic=True)
    _, carried = model.predict(obs, state, deterministic=True)
    assert not np.array_equal(carried[0][0], fresh_state[0][0])
    half, half_state = model.predict(obs, state, np.array([True, False]), deterministic=True)
    assert np.array_equal(half[0], fresh[0])
    assert np.array_equal(half_state[0][0], fresh_state[0][0])
    assert np.array_equal(half_state[0][1], carried[0][1])


@pytest.mark.parametrize(
    "start", [None, np.array([False, False]), np.array([0.0, 0.0]), np.array([1, 1]), [True, True]]
)
def test_without_a_state_every_mask_means_a_start(model, start):
    first, second = (
        model.predict(observations(2), None, start, True),
        model.predict(observations(2), deterministic=True),
    )
    assert np.array_equal(first[0], second[0])
    assert equal(first[1], second[1])


@pytest.mark.parametrize("start", [True, np.True_, np.array(True), np.array([True])])
def test_one_observation_may_come_with_one_mask(model, start):
    fresh, _ = model.predict(observations(1)[0], deterministic=True)
    _, state = model.predict(observations(3)[0], deterministic=True)
    again, _ = model.predict(observations(1)[0], state, start, deterministic=True)
    assert np.array_equal(again, fresh)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (3, 2), (2, 1)])
def test_a_state_of_other_environments_is_refused(model, before, now):
    _, state = model.predict(observations(before))
    with pytest.raises(ValueError, match=rf"a state of \[\({before}, .*, expected \[\({now}, .* state=None"):
        model.predict(observations(now), state, np.zeros(now, bool))


def test_a_state_of_another_agent_or_of_none_is_refused(model):
    _, state = model.predict(observations(2))
    for other, told in (((state[0][:, :5], state[1]), r"\[\(2, 5\), \(2, 2\)\]"), (state[0], "ndarray")):
        with pytest.raises(ValueError, match=f"a state of {told}, expected "):
            model.predict(observations(2), other)


def test_a_state_in_double_precision_is_the_same_one(model):
    _, state = model.predict(observations(2))
    doubled = tuple(part.astype(np.float64) for part in state)
    first, second = (model.predict(observations(2), given, deterministic=True)[0] for given in (state, doubled))
    assert np.array_equal(first, second)


def test_the_state_handed_in_is_not_changed(model):
    _, state = model.predict(observations(3))
    before = [part.copy() for part in state]
    model.predict(observations(3), state, np.array([True, False, True]))
    assert equal(state, before)


def test_deterministic_actions_draw_no_random_numbers_and_sampled_ones_do(model):
    before = th.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    first, second = (model.predict(observations(2), deterministic=True)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert th.equal(th.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])  # noqa: NPY002
    assert not np.array_equal(model.predict(observations(2))[0], model.predict(observations(2))[0])


def test_predict_leaves_the_training_environments_alone(model):
    online = [part.copy() for part in model._online_state]
    model.predict(observations(1))
    assert equal(model._online_state, online)


def test_the_tuple_of_gymnasium_is_refused(model):
    with pytest.raises(ValueError, match="pass the observation alone"):
        model.predict((observations(1)[0], {}))


def test_observations_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match="shape"):
        model.predict(np.zeros(4, np.float32))


def test_actions_reach_both_bounds_and_never_pass_them(model):
    actions = model.policy.actions.decode(np.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]], np.float32))
    assert actions.tolist() == [[-2.0, 0.0], [2.0, 10.0], [0.0, 7.5]]
    assert model.policy.actions.decode(np.array([[-9.0, 9.0]], np.float32)).tolist() == [[-2.0, 10.0]]
    assert model.policy.actions.encode(actions).tolist() == [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]]


def test_discrete_actions_are_integers(model):
    discrete = Dreamer("MlpPolicy", Spaces(LINE, spaces.Discrete(3)), **DEBUG)
    action, _ = discrete.predict(observations(1)[0])
    assert (action.shape, action.dtype) == ((), np.int64)
    actions, _ = discrete.predict(observations(6))
    assert actions.shape == (6,)
    assert set(actions) <= {0, 1, 2}


def test_images_may_have_their_channels_last_as_the_environment_gives_them():
    space = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    model = Dreamer("CnnPolicy", Spaces(space, spaces.Discrete(2)), **DEBUG)
    assert model.observation_space.shape == (3, 16, 16)
    image = space.sample()
    _, last = model.predict(image, deterministic=True)
    _, first = model.predict(image.transpose(2, 0, 1), deterministic=True)
    assert equal(first, last)
    actions, _ = model.predict(np.stack([image, image]))
    assert actions.shape == (2,)


def test_dict_observations_are_taken_single_and_batched():
    space = spaces.Dict(a=LINE, b=spaces.Discrete(4))
    model = Dreamer("MultiInputPolicy", Spaces(space, FORCE), **DEBUG)
    assert model.predict(space.sample())[0].shape == (2,)
    batch = {"a": observations(3), "b": np.array([0, 1, 3])}
    actions, state = model.predict(batch)
    assert actions.shape == (3, 2)
    model.predict(batch, state, np.array([False, True, False]))


@pytest.mark.parametrize("given", [dict(b=1), dict(a=np.zeros(3), b=1, c=1), np.zeros(3, np.float32), {}])
def test_an_observation_with_other_keys_is_refused(given):
    model = Dreamer("MultiInputPolicy", Spaces(spaces.Dict(a=LINE, b=spaces.Discrete(4)), FORCE), **DEBUG)
    with pytest.raises(ValueError, match=r"predict\(\) got .*, observations .* are a dict with \['a', 'b'\]"):
        model.predict(given)


def test_evaluate_policy_works_on_several_environments(model):
    env = DummyVecEnv([lambda: Monitor(Spaces(LINE, FORCE))] * 3)
    mean, std = evaluate_policy(model, env, n_eval_episodes=5, warn=False)
    assert (mean, std) == (6.0, 0.0)
    rewards, lengths = evaluate_policy(model, env, 4, deterministic=False, return_episode_rewards=True)
    assert (rewards, lengths) == ([6.0] * 4, [6] * 4)


def test_the_policy_alone_survives_its_file(model, tmp_path):
    wide = Dreamer("MlpPolicy", Spaces(LINE, FORCE), policy_kwargs=dict(units=24), gamma=0.9, **DEBUG)
    for trained in (model, wide):
        trained.policy.save(tmp_path / "policy.pth")
        policy = MlpPolicy.load(tmp_path / "policy.pth", device="cpu")
        assert isinstance(policy, DreamerPolicy)
        assert policy.world_model.gamma == trained.gamma
        expected = trained.predict(observations(2), deterministic=True)
        loaded = policy.predict(observations(2), deterministic=True)
        assert np.array_equal(loaded[0], expected[0])
        assert equal(loaded[1], expected[1])


def test_episode_starts_of_other_environments_are_refused():
    model = Dreamer("MlpPolicy", "Pendulum-v1", **DEBUG)
    with pytest.raises(ValueError, match="episode_start has 3 entries for 2 observations"):
        model.predict(np.zeros((2, 3), np.float32), episode_start=np.ones(3, bool))


def test_the_policy_can_be_called_as_those_of_sb3(model):
    action = model.policy(model.policy.obs_to_tensor(np.zeros((2, *model.observation_space.shape), np.float32))[0])
    assert action.shape == (2, *model.action_space.shape)
    assert action.abs().max() <= 1


@pytest.mark.parametrize("wrong", [1, 5])
def test_choices_that_there_are_not_are_refused(wrong: int):
    model = Dreamer("MlpPolicy", Spaces(LINE, spaces.Discrete(3, start=2)), **DEBUG)
    np.testing.assert_array_equal(model.policy.actions.encode(np.array([2, 4])), [[1, 0, 0], [0, 0, 1]])
    with pytest.raises(ValueError, match=r"not all of them are in Discrete\(3, start=2\)"):
        model.policy.actions.encode(np.array([2, wrong]))
