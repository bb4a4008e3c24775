"""Experience from other sources: what becomes which entry of the replay."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces, wrappers
from stable_baselines3 import SAC
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.files import unpickled
from sb3_dreamer.hybrid import DreamVecEnv, experience
from sb3_dreamer.hybrid.experience import _replay_episodes, _time_limit, add_experience, episodes_of
from sb3_dreamer.replay import Episode, SequenceReplayBuffer, read_episodes, write_episode

LINE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
STICK = spaces.Box(-2.0, 2.0, (1,), np.float32)
REPEAT_ACTION = [lambda env: wrappers.RepeatAction(env, 2)] if hasattr(wrappers, "RepeatAction") else []  # since 1.3


class Line(gym.Env):
    observation_space, action_space = LINE, STICK

    def reset(self, **kwargs: Any) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 0.0, False, False, {}


def small(env: Any = None, n_envs: int = 1, **kwargs: Any) -> Dreamer:
    settings = dict(model_size="debug", buffer_size=400, batch_size=2, batch_length=4, seed=0, device="cpu")
    env = env if isinstance(env, VecNormalize) else DummyVecEnv([env or Line] * n_envs)
    return Dreamer("MlpPolicy", env, **{**settings, **kwargs})


def episode(first: int, length: int, terminal: bool = False) -> Episode:
    obs = np.arange(first, first + length + 1, dtype=np.float32)[:, None]
    return Episode({"obs": obs}, np.full((length, 1), 0.1, np.float32), obs[1:, 0] / 10, terminal)


def sb3_replay(n_envs: int = 1, rows: int = 20, **kwargs: Any) -> ReplayBuffer:
    return ReplayBuffer(rows * n_envs, LINE, STICK, "cpu", n_envs=n_envs, **kwargs)


def put(buffer: ReplayBuffer, obs: float, next_obs: float, done: bool = False, timeout: bool = False) -> None:
    now, then = np.array([[obs]]), np.array([[next_obs]])
    buffer.add(now, then, np.array([[0.5]]), then[0] / 10, np.array([done]), [{"TimeLimit.truncated": timeout}])


def contents(episodes: Any) -> list[tuple[list[float], bool]]:
    return [(e.obs["obs"].flatten().tolist(), e.terminal) for e in episodes]


class TestEpisodes:
    def test_what_is_written_is_read_again(self):
        buffer = SequenceReplayBuffer(40, LINE, STICK, "cpu", sequence_length=3)
        for e in (episode(10, 3, terminal=True), episode(20, 2)):
            write_episode(buffer, e)
        first, second = read_episodes(buffer)
        assert first.obs["obs"].flatten().tolist() == [10, 11, 12, 13]
        np.testing.assert_allclose(first.reward, [1.1, 1.2, 1.3])
        np.testing.assert_allclose(first.action.flatten(), 0.1)
        assert (first.terminal, second.terminal) == (True, False)
        assert second.obs["obs"].flatten().tolist() == [20, 21, 22]

    def test_an_episode_written_serves_the_same_batch_as_one_that_was_lived(self):
        lived, written = (SequenceReplayBuffer(40, LINE, STICK, "cpu", sequence_length=4) for _ in range(2))
        infos = [[{}], [{}], [{"terminal_observation": np.array([13.0]), "TimeLimit.truncated": False}]]
        for t, info in enumerate(infos):
            obs, action = np.array([[10.0 + t]]), np.array([[0.1]])
            lived.add(obs, obs, action, np.array([1.1 + t / 10]), np.array([t == 2]), info)
        write_episode(written, episode(10, 3, terminal=True))
        a, b = lived.sample(1), written.sample(1)
        for name in ("prev_action", "reward", "is_first", "is_last", "is_terminal"):
            np.testing.assert_allclose(getattr(a, name).numpy(), getattr(b, name).numpy(), err_msg=name)
        assert a.obs["obs"].tolist() == b.obs["obs"].tolist()

    def test_episodes_go_to_the_environment_with_the_fewest_entries(self):
        buffer = SequenceReplayBuffer(80, LINE, STICK, "cpu", n_envs=2, sequence_length=3)
        for length in (5, 2, 2):
            write_episode(buffer, episode(0, length))
        assert buffer.heads().tolist() == [6, 6]

    def test_a_running_episode_is_read_as_far_as_its_outcome_is_known(self):
        buffer = SequenceReplayBuffer(40, LINE, STICK, "cpu", sequence_length=3)
        for obs in (1.0, 2.0, 3.0):
            buffer.add(np.array([[obs]]), np.zeros((1, 1)), np.zeros((1, 1)), np.ones(1), np.array([False]), [{}])
        assert contents(read_episodes(buffer)) == [([1.0, 2.0, 3.0], False)]

    def test_an_overwritten_beginning_leaves_the_rest(self):
        buffer = SequenceReplayBuffer(5, LINE, STICK, "cpu", sequence_length=3)
        write_episode(buffer, episode(0, 6))
        assert contents(read_episodes(buffer)) == [([2.0, 3.0, 4.0, 5.0, 6.0], False)]
        assert contents(read_episodes(buffer, newest=3)) == [([4.0, 5.0, 6.0], False)]

    def test_an_episode_written_into_a_running_one_ends_that_one(self):
        buffer = SequenceReplayBuffer(40, LINE, STICK, "cpu", sequence_length=7)
        one, going_on, info = np.zeros((1, 1)), np.zeros(1, bool), [{}]
        for obs, reward in ((1, 5), (2, 6)):
            buffer.add(np.full((1, 1), obs), None, one, np.array([reward]), going_on, info)
        write_episode(buffer, episode(10, 2, terminal=True))
        for obs, reward in ((20, 9), (21, 0)):
            buffer.add(np.full((1, 1), obs), None, one, np.array([reward]), going_on, info)
        batch = buffer.sample(1)
        assert batch.obs["obs"].flatten().tolist() == [1, 2, 10, 11, 12, 20, 21]
        assert batch.reward.flatten().tolist() == pytest.approx([0, 5, 0, 1.1, 1.2, 0, 9])
        assert batch.is_first.int().tolist() == [[1, 0, 1, 0, 0, 1, 0]]
        assert batch.is_last.int().tolist() == [[0, 1, 0, 0, 1, 0, 0]]
        assert batch.is_terminal.int().tolist() == [[0, 0, 0, 0, 1, 0, 0]]

    def test_the_newest_entries_are_those_of_all_environments_together(self):
        buffer = SequenceReplayBuffer(80, LINE, STICK, "cpu", n_envs=2, sequence_length=3)
        for number in range(10):
            buffer.add(np.full((2, 1), number), None, np.zeros((2, 1)), np.zeros(2), np.zeros(2), [{}, {}])
        assert [e.obs["obs"].flatten().tolist() for e in read_episodes(buffer, newest=6)] == [[7, 8, 9]] * 2

    def test_a_part_is_terminal_only_if_it_has_the_end_of_a_terminal_episode(self):
        whole = episode(0, 5, terminal=True)
        assert contents([whole.part(0, 3), whole.part(3, 5)]) == [([0, 1, 2, 3], False), ([3, 4, 5], True)]

    def test_integers_come_back_with_the_start_of_their_space(self):
        buffer = SequenceReplayBuffer(40, LINE, spaces.Discrete(3, start=5), "cpu", sequence_length=3)
        actions = np.array([5, 7, 6])
        write_episode(buffer, Episode(episode(0, 3).obs, actions, np.zeros(3), False))
        assert next(read_episodes(buffer)).action.tolist() == [5, 7, 6]


class TestReplayOfSB3:
    def test_episodes_end_where_they_are_done_and_time_limits_are_not_terminal(self):
        buffer = sb3_replay()
        put(buffer, 1, 2)
        put(buffer, 2, 3, done=True)
        put(buffer, 10, 11, done=True, timeout=True)
        put(buffer, 20, 21)
        expected = [([1.0, 2.0, 3.0], True), ([10.0, 11.0], False), ([20.0, 21.0], False)]
        assert contents(episodes_of(small(), buffer)) == expected

    def test_a_single_transition_is_an_episode(self):
        buffer = sb3_replay()
        put(buffer, 1, 2)
        assert contents(episodes_of(small(), buffer)) == [([1.0, 2.0], False)]

    def test_rows_that_do_not_follow_each_other_are_cut(self):
        buffer = sb3_replay()
        put(buffer, 1, 2)
        put(buffer, 7, 8)
        assert contents(episodes_of(small(), buffer)) == [([1.0, 2.0], False), ([7.0, 8.0], False)]

    def test_a_full_buffer_is_read_from_its_oldest_row(self):
        buffer = sb3_replay(rows=3)
        for n in range(5):
            put(buffer, n, n + 1)
        assert contents(episodes_of(small(), buffer)) == [([2.0, 3.0, 4.0, 5.0], False)]

    def test_the_memory_saving_variant_keeps_ends_and_time_limits_are_recognized_by_length(self):
        buffer = sb3_replay(optimize_memory_usage=True, handle_timeout_termination=False)
        for obs, next_obs, done in (
            (1, 2, False),
            (2, 3, True),
            (10, 11, False),
            (11, 12, False),
            (12, 13, True),
            (20, 21, False),
        ):
            put(buffer, obs, next_obs, done)
        expected = [([1.0, 2.0, 2.0], True), ([10.0, 11.0, 12.0], False), ([20.0, 21.0], False)]
        assert contents(episodes_of(small(), buffer, time_limit=3)) == expected

    def test_an_episode_whose_start_is_overwritten_counts_as_cut_if_there_is_a_time_limit(self):
        buffer = sb3_replay(rows=5, handle_timeout_termination=False)
        for obs, done in ((1, False), (2, False), (3, True), (10, False), (11, True), (20, False)):
            put(buffer, obs, obs + 1, done)
        whole, known = [([10.0, 11.0, 12.0], True), ([20.0, 21.0], False)], ([2.0, 3.0, 4.0], False)
        assert contents(episodes_of(small(), buffer, time_limit=3)) == [known, *whole]
        assert contents(episodes_of(small(), buffer)) == [(known[0], True), *whole], "no time limit is known"

    def test_without_flags_the_time_limit_of_the_environment_counts(self):
        buffer = sb3_replay(handle_timeout_termination=False)
        put(buffer, 1, 2)
        put(buffer, 2, 3, done=True)
        timed = small(lambda: gym.make(gym.spec("Pendulum-v1"), max_episode_steps=2))
        assert _time_limit(timed) == 2
        assert contents(_replay_episodes(buffer, _time_limit(timed))) == [([1.0, 2.0, 3.0], False)]

    @pytest.mark.parametrize("repeated", [*REPEAT_ACTION, MaxAndSkipEnv])
    def test_the_time_limit_of_an_environment_that_repeats_actions_counts_other_steps(self, repeated):
        timed = small(lambda: repeated(gym.make("Pendulum-v1", max_episode_steps=50)))
        of = timed.observation_space, timed.action_space
        flagless = ReplayBuffer(10, *of, handle_timeout_termination=False)
        words = "50 steps of the simulator, its wrapper repeats actions.*give time_limit= in steps of the agent"
        with pytest.raises(ValueError, match=words):
            episodes_of(timed, flagless)
        episodes_of(timed, flagless, time_limit=25)
        episodes_of(timed, ReplayBuffer(10, *of))  # it has flags

    def test_gymnasium_may_be_older_than_its_wrapper_that_repeats_actions(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delattr(wrappers, "RepeatAction", raising=False)
        found = spec_from_file_location("experience_with_older_gymnasium", experience.__file__)
        older: Any = module_from_spec(found)
        found.loader.exec_module(older)
        assert older._time_limit(small(lambda: gym.make("Pendulum-v1", max_episode_steps=50))) == 50
        repeated = small(lambda: MaxAndSkipEnv(gym.make("Pendulum-v1", max_episode_steps=50)))
        with pytest.raises(ValueError, match="its wrapper repeats actions"):
            older._time_limit(repeated)

    def test_a_real_one_has_the_rewards_of_its_transitions(self):
        sac = SAC("MlpPolicy", "Pendulum-v1", learning_starts=500, seed=0, device="cpu", buffer_size=1000).learn(250)
        model = small(lambda: gym.make("Pendulum-v1"))
        add_experience(model, sac.replay_buffer)
        first, second = read_episodes(model.replay_buffer)
        assert (len(first), len(second), first.terminal) == (200, 50, False)
        np.testing.assert_array_equal(first.reward, sac.replay_buffer.rewards[:200, 0])
        np.testing.assert_array_equal(first.obs["obs"][1:], sac.replay_buffer.next_observations[:200, 0])
        np.testing.assert_array_equal(second.action, sac.replay_buffer.actions[200:250, 0])


class TestOtherSources:
    def test_minari_actions_are_scaled_and_terminations_are_terminal(self):
        recorded = SimpleNamespace(
            observations=np.array([[1.0], [2.0], [3.0]]),
            actions=np.array([[2.0], [-1.0]]),
            rewards=np.array([1.0, 2.0]),
            terminations=np.array([False, True]),
        )
        data = SimpleNamespace(observation_space=LINE, action_space=STICK, iterate_episodes=lambda: iter([recorded]))
        model = small()
        add_experience(model, data)
        (e,) = read_episodes(model.replay_buffer)
        assert e.action.flatten().tolist() == [1.0, -0.5]
        assert e.terminal

    def test_minari_images_are_transposed_as_in_sb3(self):
        image, env = np.random.default_rng(0).integers(0, 255, (3, 36, 36, 3), np.uint8), FakeImageEnv(2, 36, 36, 3)
        recorded = SimpleNamespace(
            observations=image, actions=np.array([1, 0]), rewards=np.zeros(2), terminations=np.zeros(2, bool)
        )
        spaces_of = dict(observation_space=env.observation_space, action_space=env.action_space)
        data = SimpleNamespace(**spaces_of, iterate_episodes=lambda: iter([recorded]))
        model = Dreamer("CnnPolicy", env, model_size="debug", buffer_size=400, batch_length=4, device="cpu")
        add_experience(model, data)
        (e,) = read_episodes(model.replay_buffer)
        np.testing.assert_array_equal(e.obs["obs"], image.transpose(0, 3, 1, 2))

    def test_a_name_with_a_dot_can_be_a_file(self, tmp_path):
        other = small()
        add_experience(other, [episode(0, 5)])
        other.save_replay_buffer(tmp_path / "replay_0.5")
        model = small()
        add_experience(model, tmp_path / "replay_0.5")
        assert [len(e) for e in read_episodes(model.replay_buffer)] == [5]

    @pytest.mark.parametrize("name", ["replay.pkl", "replay"])
    def test_a_saved_replay_is_read(self, tmp_path, name):
        sac = SAC("MlpPolicy", Line(), buffer_size=50, learning_starts=50, device="cpu").learn(12)
        sac.save_replay_buffer(tmp_path / "replay")
        model = small()
        add_experience(model, tmp_path / name)
        assert sum(map(len, read_episodes(model.replay_buffer))) == 12

    def test_a_missing_minari_names_the_command(self):
        with pytest.raises(ImportError, match=r"pip install \"minari"):
            add_experience(small(), "mujoco/hopper/expert-v0")

    def test_another_dreamers_replay(self):
        model, other = small(), small()
        add_experience(other, [episode(0, 5), episode(9, 2, terminal=True)])
        add_experience(model, other.replay_buffer)
        assert contents(read_episodes(model.replay_buffer)) == contents(read_episodes(other.replay_buffer))

    @pytest.mark.parametrize("source", [[], sb3_replay()])
    def test_an_empty_source_is_refused(self, source: Any):
        with pytest.raises(ValueError, match="holds no transition"):
            add_experience(small(), source)

    def test_other_spaces_are_refused_before_anything_is_stored(self):
        model = small(lambda: gym.make("Pendulum-v1"))
        with pytest.raises(ValueError, match="same environment"):
            add_experience(model, sb3_replay())
        assert model.replay_buffer.size() == 0

    @pytest.mark.parametrize(
        ("own", "theirs"),
        [
            (spaces.Box(0, 255, (1,), np.uint8), LINE),
            (spaces.Discrete(22), spaces.Discrete(9)),
            (spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([4, 3])),
        ],
    )
    def test_other_kinds_of_numbers_are_refused(self, own: Any, theirs: Any):
        class Own(Line):
            observation_space = own

        with pytest.raises(ValueError, match="the replay has observations"):
            add_experience(small(Own), ReplayBuffer(20, theirs, STICK, "cpu"))

    def test_a_vector_that_does_not_report_its_time_limit_has_none(self):
        model = small().learn(80)
        dreams = DreamVecEnv(model, n_envs=1, horizon=5)
        assert _time_limit(Dreamer("MlpPolicy", dreams, model_size="debug", buffer_size=400, device="cpu")) is None

    def test_an_unknown_kind_and_its_own_replay_are_refused(self):
        model = small()
        with pytest.raises(TypeError, match="not understood"):
            add_experience(model, 3)
        with pytest.raises(ValueError, match="there already"):
            add_experience(model, model.replay_buffer)

    def test_one_bad_episode_among_good_ones_leaves_everything_as_it_was(self):
        model = small().learn(10)
        before, bad = model.replay_buffer.size(), episode(7, 3)
        bad.reward[1] = np.nan
        for source in ([episode(0, 5), bad], iter([episode(0, 5), bad]), [episode(0, 5), "no episode"]):
            with pytest.raises((ValueError, TypeError), match=r"NaN|nan|no episode"):
                add_experience(model, source)
            assert model.replay_buffer.size() == before
            assert model._last_obs is not None

    def test_lengths_that_do_not_fit_are_refused(self):
        e = episode(0, 3)
        e.reward = e.reward[:2]
        with pytest.raises(ValueError, match=r"an episode of 2 rewards, .* \{'obs': 3\}, here \{'obs': 4\}"):
            add_experience(small(), [e])

    def test_the_episode_and_the_step_of_what_is_refused_are_named(self):
        bad = episode(0, 5)
        bad.obs["obs"][3] = np.nan
        with pytest.raises(ValueError, match=r"episode 1 of list: observation of step 3 .* Nothing was added"):
            add_experience(small(), [episode(0, 4), bad])
        for wrong in (
            episode(0, 0),
            Episode({"other": bad.obs["obs"]}, bad.action, bad.reward, False),
        ):
            with pytest.raises(ValueError, match=r"episode 0 of list: an episode of \d rewards"):
                add_experience(small(), [wrong])


def test_a_file_is_read_once_and_a_damaged_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = sb3_replay()
    put(source, 0, 1, done=True)
    save_to_pkl(tmp_path / "replay.pkl", source)
    read = []
    monkeypatch.setattr(experience, "unpickled", lambda *args: read.append(args) or unpickled(*args))
    add_experience(small(), tmp_path / "replay.pkl")
    assert len(read) == 1
    (tmp_path / "replay.pkl").write_bytes((tmp_path / "replay.pkl").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"replay.pkl is damaged or no saved replay"):
        add_experience(small(), tmp_path / "replay.pkl")


def test_statistics_include_added_episodes_as_if_they_had_been_lived():
    lived = VecNormalize(DummyVecEnv([Line]), gamma=0.5)
    model = small(env=lived)
    add_experience(model, [episode(0, 3)])
    assert lived.obs_rms.mean.item() == pytest.approx(np.mean([0, 1, 2, 3]), abs=1e-3)
    assert lived.ret_rms.mean == pytest.approx(np.mean([0.1, 0.25, 0.425]), abs=1e-3)
    lived.training = False
    add_experience(model, [episode(50, 3)])
    assert lived.obs_rms.mean.item() == pytest.approx(1.5, abs=1e-3)


def test_recorded_experience_is_sampled_uniformly_and_the_newest_steps_come_first():
    model = small(buffer_size=2000, learning_starts=2000)
    add_experience(model, [episode(0, 500), episode(0, 500)])
    assert not model.replay_buffer._rings._queue
    drawn = model.replay_buffer.sample(100).index[:, 1]
    assert drawn.min() < 150
    assert drawn.max() > 850
    assert not np.array_equal(drawn, np.sort(drawn))
    model.learn(8)
    assert model.replay_buffer.sample(4).index[0, 1] == 1006
