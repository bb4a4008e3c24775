import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.dreams import OpenLoop, collect, horizon_errors, open_loop
from sb3_dreamer.dreams.horizon import REWARD, HorizonError, horizon_error
from sb3_dreamer.dreams.open_loop import Pair, numbers
from sb3_dreamer.types import Spec
from tests.dreams.dial import Dial, train_world_model

SMALL = dict(model_size="debug", batch_size=8, batch_length=16, seed=0)
WIDTHS = dict(stoch=8, classes=8, deter=64, hidden=32, units=32)


@pytest.fixture(scope="module")
def dreams() -> OpenLoop:
    """Dreams on fresh data, of a world model that was trained on random actions. About 15 seconds."""
    model = Dreamer(
        "MlpPolicy", Dial(), model_size="debug", policy_kwargs=WIDTHS, seed=0, batch_size=8, batch_length=16
    )
    env = DummyVecEnv([Dial] * 4)
    env.seed(1)
    model.replay_buffer, _ = collect(model, env, 600, sequence_length=16, random_actions=True)
    train_world_model(model, 600)
    env.seed(2)
    fresh, _ = collect(model, env, 900, sequence_length=24, random_actions=True)
    return open_loop(model.policy, fresh.peek(96), context=6, samples=32)


def part(loop: OpenLoop, dims: slice) -> Pair:
    return Pair(loop.obs["obs"].truth[..., dims], loop.obs["obs"].dream[..., dims])


def test_where_the_future_follows_from_the_actions_the_dream_is_right_at_every_step(dreams: OpenLoop):
    error = horizon_error(part(dreams, slice(0, 2)), Spec("vector", (2,)), dreams)
    assert len(error.dream) == 18
    assert error.dream.max() < 0.4
    assert error.persistence.min() > 0.7
    assert error.ratio() < 1 / 3


def test_of_what_a_coin_decides_no_more_is_dreamed_than_can_be_known(dreams: OpenLoop):
    error = horizon_error(part(dreams, slice(2, 3)), Spec("vector", (1,)), dreams)
    possible = np.sqrt(1 - 0.64 ** np.arange(1, 19))  # spread of the spring after k kicks, as a share of its last one
    np.testing.assert_allclose(error.dream, possible, atol=0.3)
    assert error.persistence[-1] > 1.2


def test_the_band_covers_what_a_coin_decides_about_as_often_as_it_claims(dreams: OpenLoop):
    error = horizon_error(part(dreams, slice(2, 3)), Spec("vector", (1,)), dreams)
    np.testing.assert_allclose(error.coverage.mean(), 0.8, atol=0.1)
    assert 1 < error.overconfidence < 3


def test_the_dream_knows_reward_and_that_nothing_ends(dreams: OpenLoop):
    assert horizon_errors(dreams)["reward"].dream[:10].mean() < 0.6
    np.testing.assert_allclose(dreams.cont.dream[:, dreams.valid], 1.0, atol=0.02)


def test_context_is_seen_and_what_follows_is_not(dreams: OpenLoop):
    assert dreams.obs["obs"].truth.shape == (96, 24, 3)
    assert dreams.obs["obs"].dream.shape == (32, 96, 24, 3)
    assert dreams.reward.dream.shape == dreams.value.dream.shape == (32, 96, 24)
    spring = part(dreams, slice(2, 3))
    missed = np.abs(spring.truth - spring.dream.mean(0))
    assert missed[:, :6].mean() < 1 < missed[:, 12:].mean()


def test_a_dream_does_not_depend_on_what_comes_after_the_context():
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Dial]), 60, sequence_length=12)
    batch = replay.peek(4)
    changed = batch.obs["obs"] + (th.arange(12)[:, None] >= 5)
    th.manual_seed(3)
    first = open_loop(model.policy, batch, context=5, samples=2)
    th.manual_seed(3)
    other = open_loop(model.policy, dataclasses.replace(batch, obs={"obs": changed}), context=5, samples=2)
    np.testing.assert_array_equal(other.obs["obs"].dream, first.obs["obs"].dream)
    np.testing.assert_array_equal(other.obs["obs"].truth, changed)


@pytest.mark.parametrize("context", [0, 12])
def test_context_has_to_leave_something_to_dream(context: int):
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Dial]), 60, sequence_length=12)
    with pytest.raises(ValueError, match=f"context={context} must be between 1 and 11: sequences have 12 entries"):
        open_loop(model.policy, replay.peek(4), context=context)


def loop_of(truth: np.ndarray, dream: np.ndarray, valid: np.ndarray, context: int) -> OpenLoop:
    """By hand, with observations alone."""
    scalars = Pair(truth[..., 0], dream[..., 0])
    return OpenLoop(
        {"obs": Spec("vector", (1,))}, {"obs": Pair(truth, dream)}, scalars, scalars, scalars, valid, context
    )


def test_errors_of_a_hand_made_dream():
    truth = np.array([[0.0, 2.0, 4.0, 6.0], [6.0, 4.0, 2.0, 0.0]])[..., None]  # mean 3, standard deviation sqrt(5)
    dream = np.stack([truth + 1, truth + 3])  # the mean dream is 2 too high
    loop = loop_of(truth, dream, np.ones((2, 4), bool), context=2)
    error = horizon_error(loop.obs["obs"], loop.specs["obs"], loop)
    np.testing.assert_allclose(error.dream, np.array([2, 2]) / np.sqrt(5))
    np.testing.assert_allclose(error.persistence, np.array([2, 4]) / np.sqrt(5))
    np.testing.assert_allclose(error.mean, np.array([1, 3]) / np.sqrt(5))
    assert error.steps == [1]
    np.testing.assert_allclose(error.ratio(), 2 / 3)


def test_steps_behind_an_episode_start_do_not_count():
    truth = np.array([[0.0, 0.0, 0.0, 100.0], [0.0, 0.0, 1.0, 1.0]])[..., None]
    dream = np.zeros((3, 2, 4, 1))
    valid = np.array([[True, True, True, False], [True, True, True, False]])
    loop = loop_of(truth, dream, valid, context=2)
    error = horizon_error(loop.obs["obs"], loop.specs["obs"], loop)
    np.testing.assert_allclose(error.dream[0], np.sqrt(0.5) / truth.std())
    assert np.isnan([error.dream[1], error.persistence[1], error.mean[1], error.coverage[1]]).all()


@pytest.mark.parametrize("spread", [0.5, 1.0, 4.0])
def test_the_band_keeps_its_word_however_sure_the_dreams_are(spread: float):
    rng = np.random.default_rng(0)
    truth, dream = rng.normal(size=(400, 12, 1)), spread * rng.normal(size=(200, 400, 12, 1))
    dream[:, :, :2] = truth[:, :2]  # the decoder makes no errors at what it sees
    loop = loop_of(truth, dream, np.ones((400, 12), bool), context=2)
    error = horizon_error(loop.obs["obs"], loop.specs["obs"], loop)
    np.testing.assert_allclose(error.coverage.mean(), 0.8, atol=0.03)
    np.testing.assert_allclose(error.overconfidence, 1 / spread, rtol=0.05)


def test_numbers_of_images_and_integers():
    image = np.full((1, 2, 1, 4, 4), 51, np.uint8)
    np.testing.assert_allclose(numbers(image, Spec("image", (1, 4, 4))), np.full((1, 2, 16), 0.2), rtol=1e-6)
    np.testing.assert_array_equal(numbers(np.array([[1]]), Spec("discrete", (), (3,), (0,))), [[[0.0, 1.0, 0.0]]])
    assert numbers(np.zeros((2, 3)), REWARD).shape == (2, 3, 1)


def test_peek_leaves_the_replay_as_it_was():
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Dial]), 80, sequence_length=12)
    first, second = replay.peek(4), replay.peek(4)
    np.testing.assert_array_equal(first.index, second.index)
    np.testing.assert_array_equal(replay.sample(4).index, first.index)


def test_collect_keeps_whole_episodes_and_scaled_actions():
    env = gym.make("Pendulum-v1")
    model = Dreamer("MlpPolicy", env, model_size="debug", seed=0)
    replay, real_return = collect(model, env, 401, sequence_length=50, random_actions=True)
    assert replay.size() == 401 + 2  # two episodes of 200 actions have 201 entries each
    batch = replay.peek(8)
    assert 0.9 < batch.prev_action.abs().max() <= 1.0
    assert real_return < -300  # chance earns some -6 a step, discounted by 0.99


def test_what_does_not_change_is_no_reference(dreams: OpenLoop):
    """Constants, as most entries of Humanoid's observation, whose deviation float32 makes up; goals of an episode."""
    truth, dream = np.full((4, 10, 2), 123.4, np.float32), np.full((2, 4, 10, 2), 123.45, np.float32)
    truth[..., 1] += np.arange(4, dtype=np.float32)[:, None]  # one goal for each episode
    loop = dataclasses.replace(dreams, valid=np.ones((4, 10), bool), context=2)
    error = horizon_error(Pair(truth, dream), Spec("vector", (2,)), loop)
    assert error.dream.max() < 2
    assert np.isnan(error.ratio())


def test_the_ratio_is_of_the_first_steps_if_asked_for(dreams: OpenLoop):
    error = HorizonError(np.array([1.0, 3.0, np.nan]), np.array([2.0, 4.0, np.nan]), np.ones(3), np.ones(3), 1.0)
    assert (error.ratio(1), error.ratio()) == (1 / 2, 2 / 3)


@pytest.mark.parametrize("random_actions", [False, True])
def test_what_is_collected_has_the_latents_of_who_acted(random_actions: bool):
    model = Dreamer("MlpPolicy", Dial(), model_size="debug", seed=0)
    replay, _ = collect(model, DummyVecEnv([Dial]), 20, sequence_length=8, random_actions=random_actions)
    rssm = model.policy.world_model.rssm
    kept = th.as_tensor(replay._storage.arrays["latent"][:20], dtype=th.float32)
    onehot = rssm.restore(kept).stoch.unflatten(-1, (rssm.classes, rssm.stoch))
    assert (onehot.sum(-2) == 1).all(), "one class of each latent"
    deter, before = rssm.restore(kept).deter, th.zeros(1, rssm.packed_width)
    batch = replay.peek(1)
    first = int(batch.index[0, 1])
    if first:
        before = rssm.pack(rssm.restore(kept[first - 1 : first]))
    obs = {key: part[:, 0] for key, part in batch.obs.items()}
    with th.no_grad():
        state = model.policy.observe(obs, before, batch.prev_action[:, 0], batch.is_first[:, 0])
    np.testing.assert_allclose(deter[first], state.deter[0], atol=5e-3)


def test_what_is_collected_under_vecnormalize_has_fractions_of_whole_numbers():
    class Whole(Dial):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-1000, 1000, (3,), np.int64)

        def _observe(self) -> np.ndarray:
            return np.rint(10 * super()._observe()).astype(np.int64)

    env = VecNormalize(DummyVecEnv([Whole]))
    model = Dreamer("MlpPolicy", env, model_size="debug", seed=0)
    env.obs_rms.update(np.array([[3.0, 5.0, 0.5], [-4.0, 2.0, 7.5]]))
    count = env.obs_rms.count
    replay, _ = collect(model, env, 20, sequence_length=8)
    obs = replay.peek(4).obs["obs"]
    assert (obs != obs.round()).any()
    assert env.obs_rms.count == count, "to look at a model does not change what it is given"
    assert env.training
