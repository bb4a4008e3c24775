"""learn(): what SB3 users count on, and what a recurrent agent has to add to it."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_dreamer import Dreamer, dreamer
from sb3_dreamer.metrics import Metrics
from sb3_dreamer.nets import layers
from sb3_dreamer.replay import read_episodes
from sb3_dreamer.replay.columns import FIRST, LAST

DEBUG = dict(
    model_size="debug", learning_starts=16, batch_size=2, batch_length=8, buffer_size=500, train_ratio=8,
    imagination_horizon=2, imagination_starts=2, seed=0, device="cpu",
)  # fmt: skip


class Count(gym.Env):
    """Observes (steps of the episode, number of the episode); reward is the step."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-2, 2, (1,))

    def __init__(self, length: int = 10) -> None:
        self.length, self.episode, self.step_number = length, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self.observation(), {}

    def step(self, action):
        self.step_number += 1
        return self.observation(), float(self.step_number), False, self.step_number == self.length, {}

    def observation(self):
        return np.array([self.step_number, self.episode], np.float32)


class Written(KVWriter):
    """Remembers what was logged."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.hidden_from_tensorboard: set[str] = set()

    def write(self, key_values, key_excluded, step=0):
        self.rows.append({**key_values, "step": step})
        self.hidden_from_tensorboard |= {key for key, where in key_excluded.items() if where and "tensorboard" in where}

    def close(self):
        pass


def agent(env=None, **settings) -> Dreamer:
    return Dreamer("MlpPolicy", Count() if env is None else env, **{**DEBUG, **settings})


def written(model: Dreamer) -> Written:
    output = Written()
    model.set_logger(Logger(None, [output]))
    return output


def stored(model: Dreamer, env: int = 0) -> dict[str, np.ndarray]:
    """All entries of one environment."""
    replay = model.replay_buffer
    return {name: array[replay.stream(env)] for name, array in replay.arrays.items()}


def same(a: Dreamer, b: Dreamer) -> bool:
    pairs = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    return all(th.equal(x, y) for x, y in pairs)


# -- environments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        lambda: "Pendulum-v1",
        lambda: gym.make("Pendulum-v1"),
        lambda: Monitor(gym.make("Pendulum-v1")),
        lambda: make_vec_env("Pendulum-v1", 1),
    ],
    ids=["id", "environment", "monitored", "vector"],
)
def test_an_environment_may_be_an_id_an_environment_or_a_vector_of_them(env):
    model = agent(env())
    assert model.learn(30) is model
    assert (model.num_timesteps, model._n_updates) == (30, 7)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_several_environments_run_side_by_side(kind):
    env = kind([lambda: Count(10), lambda: Count(7), lambda: Count(5)])
    model = agent(env).learn(61)
    assert model.num_timesteps == 63  # the first multiple of three that is not below
    for i, length in enumerate((10, 7, 5)):
        obs = stored(model, i)["obs/obs"]
        expected = [(t, episode) for episode in range(9) for t in range(length + 1)][: len(obs)]
        assert obs.tolist() == [list(pair) for pair in expected]
    env.close()


def test_the_number_of_steps_may_be_a_float():
    assert agent().learn(2e1).num_timesteps == 20


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_envs", "batch_size", "batch_length", "train_ratio"),
    [(1, 2, 8, 8), (1, 4, 4, 8), (3, 2, 8, 8), (1, 1, 5, 2.5), (2, 3, 6, 0.7), (1, 2, 4, 10)],
)
def test_the_train_ratio_is_exact_whatever_the_environments_and_the_shape_of_the_batch(
    n_envs, batch_size, batch_length, train_ratio
):
    env = DummyVecEnv([lambda: Count(1000)] * n_envs)
    model = agent(env, batch_size=batch_size, batch_length=batch_length, train_ratio=train_ratio).learn(90)
    waited = next(steps for steps in range(0, 90, n_envs) if steps >= 16 and steps // n_envs >= batch_length) - n_envs
    due = train_ratio * (90 - waited) / (batch_size * batch_length)
    assert model._n_updates == int(due + 1e-9)
    assert model._entries_owed / (batch_size * batch_length) == pytest.approx(due - int(due + 1e-9), abs=1e-6)


def test_updates_that_were_stopped_stay_owed(monkeypatch):
    model = agent(train_ratio=80).learn(20)  # five updates of sixteen entries each step
    updates, steps, sample = model._n_updates, model.num_timesteps, model.replay_buffer.sample
    calls = iter(range(100))

    def stopped(*args, **kwargs):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(model.replay_buffer, "sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps - steps, model._n_updates - updates, model._entries_owed) == (2, 7, 3 * 16)
    model.learn(3, reset_num_timesteps=False)
    assert model._n_updates - updates == 5 * 5


def test_a_vector_that_makes_its_reset_infos_anew_each_time_is_not_taken_for_reset():
    class Fresh(DummyVecEnv):
        @property
        def reset_infos(self):
            return [{}]

        @reset_infos.setter
        def reset_infos(self, value):
            pass

    model = agent(Fresh([lambda: Count(1000)])).learn(30)
    assert int((stored(model)["flags"] & FIRST != 0).sum()) == 1


def test_with_many_environments_no_updates_pile_up_while_there_is_no_sequence_yet():
    model = agent(DummyVecEnv([lambda: Count(1000)] * 20), learning_starts=16, batch_length=8)
    most = 0

    def watch(local, _):
        nonlocal most
        most = max(most, int(model._entries_owed))
        return True

    model.learn(20 * 8, callback=watch)
    assert most == 0
    assert model._n_updates == 20 * 8 // 16  # what the last step paid for


def test_actions_are_random_until_there_is_something_to_learn_from_and_never_again(monkeypatch):
    model = agent(learning_starts=16)
    drawn: list[int] = []
    sample = model.action_space.sample
    monkeypatch.setattr(model.action_space, "sample", lambda: drawn.append(model.num_timesteps) or sample())
    model.learn(30)
    assert drawn == list(range(15))  # 15 steps are 16 entries: the last one of the episode of 10 counts
    model.learn(10)
    assert len(drawn) == 15


def test_learning_starts_that_do_not_fit_into_the_replay_still_begin():
    assert agent(buffer_size=20, learning_starts=100).learn(30)._n_updates > 0


def test_nor_do_those_that_fit_into_it_but_not_into_the_rows_of_all_environments_stop_it():
    env = DummyVecEnv([lambda: Count(1000)] * 3)
    assert agent(env, buffer_size=29, learning_starts=28).learn(60)._n_updates > 0  # three times nine rows


def test_the_replay_takes_no_memory_before_the_first_step():
    model = agent(buffer_size=10**9)
    assert model.replay_buffer.nbytes == 0


# -- going on ----------------------------------------------------------------------------------------------------------


def test_learning_on_stays_in_the_episode():
    model = agent().learn(24)
    state = model._online_state[0].copy()
    model.learn(3, reset_num_timesteps=False)
    assert model.num_timesteps == 27
    assert model.env.envs[0].unwrapped.episode == 2
    flags = stored(model)["flags"]
    assert np.flatnonzero(flags & FIRST).tolist() == [0, 11, 22]
    assert not np.array_equal(model._online_state[0], state)


def test_learning_on_leaves_an_episode_whole_where_that_of_another_environment_has_just_ended():
    model = agent(DummyVecEnv([lambda: Count(100), lambda: Count(5)])).learn(10)
    model.learn(4, reset_num_timesteps=False)
    assert np.flatnonzero(stored(model, 0)["flags"] & FIRST).tolist() == [0]
    assert np.flatnonzero(stored(model, 1)["flags"] & FIRST).tolist() == [0, 6]


def test_learning_anew_resets_and_cuts_the_stream_but_keeps_what_was_learned():
    model = agent().learn(24)
    updates = model._n_updates
    model.learn(5)
    assert (model.num_timesteps, model._episode_num) == (5, 0)
    assert model._n_updates > updates
    flags = stored(model)["flags"]
    assert np.flatnonzero(flags & FIRST).tolist() == [0, 11, 22, 26]
    assert np.flatnonzero(flags & LAST).tolist() == [10, 21, 25]
    assert stored(model)["reward"][26] == 0


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_whatever_stops_a_step_in_the_middle_cuts_the_stream_there(error):
    def stop(local, _):
        if local["self"].num_timesteps == 24:
            if error:
                raise error
            return False
        return True

    model = agent()
    if error:
        with pytest.raises(error):
            model.learn(100, callback=stop)
    else:
        model.learn(100, callback=stop)
    assert model.num_timesteps == 24
    model.learn(5, reset_num_timesteps=False)
    entries = stored(model)
    assert np.flatnonzero(entries["flags"] & FIRST).tolist() == [0, 11, 22, 25]  # the step that was stopped is missing
    assert np.flatnonzero(entries["flags"] & LAST).tolist() == [10, 21, 24]
    assert entries["obs/obs"][22:26].tolist() == [[0, 2], [1, 2], [2, 2], [0, 3]]
    assert entries["reward"][22:27].tolist() == [0, 1, 2, 0, 1]


def test_another_environment_begins_an_episode():
    model = agent().learn(24)
    model.set_env(Count())
    model.learn(3, reset_num_timesteps=False)
    assert np.flatnonzero(stored(model)["flags"] & FIRST).tolist() == [0, 11, 22, 26]


def test_the_recurrent_state_is_reset_where_an_episode_begins(monkeypatch):
    model = agent()
    seen = []
    act = model.policy.act
    monkeypatch.setattr(model.policy, "act", lambda *args: seen.append(bool(args[3])) or act(*args))
    model.learn(24)
    assert np.flatnonzero(seen).tolist() == [0, 10, 20]


def test_and_where_others_have_reset_the_environments(monkeypatch):
    class Reset(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 5:
                self.training_env.reset()

        def _on_step(self) -> bool:
            return True

    model, seen = agent(), []
    act = model.policy.act
    monkeypatch.setattr(model.policy, "act", lambda *args: seen.append(args[3] is not None) or act(*args))
    model.learn(12, Reset())
    assert np.flatnonzero(seen).tolist() == [0, 5]


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_seed_another():
    first, second, other = (agent("Pendulum-v1", seed=seed).learn(40) for seed in (3, 3, 4))
    assert first._n_updates == 12
    assert same(first, second)
    assert not same(first, other)


def test_evaluating_does_not_change_the_training():
    callback = EvalCallback(make_vec_env("Pendulum-v1", 2, seed=9), n_eval_episodes=1, eval_freq=15, verbose=0)
    plain = agent("Pendulum-v1").learn(40)
    evaluated = agent("Pendulum-v1").learn(40, callback=callback)
    assert callback.n_calls == 40
    assert np.isfinite(callback.last_mean_reward)
    assert same(plain, evaluated)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_unknown_arguments_are_a_type_error():
    with pytest.raises(TypeError, match="batchsize"):
        agent(batchsize=3)


def test_dictionaries_of_the_caller_stay_as_they_are():
    policy_kwargs, replay_buffer_kwargs = dict(units=8), dict(storage_path=None)
    model = agent(policy_kwargs=policy_kwargs, replay_buffer_kwargs=replay_buffer_kwargs).learn(20)
    assert (policy_kwargs, replay_buffer_kwargs) == (dict(units=8), dict(storage_path=None))
    assert model.policy_kwargs == dict(units=8)


def test_a_schedule_of_the_learning_rate_is_followed_and_logged():
    model = agent(learning_rate=lambda remaining: 1e-3 * remaining)
    output = written(model)
    model.learn(40)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    model.learn(40)
    model._current_progress_remaining = 0.25
    model.train(1, 2)
    model.dump_logs()
    assert output.rows[-1]["train/learning_rate"] == pytest.approx(2.5e-4)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-4)


def test_a_schedule_does_not_change_its_sign_where_many_environments_go_beyond_the_end():
    model = agent(make_vec_env("Pendulum-v1", n_envs=8), learning_rate=lambda remaining: 1e-3 * remaining).learn(100)
    assert model.num_timesteps == 104
    model.train(1, 2)
    assert model.policy.optimizer.param_groups[0]["lr"] == 0.0


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_have_the_names_of_sb3_and_the_numbers_of_the_run():
    model = agent()
    output = written(model)
    model.learn(45, log_interval=2)
    assert [row["step"] for row in output.rows] == [20, 40]
    row = output.rows[-1]
    assert {"time/fps", "time/time_elapsed", "train/learning_rate", "train/actor_loss"} < row.keys()
    assert (row["rollout/ep_rew_mean"], row["rollout/ep_len_mean"]) == (55.0, 10.0)
    assert (row["time/total_timesteps"], row["time/episodes"]) == (40, 4)
    # entry 16 comes with step 15; at step 40 the updates of 39 steps are done
    assert (row["train/n_updates"], row["train/skipped_updates"]) == ((39 - 14) * 8 // 16, 0)
    assert all(np.isscalar(value) for value in row.values())
    not_there = {"time/episodes", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
    assert output.hidden_from_tensorboard == not_there


def test_without_an_interval_nothing_is_logged_and_nothing_piles_up():
    model = agent()
    output = written(model)
    model.learn(45, log_interval=None)
    assert output.rows == []
    assert model._metrics._sums.numel() < 40


def test_every_weight_of_the_actor_learns_where_products_are_in_bfloat16(monkeypatch):
    # the actor is asked in the dream first, without gradient: a cast of its weights that is kept has none
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: True)
    model = agent("Pendulum-v1", learning_starts=1000, seed=0).learn(60)
    for head in (model.policy.world_model.reward_head, model.policy.critic.fast):
        th.nn.init.normal_(head.out.weight)  # zero at the start: nothing would be worth more than anything
    model.update(model.replay_buffer.sample(2))
    for name, weight in model.policy.actor.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_what_was_cast_in_the_dream_is_forgotten_before_the_actor_learns(monkeypatch):
    # only older torch takes it from there, so that the test above cannot fail on a new one
    order: list[str] = []

    def note(place, name):
        original = getattr(place, name)

        def noted(*args, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(place, name, noted)

    note(dreamer, "imagine")
    note(th, "clear_autocast_cache")
    note(dreamer, "actor_loss")
    model = agent("Pendulum-v1", learning_starts=1000).learn(60)
    model.update(model.replay_buffer.sample(2))
    assert order[:3] == ["imagine", "clear_autocast_cache", "actor_loss"]


@pytest.mark.filterwarnings("ignore:the replay is empty")
def test_a_new_seed_is_followed_by_what_the_replay_draws(tmp_path):
    agent("Pendulum-v1").learn(60).save(tmp_path / "model")
    runs = []
    for seed in (3, 3, 4):
        model = Dreamer.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
        model.set_random_seed(seed)
        runs.append(model.learn(60))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_new_discount_is_the_model_s_too():
    model = agent("Pendulum-v1", seed=0).learn(60)
    model.gamma = 0.5
    model.train(1, model.batch_size)
    assert model.policy.world_model.gamma == 0.5


def test_metrics_are_means_since_the_last_time():
    metrics = Metrics(th.device("cpu"))
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": th.tensor(value), "skipped_updates": th.tensor(False)})
    metrics.add({"a": th.tensor(th.nan), "skipped_updates": th.tensor(True)})
    assert metrics.skips() == 1
    assert metrics.means() == {"a": 3.0}
    metrics.reset()
    assert metrics.means() == {}


def test_successes_are_logged():
    class Success(Count):
        def step(self, action):
            *step, _info = super().step(action)
            return *step, {"is_success": self.episode % 2 == 0}

    model = agent(Success())
    output = written(model)
    model.learn(45, log_interval=4)
    assert output.rows[-1]["rollout/success_rate"] == 0.5


def test_tensorboard_has_one_folder_for_each_fresh_run(tmp_path):
    model = agent(tensorboard_log=str(tmp_path))
    model.learn(20, tb_log_name="run", log_interval=1)
    model.learn(20, tb_log_name="run", log_interval=1, reset_num_timesteps=False)
    assert [folder.name for folder in tmp_path.iterdir()] == ["run_1"]
    model.learn(20, log_interval=1)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["Dreamer_1", "run_1"]


def test_environments_that_others_have_reset_in_between_begin_new_episodes():
    """``evaluate_policy(model, model.get_env())``, between two calls of ``learn`` or from a callback."""
    for in_between in (False, True):
        model = Dreamer("MlpPolicy", DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=8)] * 2), **DEBUG)
        if in_between:
            model.learn(22)
            evaluate_policy(model, model.get_env(), 2, warn=False)
            model.learn(20, reset_num_timesteps=False)
        else:
            model.learn(42, callback=EveryNTimesteps(22, Evaluates()))
        lengths = [len(episode) for episode in read_episodes(model.replay_buffer)]
        assert lengths == 2 * [8, 2, 8, 1], "of three steps and of two, the last has no outcome yet"


class Evaluates(BaseCallback):
    def _on_step(self) -> bool:
        evaluate_policy(self.model, self.training_env, 2, warn=False)
        return True


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_schedule_without_a_rate_is_named_before_anything_is_learned(rate):
    model = Dreamer("MlpPolicy", "Pendulum-v1", **DEBUG, learning_rate=lambda remaining: rate)
    before = [p.clone() for p in model.policy.parameters()]
    with pytest.raises(ValueError, match="learning_rate is"):
        model.learn(60)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
