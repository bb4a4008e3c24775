"""What reaches the replay, and in which units: VecNormalize, ends of episodes, bounds of actions."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.replay import read_episodes
from sb3_dreamer.replay.columns import FIRST, LAST, TERMINAL

DEBUG = dict(model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=500, train_ratio=8,
             imagination_horizon=2, imagination_starts=2, seed=0, device="cpu")  # fmt: skip


class Ramp(gym.Env):
    """Observes (100 + t, -t), is paid t, ends after six steps; remembers the actions that arrived.

    :param ends: "terminated", "truncated" or "both".
    """

    observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, ends: str = "truncated", action_space: spaces.Space | None = None) -> None:
        self.ends, self.action_space = ends, action_space or spaces.Box(-2, 6, (1,))
        self.actions: list = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.actions.append(action)
        self.t += 1
        end = self.t == 6
        return (
            self.observation(),
            float(self.t),
            end and self.ends != "truncated",
            end and self.ends != "terminated",
            {},
        )

    def observation(self):
        return np.array([100 + self.t, -self.t], np.float32)


class DictRamp(Ramp):
    observation_space = spaces.Dict(a=spaces.Box(-np.inf, np.inf, (2,)), b=spaces.Discrete(9))

    def observation(self):
        return {"a": super().observation(), "b": self.t}


class Whole(Ramp):
    observation_space = spaces.Discrete(9)

    def observation(self):
        return self.t


def agent(env, policy: str = "MlpPolicy", **settings) -> Dreamer:
    return Dreamer(policy, env, **{**DEBUG, **settings})


def stored(model: Dreamer) -> dict[str, np.ndarray]:
    replay = model.replay_buffer
    return {name: array[replay.stream(0)] for name, array in replay.arrays.items()}


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "flag"), [("truncated", LAST), ("terminated", LAST | TERMINAL), ("both", LAST | TERMINAL)]
)
def test_a_time_limit_ends_the_episode_and_not_the_world(ends, flag):
    model = agent(Ramp(ends)).learn(20)
    entries = stored(model)
    assert entries["flags"][:8].tolist() == [FIRST, 0, 0, 0, 0, 0, flag, FIRST]
    assert entries["obs/obs"][:8, 1].tolist() == [0, -1, -2, -3, -4, -5, -6, 0]  # the last observation is there
    assert entries["reward"][:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    assert entries["action"][6] == 0


# -- VecNormalize ------------------------------------------------------------------------------------------------------


def test_originals_are_stored_and_sampled_with_the_statistics_of_now():
    env = VecNormalize(DummyVecEnv([Ramp]), clip_obs=100.0)
    model = agent(env).learn(20)
    entries = stored(model)
    expected = [[100 + t, -t] for t in (0, 1, 2, 3, 4, 5, 6)]
    assert np.allclose(entries["obs/obs"][:7], expected, atol=1e-4)  # the final one is unnormalized again
    assert entries["reward"][:7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    for mean, spread in ((100.0, 1.0), (90.0, 2.0)):
        env.obs_rms.mean[:], env.obs_rms.var[:] = [mean, 0.0], spread**2
        env.ret_rms.var = np.array(4.0)
        batch = model.replay_buffer.sample(4, env=env)
        env_index, start = batch.index.T
        assert not env_index.any()
        rows = start[:, None] + np.arange(8)
        assert np.allclose(batch.obs["obs"], (entries["obs/obs"][rows] - [mean, 0.0]) / spread, atol=1e-3)
        assert np.allclose(batch.reward, entries["reward"][rows] / 2, atol=1e-3)


def test_an_evaluation_in_the_training_environments_leaves_no_trace_in_the_replay():
    class Evaluate(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls in (9, 12, 18, 27):  # twice at the end of an episode
                self.training_env.reset()
                for _ in range(2):
                    self.training_env.step(np.zeros((1, 1)))
            return True

    model = agent(VecNormalize(DummyVecEnv([Ramp]))).learn(40, Evaluate())
    episodes = list(read_episodes(model.replay_buffer))
    assert len(episodes) >= 6
    for one in episodes:
        np.testing.assert_array_equal(one.obs["obs"][:, 0], 100 + np.arange(len(one) + 1))
        np.testing.assert_array_equal(one.reward, 1 + np.arange(len(one)))


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_a_reset_between_two_steps_begins_an_episode(kind):
    class Reset(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps in (9, 20):
                self.training_env.reset()

        def _on_step(self) -> bool:
            return True

    model = agent(kind([Ramp])).learn(30, Reset())
    for one in read_episodes(model.replay_buffer):
        np.testing.assert_array_equal(one.obs["obs"][:, 0], 100 + np.arange(len(one) + 1))


def test_a_reset_is_noticed_even_if_the_environment_always_gives_the_same_information():
    class Same(Ramp):
        info: dict = {}

        def reset(self, **kwargs):
            return super().reset(**kwargs)[0], self.info

    env = DummyVecEnv([Same])
    model = agent(env).learn(15)
    evaluate_policy(model, env, 1, warn=False)
    model.learn(15, reset_num_timesteps=False)
    for one in read_episodes(model.replay_buffer):
        np.testing.assert_array_equal(one.obs["obs"][:, 0], 100 + np.arange(len(one) + 1))


def test_the_policy_sees_normalised_observations_in_training_and_in_predict():
    env = VecNormalize(DummyVecEnv([Ramp]))
    model = agent(env).learn(20)
    assert np.abs(model._last_obs).max() <= 10 < np.abs(model._last_original_obs).max()
    assert model.get_vec_normalize_env() is env


@pytest.mark.parametrize(
    ("kind", "policy", "keys"), [(DictRamp, "MultiInputPolicy", ["a"]), (Whole, "MlpPolicy", None)]
)
def test_other_observations_survive_vecnormalize(kind, policy, keys):
    env = VecNormalize(DummyVecEnv([kind]), norm_obs=keys is not None, norm_obs_keys=keys)
    entries = stored(agent(env, policy).learn(20))
    whole = entries["obs/b" if keys else "obs/obs"]
    assert whole[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    if keys:
        assert np.allclose(entries["obs/a"][:7, 0], 100 + np.arange(7), atol=1e-3)


# -- actions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_arrive_in_the_bounds_of_the_space_and_are_stored_scaled(dtype):
    space = spaces.Box(np.array([-2.0, 0.0], dtype), np.array([6.0, 1e-3], dtype), dtype=dtype)
    env = Ramp(action_space=space)
    model = agent(env, learning_starts=12).learn(30)
    arrived = np.array(env.actions)
    assert arrived.dtype == dtype
    assert all(space.contains(action) for action in env.actions)
    entries = stored(model)
    taken = entries["action"][(entries["flags"] & LAST) == 0]
    assert np.abs(taken).max() <= 1 + 1e-6
    assert np.allclose(model.policy.unscale_action(taken), arrived[: len(taken)], atol=1e-5)


def test_the_model_gets_the_action_before_and_none_at_a_start():
    env = Ramp()
    model = agent(env).learn(30)
    batch = model.replay_buffer.sample(3)
    number = batch.index[:, 1:] + np.arange(batch.reward.shape[1])
    went_on = ~batch.is_first.numpy()
    np.testing.assert_array_equal(batch.prev_action.numpy()[went_on], stored(model)["action"][number[went_on] - 1])
    assert not batch.prev_action[batch.is_first].any()


def test_random_actions_are_what_the_state_remembers():
    model = agent(Ramp(), learning_starts=100).learn(3)
    assert np.allclose(model._online_state[1], stored(model)["action"][-1])


def test_actions_of_integers_are_remembered_as_they_were_taken(monkeypatch):
    model = agent(Ramp(action_space=spaces.Box(0, 4, (1,), np.int64)), learning_starts=8, buffer_size=90).learn(30)
    stored_now = []
    add = model.replay_buffer.add
    monkeypatch.setattr(
        model.replay_buffer, "add", lambda *entry, latent: (stored_now.append(entry[2]), add(*entry, latent=latent))
    )
    for _ in range(5):
        model.learn(1, reset_num_timesteps=False)
        assert np.allclose(model._online_state[1], stored_now[-1])
    action, state = model.predict(np.zeros(2, np.float32))
    assert np.allclose(state[1], model.policy.actions.to_replay(action[None]))


def test_stored_latents_are_those_of_the_acting_agent_until_they_are_refreshed():
    model = agent(Ramp(), learning_starts=100).learn(3)
    kept, rssm = model.replay_buffer._storage.arrays["latent"][2], model.policy.world_model.rssm
    assert kept.shape == (rssm.latent_width,)
    restored = rssm.restore(th.as_tensor(kept, dtype=th.float32)[None])
    assert np.allclose(restored.features, model._online_state[0], atol=1e-2)


def test_an_update_refreshes_the_latents_of_what_it_was_given(monkeypatch):
    model = agent(Ramp(), batch_size=1).learn(40)
    sampled, returned, sample, update = [], [], model.replay_buffer.sample, model.update
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *a, **k: sampled.append(sample(*a, **k)) or sampled[-1])
    monkeypatch.setattr(model, "update", lambda batch: returned.append(update(batch)) or returned[-1])
    model._captured = None
    model.train(1, 1)
    (batch,), ((latents, _),) = sampled, returned
    kept = model.replay_buffer._storage.arrays["latent"][batch.index[0, 1] + np.arange(8)]
    np.testing.assert_array_equal(kept, latents[0].half())
