"""Long runs: a worker that dies is named at once, memory stays flat, nothing is left open."""

import os
import threading
import time
from pathlib import Path

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from benchmarks.memory import open_files, resident_megabytes
from sb3_dreamer import Dreamer

DEBUG = dict(
    model_size="debug", learning_starts=10, batch_size=2, batch_length=8, buffer_size=400, train_ratio=4,
    imagination_horizon=3, imagination_starts=4, seed=0, device="cpu",
)  # fmt: skip


def healthy() -> gym.Env:
    return gym.make("Pendulum-v1")


def dying(at_step: int):
    """Makes an environment whose process is killed in that step; local, so that it is pickled whole."""

    def make() -> gym.Env:
        env = gym.make("Pendulum-v1")
        steps = iter(range(1, at_step + 1))
        step = env.step
        env.step = lambda action: os.kill(os.getpid(), 9) if next(steps) == at_step else step(action)
        return env

    return make


def test_a_worker_that_dies_is_named_within_seconds_and_what_was_collected_is_kept(tmp_path: Path) -> None:
    env = SubprocVecEnv([lambda: gym.make("Pendulum-v1"), dying(12)])
    model = Dreamer("MlpPolicy", env, **DEBUG)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"processes of environments died, number and exit code: \{1: -9\}.*set_env"):
        model.learn(100)
    assert time.monotonic() - begun < 30  # on a busy machine; it takes a fraction of a second
    assert model.num_timesteps == 22
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")

    again = Dreamer.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", 2), device="cpu")
    again.load_replay_buffer(tmp_path / "replay")
    assert again.replay_buffer.size() == 22
    again.learn(20, reset_num_timesteps=False)
    model.set_env(make_vec_env("Pendulum-v1", 2))  # and the agent itself goes on as well
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps == again.num_timesteps == 42
    env.remotes[0].send(("close", None))
    for process in env.processes:
        process.join(5)
    for remote in env.remotes:
        remote.close()


def test_other_errors_of_an_environment_stay_what_they_are() -> None:
    class Broken(gym.Wrapper):
        def step(self, action):
            raise FileNotFoundError("no mesh")

    with pytest.raises(FileNotFoundError, match="no mesh"):
        Dreamer("MlpPolicy", Broken(healthy()), **DEBUG).learn(5)


def test_fifty_learns_leave_no_files_and_no_threads() -> None:
    model = Dreamer("MlpPolicy", healthy(), **DEBUG).learn(20)
    files, threads = open_files(), threading.active_count()
    for _ in range(50):
        model.learn(2, reset_num_timesteps=False)
    assert (open_files(), threading.active_count()) == (files, threads)


def test_memory_is_flat_once_the_replay_is_full() -> None:
    model = Dreamer("MlpPolicy", healthy(), **DEBUG).learn(500)
    before = resident_megabytes()
    model.learn(1_500, reset_num_timesteps=False, log_interval=1)
    assert resident_megabytes() - before < 10
