"""The replay buffer in memory: what an entry is, what is served, what is refused."""

import pickle
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.replay.columns import Column
from sb3_dreamer.replay.storage import RamStorage
from sb3_dreamer.types import Batch

LINE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
STICK = spaces.Box(-1.0, 1.0, (1,), np.float32)


def make(
    buffer_size: int = 20, obs: spaces.Space = LINE, act: spaces.Space = STICK, **kwargs: Any
) -> SequenceReplayBuffer:
    return SequenceReplayBuffer(buffer_size, obs, act, "cpu", **{"sequence_length": 3, **kwargs})


def step(
    buffer: SequenceReplayBuffer,
    obs: float,
    action: float = 0.0,
    reward: float = 0.0,
    last: float | None = None,
    timeout: bool = False,
    latent: float | None = None,
) -> None:
    """One step of one environment with numbers for everything; ``last`` is the observation that ends the episode."""
    info = {} if last is None else {"terminal_observation": np.array([last]), "TimeLimit.truncated": timeout}
    packed = None if latent is None else np.full((1, buffer.latent_size), latent)
    done = np.array([last is not None])
    buffer.add(np.array([[obs]]), np.zeros((1, 1)), np.array([[action]]), np.array([reward]), done, [info], packed)


def walk(buffer: SequenceReplayBuffer, first: int, until: int) -> None:
    """Steps of an episode that does not end, observed as first, first + 1, ..."""
    for number in range(first, until):
        step(buffer, number)


def starts(batch: Batch) -> list[int]:
    return batch.index[:, 1].tolist()


def two_episodes(timeout: bool = False) -> SequenceReplayBuffer:
    buffer = make(sequence_length=5)
    step(buffer, obs=10, action=0.1, reward=1)
    step(buffer, obs=11, action=0.2, reward=2)
    step(buffer, obs=12, action=0.3, reward=3, last=13, timeout=timeout)
    step(buffer, obs=20, action=0.4, reward=4)
    return buffer


class TestTime:
    def test_an_episode_of_three_actions_has_four_entries_and_the_next_one_follows(self):
        batch = two_episodes().sample(1)
        assert batch.obs["obs"].tolist() == [[[10], [11], [12], [13], [20]]]
        assert batch.reward.tolist() == [[0, 1, 2, 3, 0]]
        np.testing.assert_allclose(batch.prev_action[0, :, 0], [0.0, 0.1, 0.2, 0.3, 0.0])
        assert batch.is_first.int().tolist() == [[1, 0, 0, 0, 1]]
        assert batch.is_last.int().tolist() == [[0, 0, 0, 1, 0]]
        assert batch.is_terminal.int().tolist() == [[0, 0, 0, 1, 0]]

    def test_a_time_limit_is_last_but_not_terminal(self):
        batch = two_episodes(timeout=True).sample(1)
        assert batch.is_last.int().tolist() == [[0, 0, 0, 1, 0]]
        assert not batch.is_terminal.any()

    def test_an_episode_of_one_step_has_two_entries(self):
        buffer = make(sequence_length=2)
        step(buffer, obs=1, action=0.5, reward=7, last=2)
        batch = buffer.sample(1)
        assert batch.obs["obs"].flatten().tolist() == [1, 2]
        assert batch.reward.tolist() == [[0, 7]]
        assert batch.is_first.tolist() == [[True, False]]
        assert batch.is_last.tolist() == [[False, True]]

    def test_a_sequence_from_the_middle_knows_the_action_before_it(self):
        buffer = make(sequence_length=2)
        for number in range(3):
            step(buffer, number, action=(number + 1) / 10)
        batch = buffer.sample(50)
        middle = batch.index[:, 1] == 1
        np.testing.assert_allclose(batch.prev_action[middle][0, :, 0], [0.1, 0.2])

    def test_cut_ends_the_episode_without_a_terminal_and_drops_the_pending_reward(self):
        buffer = make(sequence_length=4)
        step(buffer, obs=1, reward=5, action=0.1)
        step(buffer, obs=2, reward=6, action=0.2)
        buffer.cut()
        step(buffer, obs=8, reward=7, action=0.3)
        step(buffer, obs=9, reward=8, action=0.4)
        batch = buffer.sample(1)
        assert batch.reward.tolist() == [[0, 5, 0, 7]]
        assert batch.is_first.int().tolist() == [[1, 0, 1, 0]]
        assert batch.is_last.int().tolist() == [[0, 1, 0, 0]]
        assert not batch.is_terminal.any()
        np.testing.assert_allclose(batch.prev_action[0, :, 0], [0.0, 0.1, 0.0, 0.3])

    def test_cut_marks_the_newest_entry_at_once(self):
        buffer = make()
        walk(buffer, 0, 3)
        buffer.cut()
        assert buffer.sample(1).is_last.int().tolist() == [[0, 0, 1]]

    def test_cut_after_a_done_changes_nothing(self):
        buffer = make()
        step(buffer, obs=1)
        step(buffer, obs=2, last=3)
        buffer.cut()
        buffer.cut()
        batch = buffer.sample(1)
        assert batch.is_last.tolist() == batch.is_terminal.tolist() == [[False, False, True]]
        assert batch.is_first.tolist() == [[True, False, False]]

    def test_arrays_that_the_environment_uses_again_are_not_shared(self):
        buffer = make()
        obs, action, reward = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32)
        info = {"terminal_observation": np.zeros(1, np.float32)}
        for number in range(1, 3):
            obs[:], action[:], reward[:] = number, number / 10, number
            info["terminal_observation"][:] = 3
            buffer.add(obs, obs, action, reward, np.array([number == 2]), [info])
            assert reward == number
            obs[:], action[:], reward[:] = 99, 0.99, 99
            info["terminal_observation"][:] = 99
        batch = buffer.sample(1)
        assert batch.obs["obs"].flatten().tolist() == [1, 2, 3]
        assert batch.reward.tolist() == [[0, 1, 2]]
        np.testing.assert_allclose(batch.prev_action.flatten(), [0.0, 0.1, 0.2])

    def test_cut_before_the_first_entry_is_allowed(self):
        buffer = make()
        buffer.cut()
        assert buffer.size() == 0

    def test_through_a_real_vec_env_with_a_time_limit(self):
        env = DummyVecEnv([lambda: gym.make("CartPole-v1", max_episode_steps=5)])
        env.seed(0)
        buffer = make(100, env.observation_space, env.action_space, sequence_length=7)
        obs = env.reset()
        seen = []
        for action in [0, 1, 0, 1, 0, 1]:
            new_obs, reward, done, infos = env.step(np.array([action]))
            buffer.add(obs, new_obs, np.array([action]), reward, done, infos)
            seen += [obs[0]] + ([infos[0]["terminal_observation"]] if done[0] else [])
            obs = new_obs
        batch = buffer.sample(1)
        np.testing.assert_array_equal(batch.obs["obs"][0], np.stack(seen))
        assert batch.is_last.int().tolist() == [[0, 0, 0, 0, 0, 1, 0]]
        assert not batch.is_terminal.any()
        assert batch.reward.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
        assert batch.prev_action[0].tolist() == [[0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 0]]


class TestRing:
    def test_nothing_is_served_before_there_is_a_sequence(self):
        buffer = make(sequence_length=4)
        assert not buffer.can_sample()
        with pytest.raises(ValueError, match=r"have \[0\] entries, a sequence needs 4"):
            buffer.sample(2)
        walk(buffer, 0, 3)
        with pytest.raises(ValueError, match=r"have \[3\] entries, a sequence needs 4"):
            buffer.sample(2)
        walk(buffer, 3, 4)
        assert buffer.can_sample()
        assert buffer.n_sequences == 1

    def test_no_sequence_crosses_the_write_head_and_the_oldest_entry_only_leads_in(self):
        buffer = make(8)
        walk(buffer, 0, 23)
        assert buffer.size() == 8  # 15 ... 22
        batch = buffer.sample(500)
        assert set(starts(batch)) == {16, 17, 18, 19, 20}
        assert buffer.n_sequences == 5
        np.testing.assert_array_equal(batch.obs["obs"][:, :, 0], batch.index[:, 1:] + np.arange(3))

    def test_environments_fill_at_their_own_pace(self):
        buffer = make(40, n_envs=2)
        for number in range(4):
            done = np.array([False, True])
            infos = [{}, {"terminal_observation": np.array([100.0])}]
            buffer.add(np.full((2, 1), number), None, np.zeros((2, 1)), np.zeros(2), done, infos)
        assert buffer.size() == 4 + 8
        assert buffer.n_sequences == 2 + 6

    def test_every_start_is_equally_likely_whatever_environment_it_is_of(self):
        set_random_seed(0)
        buffer = make(40, n_envs=2)
        for number in range(4):
            infos = [{}, {"terminal_observation": np.array([100.0])}]
            done = np.array([False, True])
            buffer.add(np.full((2, 1), number), None, np.zeros((2, 1)), np.zeros(2), done, infos)
        buffer.sample(3)  # the queue
        _, count = np.unique(buffer.sample(8000).index, axis=0, return_counts=True)
        assert len(count) == 8
        assert np.abs(count - 1000).max() < 4 * np.sqrt(1000)

    def test_too_small_a_buffer_says_what_would_do(self):
        with pytest.raises(ValueError, match=r"leaves 64 entries to each of 4 .* buffer_size of at least 260"):
            SequenceReplayBuffer(256, LINE, STICK, "cpu", 4)

    def test_new_entries_are_served_first_and_once(self):
        buffer = make(100)
        walk(buffer, 0, 7)
        assert starts(buffer.sample(4))[:2] == [3, 0]
        walk(buffer, 7, 9)
        assert starts(buffer.sample(2))[0] == 6
        buffer._rings._rng = np.random.default_rng(0)
        assert len(set(starts(buffer.sample(100)))) == 7

    def test_half_of_a_batch_is_drawn_however_long_the_queue_is(self):
        buffer = make(3000)
        walk(buffer, 0, 1500)  # as many steps as learning_starts and more
        batch = starts(buffer.sample(200))
        assert batch[:100] == list(range(1497, 1197, -3))  # the newest first
        assert min(batch[100:]) < 100

    def test_what_the_queue_lacks_is_drawn(self):
        buffer = make(100)
        walk(buffer, 0, 6)
        batch = buffer.sample(5)
        assert starts(batch)[:2] == [3, 0]
        assert batch.obs["obs"].shape == (5, 3, 1)

    def test_new_entries_of_all_environments_wait_in_the_queue(self):
        buffer = make(40, n_envs=4)
        for number in range(9):
            buffer.add(np.full((4, 1), number), None, np.zeros((4, 1)), np.zeros(4), np.zeros(4), [{}] * 4)
        fresh = buffer.sample(24).index[:12]
        assert fresh.tolist() == [[env, start] for start in (6, 3, 0) for env in (3, 2, 1, 0)]

    def test_what_begins_since_a_moment_is_served_alone_and_the_queue_left_as_it_was(self):
        buffer = make(100)
        walk(buffer, 0, 10)
        assert set(starts(buffer.sample(200, since=np.array([5])))) == {5, 6, 7}
        assert buffer.can_sample(np.array([7]))
        assert not buffer.can_sample(np.array([8]))
        assert starts(buffer.sample(2))[0] == 6

    def test_the_queue_skips_what_was_overwritten(self):
        buffer = make(8)
        walk(buffer, 0, 23)  # queued: 0, 3, ..., 18; 16 is the first start served
        assert starts(buffer.sample(4))[0] == 18
        assert not buffer._rings._queue


class TestLatents:
    def test_start_is_the_latent_of_the_entry_before(self):
        buffer = make(latent_size=2)
        for number in range(5):
            step(buffer, number, latent=number + 0.5)
        batch = buffer.sample(50)
        assert batch.start.dtype == th.float32
        for start, (_, number) in zip(batch.start.tolist(), batch.index):
            assert start == ([0.0, 0.0] if number == 0 else [number - 0.5] * 2)

    def test_start_is_zero_where_an_episode_begins(self):
        buffer = make(latent_size=1)
        step(buffer, 0, latent=1, last=1)
        for number in range(2, 5):
            step(buffer, number, latent=1)
        batch = buffer.sample(50)
        assert set(batch.start[batch.is_first[:, 0]].flatten().tolist()) == {0.0}
        assert set(batch.start[batch.index[:, 1] == 1].flatten().tolist()) == {1.0}

    def test_refreshed_latents_are_served_and_those_overwritten_are_left_alone(self):
        buffer = make(8, latent_size=1)
        for number in range(8):
            step(buffer, number, latent=0)
        old = np.array([[0, 0], [0, 5]])
        for number in range(8, 10):  # overwrites entries 0 and 1
            step(buffer, number, latent=0)
        buffer.update_latents(old, th.tensor([[[10.0], [11.0], [12.0]], [[15.0], [16.0], [17.0]]]))
        batch = buffer.sample(200)
        assert dict(zip(starts(batch), batch.start.flatten().tolist())) == {3: 12, 4: 0, 5: 0, 6: 15, 7: 16}
        walk(buffer, 10, 12)
        batch = buffer.sample(200)
        assert dict(zip(starts(batch), batch.start.flatten().tolist())) == {5: 0, 6: 15, 7: 16, 8: 17, 9: 0}

    def test_each_environment_gets_its_own(self):
        buffer = make(16, n_envs=2, latent_size=1)
        infos = [{}, {"terminal_observation": np.array([9.0])}]
        for number in range(5):  # environment 1 ends each episode at once: it has ten entries, and rows for eight
            done = np.array([False, True])
            buffer.add(np.full((2, 1), number), None, np.zeros((2, 1)), np.zeros(2), done, infos, np.zeros((2, 1)))
        refreshed = th.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        buffer.update_latents(np.array([[0, 0], [1, 1]]), refreshed)
        latents = buffer.arrays["latent"].reshape(2, 8)
        assert latents.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [0, 0, 5, 6, 0, 0, 0, 0]]  # entry 1 is overwritten

    def test_latents_are_kept_as_float16_and_clipped_to_it(self):
        buffer = make(latent_size=1)
        walk(buffer, 0, 4)
        buffer.update_latents(np.array([[0, 0]]), th.tensor([[[1e6], [-1e6], [1.0]]]))
        batch = buffer.sample(20)
        assert set(batch.start[batch.index[:, 1] == 1].flatten().tolist()) == {65504.0}

    def test_latents_of_any_accelerator_are_copied_to_the_host(self):
        class Elsewhere(th.Tensor):
            """On a device whose memory NumPy cannot read; everything that is computed from it is there too."""

            device = th.device("mps")

            def cpu(self) -> th.Tensor:
                return self.as_subclass(th.Tensor)

            def numpy(self) -> np.ndarray:
                raise TypeError("can't convert mps:0 device type tensor to numpy")

        buffer = make(latent_size=1)
        walk(buffer, 0, 4)
        buffer.update_latents(np.array([[0, 0]]), th.tensor([[[1.0], [2.0], [3.0]]]).as_subclass(Elsewhere))
        assert buffer.arrays["latent"][:4].tolist() == [[1], [2], [3], [0]]

    def test_latents_with_nan_are_refused(self):
        buffer = make(latent_size=1)
        walk(buffer, 0, 4)
        with pytest.raises(ValueError, match="latents hold NaN"):
            buffer.update_latents(np.array([[0, 0]]), th.full((1, 3, 1), th.nan))

    def test_without_latents_start_is_empty(self):
        buffer = two_episodes()
        batch = buffer.sample(1)
        assert batch.start.shape == (1, 0)
        buffer.update_latents(batch.index, th.zeros(1, 5, 0))


class TestSpaces:
    def test_float64_is_kept_as_float32_and_small_types_as_they_are(self):
        space = spaces.Dict(
            vector=spaces.Box(-np.inf, np.inf, (2,), np.float64),
            half=spaces.Box(-1, 1, (2,), np.float16),
            image=spaces.Box(0, 255, (3, 4, 4), np.uint8),
            flags=spaces.MultiBinary(3),
            place=spaces.Discrete(300),
            parts=spaces.MultiDiscrete([2, 5]),
        )
        space.seed(0)
        buffer = make(obs=space)
        given = [space.sample() for _ in range(3)]
        for obs in given:
            obs = {key: np.asarray(value)[None] for key, value in obs.items()}
            buffer.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
        stored = {key: str(array.dtype) for key, array in buffer.arrays.items()}
        assert stored["obs/vector"] == "float32"
        assert stored["obs/half"] == "float16"
        assert stored["obs/image"] == "uint8"
        assert (stored["obs/flags"], stored["obs/place"], stored["obs/parts"]) == ("int8", "int16", "int8")
        served = buffer.sample(1).obs
        assert served["vector"].dtype == served["half"].dtype == th.float32
        assert served["image"].dtype == th.uint8
        assert served["place"].shape == (1, 3)
        for key, tensor in served.items():
            expected = np.stack([obs[key] for obs in given])
            np.testing.assert_allclose(tensor[0].numpy(), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("space", "given", "served"),
        [
            (spaces.Discrete(3), 2, [0, 0, 1]),
            (spaces.Discrete(2, start=-4), -3, [0, 1]),
            (spaces.MultiDiscrete([2, 3]), [1, 0], [0, 1, 1, 0, 0]),
            (spaces.MultiBinary(3), [1, 0, 1], [1, 0, 1]),
            (spaces.Box(-5, 5, (2, 1)), [[0.5], [-1.0]], [0.5, -1.0]),
            (spaces.Box(-5, 5, ()), 0.25, [0.25]),
        ],
    )
    def test_actions_are_served_as_floats_one_entry_later(self, space, given, served):
        buffer = make(act=space, sequence_length=2)
        info = {"terminal_observation": np.array([1.0])}
        buffer.add(np.zeros((1, 1)), None, np.array([given]), np.zeros(1), np.array([True]), [info])
        batch = buffer.sample(1)
        assert batch.prev_action.dtype == th.float32
        assert batch.prev_action.tolist() == [[[0.0] * len(served), served]]

    def test_discrete_observations_keep_their_start_and_come_at_an_episode_end_as_numbers(self):
        buffer = make(obs=spaces.Discrete(3, start=5), sequence_length=2)
        buffer.add(np.array([7]), None, np.zeros((1, 1)), np.zeros(1), np.array([1]), [{"terminal_observation": 5}])
        assert buffer.sample(1).obs["obs"].tolist() == [[7, 5]]

    def test_images_that_a_normaliser_scaled_and_scaled_back_are_rounded(self):
        buffer = make(obs=spaces.Box(0, 255, (2,), np.uint8), sequence_length=2)
        info = {"terminal_observation": np.array([255.00001, 6.9999])}
        buffer.add(np.array([[1, 2]], np.uint8), None, np.zeros((1, 1)), np.zeros(1), np.array([True]), [info])
        assert buffer.sample(1).obs["obs"].tolist() == [[[1, 2], [255, 7]]]

    def test_an_unknown_space_is_named(self):
        with pytest.raises(ValueError, match=r"observation: Tuple.* is not supported"):
            make(obs=spaces.Tuple([LINE]))
        with pytest.raises(ValueError, match=r"action space Dict.* is not supported"):
            make(act=spaces.Dict(a=STICK))

    def test_humanoid_takes_less_than_1800_bytes_per_entry_beside_the_latents(self):
        obs, act = spaces.Box(-np.inf, np.inf, (376,), np.float64), spaces.Box(-0.4, 0.4, (17,), np.float32)
        buffer = SequenceReplayBuffer(1_000_000, obs, act, "cpu", latent_size=544)
        assert buffer.nbytes == 0
        buffer.add(np.zeros((1, 376)), None, np.zeros((1, 17)), np.zeros(1), np.zeros(1), [{}], np.zeros((1, 544)))
        assert buffer.nbytes / 1_000_000 - 2 * 544 == 376 * 4 + 17 * 4 + 4 + 1 <= 1800

    def test_a_replay_that_will_not_fit_into_memory_is_told_of_at_the_first_entry(self, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200))
        step(make(10), 0)  # 10 entries of 13 bytes
        with pytest.warns(UserWarning, match=r"a full replay takes .* GB and 0\.0 GB of memory are available"):
            step(make(20), 0)


class Spaces(gym.Env):
    """Has spaces; that is all that a normalizer wants."""

    action_space = STICK

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), 1.0, False, False, {}


class TestVecNormalize:
    def test_originals_are_stored_and_current_statistics_applied(self):
        env = VecNormalize(DummyVecEnv([lambda: Spaces(LINE)]))
        buffer = make()
        for number in range(3):
            step(buffer, obs=number, reward=number + 1)
        env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var = np.array([1.0]), np.array([4.0]), 16.0
        batch = buffer.sample(1, env=env)
        np.testing.assert_allclose(batch.obs["obs"].flatten(), [-0.5, 0.0, 0.5], rtol=1e-6)
        np.testing.assert_allclose(batch.reward, [[0.0, 0.25, 0.5]], rtol=1e-6)
        assert batch.obs["obs"].dtype == batch.reward.dtype == th.float32
        env.obs_rms.mean = np.array([0.0])
        np.testing.assert_allclose(buffer.sample(1, env=env).obs["obs"].flatten(), [0.0, 0.5, 1.0], rtol=1e-6)
        assert buffer.sample(1).obs["obs"].flatten().tolist() == [0, 1, 2]

    def test_only_the_chosen_keys_are_normalised(self):
        space = spaces.Dict(a=LINE, image=spaces.Box(0, 255, (2,), np.uint8))
        env = VecNormalize(DummyVecEnv([lambda: Spaces(space)]), norm_obs_keys=["a"], norm_reward=False)
        env.obs_rms["a"].mean, env.obs_rms["a"].var = np.array([1.0]), np.array([4.0])
        buffer = make(obs=space)
        for number in range(3):
            obs = {"a": np.array([[number]]), "image": np.array([[number, 9]], np.uint8)}
            buffer.add(obs, obs, np.zeros((1, 1)), np.ones(1), np.zeros(1), [{}])
        batch = buffer.sample(1, env=env)
        np.testing.assert_allclose(batch.obs["a"].flatten(), [-0.5, 0.0, 0.5], rtol=1e-6)
        assert batch.obs["image"].tolist() == [[[0, 9], [1, 9], [2, 9]]]
        assert batch.obs["image"].dtype == th.uint8
        assert batch.reward.tolist() == [[0, 1, 1]]


def good_step(n_envs: int = 2) -> dict[str, Any]:
    """Env 1 ends an episode."""
    return {
        "obs": {"a": np.zeros((n_envs, 2)), "b": np.zeros((n_envs, 1))},
        "next_obs": None,
        "action": np.zeros((n_envs, 1)),
        "reward": np.zeros(n_envs),
        "done": np.array([False, True]),
        "infos": [{}, {"terminal_observation": {"a": np.zeros(2), "b": np.zeros(1)}}],
        "latent": np.zeros((n_envs, 4)),
    }


class TestRefusals:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        ("place", "message"),
        [
            (("obs", "a", (1, 1)), r"^observation 'a' of env 1 holds {bad} at \(1,\), expected finite numbers"),
            (("obs", "b", (0, 0)), r"^observation 'b' of env 0 holds {bad}"),
            (("action", (1, 0)), r"^action of env 1 holds {bad}"),
            (("reward", 0), r"^reward of env 0 holds {bad}, expected"),
            (("latent", (1, 2)), r"^latent of env 1 holds {bad}"),
            (("infos", 1, "terminal_observation", "b", 0), r"^terminal observation 'b' of env 1 holds {bad}"),
        ],
    )
    def test_nan_and_infinity_are_named_and_nothing_is_stored(self, bad, place, message):
        buffer = make(40, spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=LINE), n_envs=2, latent_size=4)
        buffer.add(**good_step())
        before = pickle.dumps(buffer)
        wrong = good_step()
        *path, element = place
        target: Any = wrong
        for key in path:
            target = target[key]
        target[element] = bad
        text = message.format(bad=bad) + r".* Nothing of this step was stored, the replay keeps its 3 entries"
        with pytest.raises(ValueError, match=text):
            buffer.add(**wrong)
        assert pickle.dumps(buffer) == before

    def test_numbers_too_large_for_the_storage_are_refused_without_a_warning(self):
        buffer = make()
        with pytest.raises(ValueError, match=r"reward of env 0 holds 1e\+39, expected numbers within"):
            step(buffer, 0, reward=1e39)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"obs": {"a": np.zeros((2, 3)), "b": np.zeros((2, 1))}}, r"'a' has shape \(2, 3\), expected \(2, 2\)"),
            ({"action": np.zeros((1, 1))}, r"action has shape \(1, 1\), expected \(2, 1\)"),
            ({"reward": np.zeros((2, 1))}, r"reward has shape \(2, 1\), expected \(2,\)"),
            ({"latent": np.zeros((2, 5))}, r"latent has shape \(2, 5\), expected \(2, 4\)"),
            ({"action": np.array([[0.0], [1.2]])}, r"action of env 1 holds 1.2 .*within \[-1.001, 1.001\]"),
            ({"infos": [{}, dict(terminal_observation=None)]}, r"done without infos\[i\].* for i in \[1\]"),
        ],
    )
    def test_wrong_shapes_unscaled_actions_and_lost_observations_are_refused(self, change, message):
        buffer = make(40, spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=LINE), n_envs=2, latent_size=4)
        with pytest.raises(ValueError, match=message):
            buffer.add(**{**good_step(), **change})
        assert buffer.size() == 0

    def test_integers_out_of_range_are_refused(self):
        buffer = make(obs=spaces.Discrete(3), act=spaces.MultiDiscrete([2, 3]))
        rest = (np.zeros(1), np.zeros(1), [{}])
        with pytest.raises(ValueError, match=r"observation of env 0 holds 3, expected numbers within \[0, 2\]"):
            buffer.add(np.array([3]), None, np.array([[0, 0]]), *rest)
        with pytest.raises(ValueError, match=r"action of env 0 holds 2 at \(0,\), expected numbers within \[0, 1\]"):
            buffer.add(np.array([0]), None, np.array([[2, 2]]), *rest)


class TestKeeping:
    def test_the_seed_of_sb3_decides_what_is_sampled(self):
        def drawn() -> list[int]:
            set_random_seed(7)
            buffer = make()
            walk(buffer, 0, 15)
            return starts(buffer.sample(30))

        assert drawn() == drawn()

    def test_a_loaded_buffer_goes_on_exactly(self, tmp_path):
        def go_on(buffer: SequenceReplayBuffer) -> list[Batch]:
            batches = []
            for number in range(30, 45):
                step(buffer, number, action=0.3, reward=number, last=9 if number % 4 == 3 else None, latent=number)
                batches.append(buffer.sample(3))
                buffer.update_latents(batches[-1].index, th.full((3, 3, 1), number))
            return batches

        buffer = make(latent_size=1)
        for number in range(30):  # wrapped around, with a reward pending and sequences queued
            step(buffer, number, action=0.2, reward=number, last=9 if number % 7 == 3 else None, latent=number)
        save_to_pkl(tmp_path / "replay.pkl", buffer)
        loaded = load_from_pkl(tmp_path / "replay.pkl")
        assert loaded.size() == buffer.size()
        for one, two in zip(go_on(buffer), go_on(loaded), strict=True):
            for name in ("prev_action", "reward", "is_first", "is_last", "is_terminal", "start", "index"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
            np.testing.assert_array_equal(one.obs["obs"], two.obs["obs"])

    def test_loading_a_full_replay_takes_its_memory_once(self):
        column = Column("x", (2,), np.dtype(np.float32), -1.0, 1.0)
        full, loaded = RamStorage({"x": column}, 2, 3), RamStorage({"x": column}, 2, 3)
        full.arrays["x"][:] = np.arange(12).reshape(6, 2)
        dumped = pickle.loads(pickle.dumps(full.dump(3)))
        loaded.restore(dumped)
        assert np.shares_memory(loaded.arrays["x"], dumped["x"])
        np.testing.assert_array_equal(loaded.arrays["x"], full.arrays["x"])
        loaded.write(np.array([0]), np.array([0]), {"x": np.zeros((1, 2))})

    def test_a_pickle_holds_only_the_entries_in_use(self):
        buffer = make(1_000_000)
        assert len(pickle.dumps(buffer)) < 10_000
        walk(buffer, 0, 10)
        assert len(pickle.dumps(buffer)) < 10_000
        loaded = pickle.loads(pickle.dumps(buffer))
        assert loaded.nbytes == buffer.nbytes
