"""Tianshou: actions, experience and policies, there and back."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tianshou.algorithm.algorithm_base import Policy
from tianshou.algorithm.modelfree.sac import SACPolicy
from tianshou.data import (
    Batch,
    CachedReplayBuffer,
    Collector,
    HERVectorReplayBuffer,
    ReplayBuffer,
    ReplayBufferManager,
    VectorReplayBuffer,
)
from tianshou.env import DummyVectorEnv
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic

from sb3_dreamer import Dreamer
from sb3_dreamer.replay import read_episodes
from sb3_dreamer.tianshou import (
    TianshouPolicy,
    TianshouTeacher,
    add_experience,
    drop_states,
    fill_buffer,
    plain_observations,
)
from tests.hybrid.agents import SMALL


class Clock(gym.Env):
    """Tells the time of the episode; odd ones end at 5, even ones are cut at 7. The reward is the last action."""

    observation_space: Any = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space: Any = spaces.Box(-2.0, 2.0, (1,), np.float32)
    episodes = 0

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        self.time, self.episodes = 0, self.episodes + 1
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        terminated, truncated = self.episodes % 2 == 1 and self.time == 5, self.time == 7
        return self.seen(), float(action[0]), terminated, truncated, {}

    def seen(self) -> Any:
        return np.array([self.time, self.episodes], np.float32)


class DictClock(Clock):
    observation_space = spaces.Dict({key: spaces.Box(-np.inf, np.inf, (1,), np.float32) for key in ("obs", "episode")})

    def seen(self) -> Any:
        return {"obs": np.array([self.time], np.float32), "episode": np.array([self.episodes], np.float32)}


class Times(Policy):
    """Acts by what it sees, in [-1, 1], which it scales to the environment."""

    def __init__(self, env: type[Clock] = Clock) -> None:
        super().__init__(env.action_space, env.observation_space, action_scaling=True)

    def forward(self, batch: Batch, state: Any = None, **kwargs: Any) -> Batch:
        time = batch.obs["obs"][:, 0] if isinstance(batch.obs, Batch) else batch.obs[:, 0]
        return Batch(act=np.asarray(time, np.float32)[:, None] / 10, state=state)


class Counter(Policy):
    """A recurrent one: acts by how often it was asked in this episode."""

    def __init__(self) -> None:
        super().__init__(Clock.action_space, action_bound_method=None)

    def forward(self, batch: Batch, state: Any = None, **kwargs: Any) -> Batch:
        asked = th.zeros(len(batch.obs), 1) if state is None else state
        return Batch(act=asked.numpy() / 10, state=asked + 1)


def small(env: type[gym.Env] = Clock, n_envs: int = 2, **kwargs: Any) -> Dreamer:
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    return Dreamer(policy, DummyVecEnv([env] * n_envs), **{**SMALL, **kwargs})


def collected(env: type[Clock], n_envs: int, size: int, steps: int) -> VectorReplayBuffer:
    buffer = VectorReplayBuffer(size, n_envs)
    collector = Collector(Times(env), DummyVectorEnv([env] * n_envs), buffer)
    collector.collect(n_step=steps, reset_before_collect=True)
    return buffer


@pytest.fixture(scope="module")
def dreamer() -> Dreamer:
    return small().learn(120)


# -- acting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_collector_acts_as_predict_does_over_the_ends_of_episodes(dreamer: Dreamer, deterministic: bool):
    buffer = VectorReplayBuffer(60, 3)
    collector = Collector(TianshouPolicy(dreamer, deterministic), DummyVectorEnv([Clock] * 3), buffer)
    th.manual_seed(0)
    collector.collect(n_step=30, reset_before_collect=True)
    collector.collect(n_step=30)  # continues where it was

    th.manual_seed(0)
    envs = [Clock() for _ in range(3)]
    obs, state, starts = np.stack([env.reset()[0] for env in envs]), None, np.ones(3, bool)
    for t in range(20):
        actions, state = dreamer.predict(obs, state, starts, deterministic)
        np.testing.assert_array_equal(buffer.act[t + buffer._offset[:3]], actions)
        steps = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        starts = np.array([step[2] or step[3] for step in steps])
        obs = np.stack(
            [env.reset()[0] if start else step[0] for env, step, start in zip(envs, steps, starts, strict=True)]
        )


def test_whole_episodes_can_be_collected(dreamer: Dreamer):
    collector = Collector(TianshouPolicy(dreamer), DummyVectorEnv([Clock] * 3))
    stats = collector.collect(n_episode=6, reset_before_collect=True)
    assert sorted(stats.lens) == [5, 5, 5, 7, 7, 7]


def test_a_hook_keeps_states_out_of_the_buffer(dreamer: Dreamer):
    buffer = VectorReplayBuffer(60, 2)
    envs = DummyVectorEnv([Clock] * 2)
    collector = Collector(TianshouPolicy(dreamer), envs, buffer, on_step_hook=drop_states)
    collector.collect(n_step=20, reset_before_collect=True)
    assert "hidden_state" not in buffer[:10].policy.get_keys()


def test_observations_are_normalized_as_in_training():
    env = VecNormalize(DummyVecEnv([Clock]))
    model = Dreamer("MlpPolicy", env, **SMALL).learn(60)
    obs = np.array([[3.0, 2.0]], np.float32)
    ours = TianshouPolicy(model)(Batch(obs=obs, info=Batch())).act
    np.testing.assert_array_equal(ours, model.predict(env.normalize_obs(obs), deterministic=True)[0])
    assert not np.array_equal(ours, model.predict(obs, deterministic=True)[0])


def test_statistics_that_are_missing_are_asked_for(tmp_path):
    Dreamer("MlpPolicy", VecNormalize(DummyVecEnv([Clock])), **SMALL).learn(60).save(tmp_path / "model")
    with pytest.raises(ValueError, match="TianshouPolicy needs the statistics of VecNormalize"):
        TianshouPolicy(Dreamer.load(tmp_path / "model"))


def test_dict_observations_are_understood():
    model = small(DictClock).learn(60)
    seen = {"obs": np.array([[3.0], [1.0]], np.float32), "episode": np.array([[1.0], [2.0]], np.float32)}
    answer = TianshouPolicy(model)(Batch(obs=Batch(seen), info=Batch()))
    np.testing.assert_array_equal(answer.act, model.predict(seen, deterministic=True)[0])


class Choices(Clock):
    """Two choices at once; the reward is the second one."""

    action_space = spaces.MultiDiscrete([3, 4])

    def step(self, action: Any) -> Any:
        obs, _, *rest = super().step([0.0])
        return obs, float(action[1]), *rest


def test_choices_are_understood_there_and_back():
    model, buffer = small(Choices).learn(60), VectorReplayBuffer(40, 2)
    Collector(TianshouPolicy(model), DummyVectorEnv([Choices] * 2), buffer).collect(
        n_step=20, reset_before_collect=True
    )
    pupil, again = small(Choices), VectorReplayBuffer(40, 2)
    add_experience(pupil, buffer)
    fill_buffer(pupil, again)
    assert len(again) == 20
    np.testing.assert_array_equal(again.rew[again.sample_indices(0)], again.act[again.sample_indices(0)][:, 1])


def test_images_are_turned_as_sb3_turns_them():
    space = spaces.Box(0, 255, (3, 8, 6), np.uint8)
    image = np.random.default_rng(0).integers(0, 255, (2, 8, 6, 3), np.uint8)
    np.testing.assert_array_equal(plain_observations(space, image), image.transpose(0, 3, 1, 2))


# -- their experience --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [Clock, DictClock])
def test_experience_arrives_as_it_happened(env: type[Clock]):
    model = small(env)
    add_experience(model, collected(env, n_envs=2, size=100, steps=40), Times(env))  # 5 + 7 + 5 + 3 steps each
    episodes = list(read_episodes(model.replay_buffer))
    assert sorted(len(episode) for episode in episodes) == [3, 3, 5, 5, 5, 5, 7, 7]
    for episode in episodes:
        time = np.arange(len(episode) + 1, dtype=np.float32)
        np.testing.assert_array_equal(episode.obs["obs"][:, 0], time)
        np.testing.assert_allclose(episode.action[:, 0], time[:-1] / 10, atol=1e-6)  # scaled to [-1, 1]
        np.testing.assert_allclose(episode.reward, 2 * time[:-1] / 10, atol=1e-6)  # the environment's action
        assert episode.terminal == (len(episode) == 5)


def test_a_buffer_that_has_begun_to_overwrite_is_read_from_its_oldest_entry_on():
    model = small()
    add_experience(model, collected(Clock, n_envs=2, size=20, steps=40), Times())  # the last 10 of 20 steps each
    episodes = list(read_episodes(model.replay_buffer))
    assert sorted(len(episode) for episode in episodes) == [2, 2, 3, 3, 5, 5]
    assert sorted(episode.obs["obs"][0, 0] for episode in episodes) == [0, 0, 0, 0, 5, 5]


def test_a_single_transition_is_an_episode():
    model, buffer = small(), ReplayBuffer(10)
    row = dict(act=np.zeros(1, np.float32), rew=1.0, terminated=True, truncated=False, info={})
    buffer.add(Batch(obs=np.zeros(2, np.float32), obs_next=np.ones(2, np.float32), **row))
    add_experience(model, buffer)
    (episode,) = read_episodes(model.replay_buffer)
    assert (len(episode), episode.terminal) == (1, True)


def test_an_episode_that_was_left_is_not_joined_to_the_next():
    model, buffer = small(n_envs=1), VectorReplayBuffer(100, 1)
    collector = Collector(Times(), DummyVectorEnv([Clock]), buffer)
    for _ in range(2):
        collector.collect(n_step=4, reset_before_collect=True)
    add_experience(model, buffer, Times())
    assert [len(episode) for episode in read_episodes(model.replay_buffer)] == [4, 4]


@pytest.mark.parametrize(
    ("env", "buffer", "error"),
    [
        (Clock, lambda: VectorReplayBuffer(10, 2), "the buffer is empty, as that of an on-policy algorithm"),
        (Clock, lambda: collected(DictClock, 1, 20, 10), "keys .'episode', 'obs'., the model's .."),
        (DictClock, lambda: collected(Clock, 1, 20, 10), "keys .., the model's .'episode', 'obs'."),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_added(env: type[Clock], buffer: Any, error: str):
    model = small(env)
    with pytest.raises(ValueError, match=error):
        add_experience(model, buffer())
    assert model.replay_buffer.size() == 0


class WideClock(Clock):
    action_space = spaces.Box(-2.0, 2.0, (3,), np.float32)


@pytest.mark.parametrize("env", [WideClock, Choices])
def test_actions_of_another_space_are_refused(env: type[Clock]):
    model = small(env)
    with pytest.raises(ValueError, match="the policy's actions are"):
        add_experience(model, collected(Clock, 1, 20, 10), Times())
    with pytest.raises(ValueError, match=r"actions are float32 of shape .1,., the model's"):
        add_experience(model, collected(Clock, 1, 20, 10))
    assert model.replay_buffer.size() == 0


def test_buffers_that_do_not_hold_what_happened_are_refused(dreamer: Dreamer):
    cached = CachedReplayBuffer(ReplayBuffer(20), cached_buffer_num=2, max_episode_length=10)
    goals = HERVectorReplayBuffer(20, 2, compute_reward_fn=lambda *_: np.zeros(1), horizon=5)
    for buffer in (cached, goals, dreamer.replay_buffer):
        with pytest.raises(TypeError, match="use a ReplayBuffer or VectorReplayBuffer"):
            add_experience(dreamer, buffer)
        with pytest.raises(TypeError, match="use a ReplayBuffer or VectorReplayBuffer"):
            fill_buffer(dreamer, buffer)


def test_a_buffer_without_the_next_observations_is_refused():
    model, buffer = small(), VectorReplayBuffer(20, 2, ignore_obs_next=True)
    Collector(Times(), DummyVectorEnv([Clock] * 2), buffer).collect(n_step=10, reset_before_collect=True)
    with pytest.raises(ValueError, match="ignore_obs_next=True"):
        add_experience(model, buffer, Times())


# -- their policies ----------------------------------------------------------------------------------------------------


def sac_policy() -> SACPolicy:
    th.manual_seed(0)
    net = Net(state_shape=(2,), hidden_sizes=[16])
    actor = ContinuousActorProbabilistic(preprocess_net=net, action_shape=(1,), unbounded=True, conditioned_sigma=True)
    return SACPolicy(actor=actor, action_space=Clock.action_space)


def test_a_teacher_answers_in_units_of_the_environment_and_deterministically_if_asked():
    policy = sac_policy()
    teacher = TianshouTeacher(policy, Clock.observation_space)
    obs = np.array([[1.0, 1.0], [4.0, 2.0]], np.float32)
    sure, _ = teacher.predict(obs, deterministic=True)
    mean = policy(Batch(obs=obs, info=Batch())).act.detach().numpy()
    np.testing.assert_allclose(sure, 2 * mean, rtol=1e-6)
    assert not np.array_equal(teacher.predict(obs)[0], teacher.predict(obs)[0])
    assert policy.deterministic_eval


def test_a_recurrent_teacher_starts_again_with_each_episode():
    teacher, obs, state = TianshouTeacher(Counter(), Clock.observation_space), np.zeros((2, 2), np.float32), None
    actions = []
    for starts in ([True, True], [False, False], [False, True], [False, False]):
        action, state = teacher.predict(obs, state, np.array(starts))
        actions.append(np.rint(10 * action[:, 0]).tolist())
    assert actions == [[0, 0], [1, 1], [2, 0], [3, 1]]


def test_a_teacher_has_to_know_what_it_sees():
    with pytest.raises(ValueError, match="pass observation_space="):
        TianshouTeacher(Counter())


def test_dreamer_starts_from_a_teacher():
    model = small().warm_start(TianshouTeacher(Times()), n_steps=200, student_share=0.0)
    for episode in read_episodes(model.replay_buffer):
        np.testing.assert_allclose(episode.action[:, 0], episode.obs["obs"][:-1, 0] / 10, atol=1e-6)


# -- and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [Clock, DictClock])
@pytest.mark.parametrize("make_buffer", [lambda: ReplayBuffer(200), lambda: VectorReplayBuffer(200, 2)])
def test_a_buffer_is_filled_with_what_happened(env: type[Clock], make_buffer: Any):
    model, buffer = small(env).learn(60), make_buffer()
    fill_buffer(model, buffer)
    episodes = list(read_episodes(model.replay_buffer))
    assert len(buffer) == sum(len(episode) for episode in episodes)
    rows = buffer[buffer.sample_indices(0)]
    assert rows.terminated.sum() == sum(episode.terminal for episode in episodes)
    assert (rows.terminated | rows.truncated).sum() == len(episodes)
    assert np.abs(rows.act).max() <= 1.0
    time, after = (seen["obs"] if env is DictClock else seen for seen in (rows.obs, rows.obs_next))
    np.testing.assert_array_equal(after[:, 0], time[:, 0] + 1)
    np.testing.assert_allclose(rows.rew, 2 * rows.act[:, 0], atol=1e-6)


def test_what_came_in_goes_out_again():
    model, before, after = small(), collected(Clock, n_envs=2, size=100, steps=24), VectorReplayBuffer(100, 2)
    add_experience(model, before, Times())
    fill_buffer(model, after)
    for key in ("obs", "act", "rew", "terminated", "obs_next"):
        np.testing.assert_allclose(
            after[after.sample_indices(0)][key], before[before.sample_indices(0)][key], atol=1e-6
        )


def test_parts_of_a_buffer_are_filled_alike_beside_what_they_hold(dreamer: Dreamer):
    buffer = ReplayBufferManager([ReplayBuffer(60), ReplayBuffer(200)])
    for _ in range(30):
        row = dict(obs=np.zeros(2, np.float32), obs_next=np.ones(2, np.float32), act=np.zeros(1, np.float32), info={})
        buffer.add(Batch([Batch(row, rew=0.0, terminated=True, truncated=False)]), buffer_ids=[0])
    fill_buffer(dreamer, buffer)
    shares = [len(part) / part.maxsize for part in buffer.buffers]
    assert shares[0] == pytest.approx(shares[1], abs=0.12)
    assert len(buffer) == 30 + sum(map(len, read_episodes(dreamer.replay_buffer)))


def test_a_small_buffer_is_given_the_newest_of_each_environment(dreamer: Dreamer):
    buffer = VectorReplayBuffer(20, 2)
    fill_buffer(dreamer, buffer)
    newest = np.concatenate([episode.obs["obs"][:-1, 1] for episode in read_episodes(dreamer.replay_buffer, 20)])
    assert {*buffer.obs[buffer.sample_indices(0)][:, 1]} == {*newest}


def test_nothing_is_added_behind_an_episode_that_has_not_ended(dreamer: Dreamer):
    buffer = collected(Clock, n_envs=2, size=100, steps=6)
    with pytest.raises(ValueError, match="has not ended"):
        fill_buffer(dreamer, buffer)
    assert len(buffer) == 6


def test_an_empty_replay_fills_no_buffer():
    with pytest.raises(ValueError, match="no transition"):
        fill_buffer(small(), ReplayBuffer(10))
