"""Runs that stop and go on: bit for bit where the environment can be restored, after a kill from a whole checkpoint."""

import collections
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.replay import read_episodes
from sb3_dreamer.resume import ResumeCallback, checkpoints, run_state, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEBUG = dict(
    model_size="debug", learning_starts=10, batch_size=2, batch_length=8, buffer_size=120, train_ratio=5,
    imagination_horizon=3, imagination_starts=4, warmup_updates=3, seed=3, device="cpu",
)  # fmt: skip


class Walk(gym.Env):
    """A random walk that knows how to be restored. Ends by itself at random, or by a time limit of ten steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=2), 0
        return self.x.astype(np.float32), {}

    def step(self, action):
        self.x = self.x + 0.1 * self.np_random.normal(size=2) + float(action[0])
        self.t += 1
        done = bool(self.np_random.random() < 0.1)
        return self.x.astype(np.float32), -float(abs(self.x[0])), done, not done and self.t == 10, {}

    def resume_state(self):
        return {"x": self.x, "t": self.t, "rng": self.np_random.bit_generator.state}

    def set_resume_state(self, state):
        self.x, self.t = state["x"], state["t"]
        self.np_random.bit_generator.state = state["rng"]


class Forgetful(Walk):
    """The same walk, which nobody can restore."""

    resume_state = set_resume_state = property()


class Choices(Walk):
    """The walk with choices for actions, seen by key."""

    observation_space = spaces.Dict(x=Walk.observation_space)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return {"x": obs}, info

    def step(self, action):
        obs, *rest = super().step([action - 1])
        return {"x": obs}, *rest


WRAPPED = {
    "choices": lambda n: DummyVecEnv([Choices] * n),
    "plain": lambda n: DummyVecEnv([Walk] * n),
    "normalized": lambda n: VecNormalize(DummyVecEnv([Walk] * n)),
    "stacked": lambda n: VecFrameStack(DummyVecEnv([Walk] * n), 3),
    "stacked and normalized": lambda n: VecNormalize(VecFrameStack(DummyVecEnv([Walk] * n), 2)),
    "monitored": lambda n: VecMonitor(DummyVecEnv([Walk] * n)),
}


def fresh(name: str, n_envs: int, policy: str = "MlpPolicy", **settings) -> Dreamer:
    return Dreamer(policy, WRAPPED[name](n_envs), **{**DEBUG, **settings})


def in_new_process(code: str) -> None:
    """Run Python code that may use everything in this file."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    command = [sys.executable, "-c", head + "from test_resume import *\n" + code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def parameters(model: Dreamer) -> dict[str, th.Tensor]:
    moments = {f"mu {i}": one["mu"] for i, one in enumerate(model.policy.optimizer.state.values())}
    return {**model.policy.state_dict(), **moments}


def assert_same(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [key for key in one if not th.equal(one[key], other[key])]
    assert not different


# -- exactly -----------------------------------------------------------------------------------------------------------


def cut_and_whole(name: str, n_envs: int, first: int, more: int, folder: Path, **settings) -> tuple[Dreamer, Dreamer]:
    """The same run stopped after `first` steps and resumed, and in one go."""
    whole = fresh(name, n_envs, **settings).learn(first + more)
    fresh(name, n_envs, **settings).learn(first, callback=ResumeCallback(folder, every=1000))
    random.seed(77), np.random.seed(77), th.manual_seed(77)  # noqa: NPY002  another process has another state
    resumed = Dreamer.resume(folder, WRAPPED[name](n_envs), device="cpu")
    assert resumed.num_timesteps == first
    return resumed.learn(more, reset_num_timesteps=False), whole


def test_a_checkpoint_after_an_evaluation_in_the_same_environments_begins_an_episode(tmp_path) -> None:
    def learn(model: Dreamer, steps: int, folder: str) -> Dreamer:
        evaluation = EvalCallback(model.get_env(), n_eval_episodes=1, eval_freq=20, verbose=0)
        keep = ResumeCallback(tmp_path / folder, every=20)
        return model.learn(steps, callback=[evaluation, keep], reset_num_timesteps=False)

    def env() -> DummyVecEnv:
        return DummyVecEnv([lambda: Monitor(Walk())])

    whole = learn(Dreamer("MlpPolicy", env(), **DEBUG), 80, "whole")
    learn(Dreamer("MlpPolicy", env(), **DEBUG), 40, "cut")
    resumed = learn(Dreamer.resume(tmp_path / "cut", env(), device="cpu"), 40, "cut")
    assert_same(parameters(whole), parameters(resumed))
    for one, other in zip(read_episodes(whole.replay_buffer), read_episodes(resumed.replay_buffer), strict=True):
        np.testing.assert_array_equal(one.obs["obs"], other.obs["obs"])


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "choices"])
def test_a_resumed_run_equals_one_that_was_never_stopped(name: str, tmp_path) -> None:
    resumed, whole = cut_and_whole(name, 2, 40, 40, tmp_path)
    assert whole._n_updates == resumed._n_updates > 20
    assert whole._episode_num == resumed._episode_num > 4
    assert_same(parameters(whole), parameters(resumed))
    told = [[(one["r"], one["l"]) for one in model.ep_info_buffer] for model in (whole, resumed)]
    assert told[0] == told[1]
    assert bool(told[0]) == (name == "monitored")


@pytest.mark.parametrize("first", [24, 25, 30])
def test_time_limit_and_monitor_go_on_where_they_were(first: int, tmp_path) -> None:
    def env() -> DummyVecEnv:
        return DummyVecEnv([lambda: Monitor(TimeLimit(Walk(), 7))] * 2)

    whole = Dreamer("MlpPolicy", env(), **DEBUG).learn(60)
    Dreamer("MlpPolicy", env(), **DEBUG).learn(first, callback=ResumeCallback(tmp_path, every=1000))
    resumed = Dreamer.resume(tmp_path, env(), device="cpu").learn(60 - first, reset_num_timesteps=False)
    assert_same(parameters(whole), parameters(resumed))
    told = [[(one["r"], one["l"]) for one in model.ep_info_buffer] for model in (whole, resumed)]
    assert told[0] == told[1]
    assert max(length for _, length in told[1]) == 7


CUTS = [5, 30, 31, 32, 36, 40, 41, 42]


@pytest.mark.parametrize("first", CUTS)
def test_it_does_where_episodes_end_at_the_cut_too(first: int, tmp_path) -> None:
    resumed, whole = cut_and_whole("plain", 1, first, 55 - first, tmp_path)
    assert_same(parameters(whole), parameters(resumed))
    batches = [model.replay_buffer.sample(4) for model in (whole, resumed)]
    np.testing.assert_array_equal(*(b.index for b in batches))
    assert th.equal(*(b.is_first for b in batches))


def test_some_of_those_cuts_are_at_an_end_and_some_are_not() -> None:
    model, ends = fresh("plain", 1), []
    for more in np.diff([0, *CUTS]):
        model.learn(int(more), reset_num_timesteps=False)
        ends.append(bool(model._last_episode_starts[0]))
    assert 2 <= sum(ends) < len(CUTS)


def test_several_resumes_in_a_row_change_nothing(tmp_path) -> None:
    whole = fresh("plain", 1).learn(60)
    model = fresh("plain", 1)
    for _ in range(4):
        model.learn(15, callback=ResumeCallback(tmp_path, every=1000), reset_num_timesteps=False)
        model = Dreamer.resume(tmp_path, WRAPPED["plain"](1), device="cpu")
    assert_same(parameters(whole), parameters(model))


@pytest.mark.parametrize("settings", [dict(rssm_type="transformer"), dict(policy="MultiInputPolicy")])
def test_the_transformer_choices_and_dicts_resume_exactly_too(settings: dict, tmp_path) -> None:
    name = "plain" if "rssm_type" in settings else "choices"
    resumed, whole = cut_and_whole(name, 1, 33, 20, tmp_path, **settings)
    assert_same(parameters(whole), parameters(resumed))


def test_numbers_of_numpy_keep_their_type(tmp_path) -> None:
    class Single(Walk):
        def resume_state(self):
            return {**super().resume_state(), "one": np.float32(0.1), "whole": np.int64(3), "true": np.bool_(True)}

        def set_resume_state(self, state):
            super().set_resume_state(state)
            self.told = state

    Dreamer("MlpPolicy", DummyVecEnv([Single]), **DEBUG).learn(12, callback=ResumeCallback(tmp_path, every=5))
    told = Dreamer.resume(tmp_path, DummyVecEnv([Single]), device="cpu").env.get_attr("told")[0]
    assert (told["one"], told["one"].dtype) == (np.float32(0.1), np.float32)
    assert (told["whole"], told["whole"].dtype) == (3, np.int64)
    assert isinstance(told["true"], np.bool_)


def test_what_a_checkpoint_cannot_hold_is_said_before_the_first_step(tmp_path) -> None:
    class Odd(Walk):
        def resume_state(self):
            return {"newest": collections.deque([1.0])}

    model = Dreamer("MlpPolicy", DummyVecEnv([Odd]), **DEBUG)
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold the deque that resume_state\(\)"):
        model.learn(12, callback=ResumeCallback(tmp_path, every=5))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("setting", [dict(every=2.5), dict(every="3"), dict(every=0), dict(keep=0), dict(keep=True)])
def test_steps_and_checkpoints_are_counted_in_whole_numbers(setting: dict, tmp_path) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} .* a whole number of at least 1"):
        ResumeCallback(tmp_path, **{"every": 10, **setting})
    assert ResumeCallback(tmp_path, every=1e5).every == 100_000


def test_it_is_not_called_by_another_callback(tmp_path) -> None:
    for inside in (ResumeCallback(tmp_path, every=5), CallbackList([ResumeCallback(tmp_path, every=5)])):
        with pytest.raises(ValueError, match="ResumeCallback inside of EveryNTimesteps would never save"):
            fresh("plain", 1).learn(12, callback=EveryNTimesteps(5, inside))


def test_it_holds_in_a_new_process(tmp_path) -> None:
    whole = fresh("normalized", 2).learn(80)
    in_new_process(f"fresh('normalized', 2).learn(40, callback=ResumeCallback({str(tmp_path / 'run')!r}, every=1000))")
    in_new_process(
        f"model = Dreamer.resume({str(tmp_path / 'run')!r}, WRAPPED['normalized'](2), device='cpu')\n"
        f"model.learn(40, reset_num_timesteps=False).save({str(tmp_path / 'model')!r})"
    )
    assert_same(parameters(whole), parameters(Dreamer.load(tmp_path / "model", device="cpu")))


def test_the_callback_does_not_change_the_run(tmp_path) -> None:
    without = fresh("plain", 1).learn(50)
    with_it = fresh("plain", 1).learn(50, callback=ResumeCallback(tmp_path, every=7))
    assert_same(parameters(without), parameters(with_it))


def test_the_state_is_plain_data(tmp_path) -> None:
    model = fresh("stacked and normalized", 2).learn(20)
    path = save_checkpoint(model, tmp_path, keep=1)
    state = th.load(path / "state.pth", weights_only=True)  # runs no code, by torch's word
    assert state.keys() == run_state(model).keys()


# -- an environment that cannot be restored ----------------------------------------------------------------------------


def test_any_other_environment_is_reset_and_the_episode_ends_there(tmp_path) -> None:
    model = Dreamer("MlpPolicy", DummyVecEnv([Forgetful]), **DEBUG)
    model.learn(33, callback=ResumeCallback(tmp_path, every=1000))
    before = model.replay_buffer.size()
    resumed = Dreamer.resume(tmp_path, DummyVecEnv([Forgetful]), device="cpu")
    assert resumed.num_timesteps == 33
    assert resumed._n_updates == model._n_updates > 0
    resumed.learn(20, reset_num_timesteps=False)
    entries = resumed.replay_buffer.arrays["flags"]
    assert entries[before] & 1, "the first entry after the resume begins an episode"
    assert entries[before - 1] & 2, "the one before ended one"
    assert not entries[before - 1] & 4 or model._last_episode_starts[0], "but as by a time limit"


def test_it_does_not_play_the_first_episodes_of_the_run_again(tmp_path) -> None:
    model = Dreamer("MlpPolicy", DummyVecEnv([Forgetful]), **DEBUG)
    first = model.env.reset().copy()
    model.env.seed(DEBUG["seed"])
    model.learn(20, callback=ResumeCallback(tmp_path, every=1000))
    resumed = Dreamer.resume(tmp_path, DummyVecEnv([Forgetful]), device="cpu")
    assert not np.array_equal(resumed.env.reset(), first)


def test_another_wrapping_is_refused(tmp_path) -> None:
    fresh("normalized", 1).learn(12, callback=ResumeCallback(tmp_path, every=1000))
    refused = pytest.raises(ValueError, match=r"wrapped in \[\], those of the run in \['VecNormalize'\]")
    with pytest.warns(UserWarning, match="its environment has none"), refused:
        Dreamer.resume(tmp_path, WRAPPED["plain"](1), device="cpu")


def test_a_replay_of_other_sequences_or_environments_is_refused(tmp_path) -> None:
    fresh("plain", 2).learn(12, callback=ResumeCallback(tmp_path, every=1000))
    with pytest.raises(ValueError, match="sequence_length=8, this agent 4"):
        Dreamer.resume(tmp_path, WRAPPED["plain"](2), device="cpu", batch_length=4)
    with pytest.raises(ValueError, match="n_envs=2, this agent 3"):
        Dreamer.resume(tmp_path, WRAPPED["plain"](3), device="cpu")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_the_last_k_are_kept_and_the_newest_is_taken(tmp_path) -> None:
    fresh("plain", 1).learn(50, callback=ResumeCallback(tmp_path, every=10, keep=3))
    assert [path.name for path in checkpoints(tmp_path)] == ["000002_step_30", "000003_step_40", "000004_step_50"]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in checkpoints(tmp_path)}
    assert Dreamer.resume(tmp_path, WRAPPED["plain"](1)).num_timesteps == 50


def test_newest_means_written_last_though_steps_were_counted_anew(tmp_path) -> None:
    model = fresh("plain", 1)
    model.learn(30, callback=ResumeCallback(tmp_path, every=1000))
    model.learn(12, callback=ResumeCallback(tmp_path, every=1000), reset_num_timesteps=True)
    assert Dreamer.resume(tmp_path, WRAPPED["plain"](1)).num_timesteps == 12


def test_checkpoints_of_another_run_are_not_deleted(tmp_path) -> None:
    fresh("plain", 1).learn(30, ResumeCallback(tmp_path, every=10))
    there = [path.name for path in checkpoints(tmp_path)]
    other = fresh("plain", 1)
    with pytest.raises(ValueError, match=r"of another run, the newest is 00000\d_step_30: give this run a folder"):
        other.learn(30, ResumeCallback(tmp_path, every=10))
    assert [path.name for path in checkpoints(tmp_path)] == there
    model = Dreamer.resume(tmp_path, WRAPPED["plain"](1))
    model.learn(10, ResumeCallback(tmp_path, every=10), reset_num_timesteps=False)
    assert checkpoints(tmp_path)[-1].name.endswith("_step_40")


def test_a_run_that_begins_with_a_saved_agent_is_another(tmp_path) -> None:
    model = fresh("plain", 1).learn(30, ResumeCallback(tmp_path / "run", every=10))
    model.save(tmp_path / "agent")
    model.save_replay_buffer(tmp_path / "replay")
    there = checkpoints(tmp_path / "run")
    fork = Dreamer.load(tmp_path / "agent", WRAPPED["plain"](1))
    fork.load_replay_buffer(tmp_path / "replay")
    with pytest.raises(ValueError, match="has checkpoints of another run"):
        fork.learn(10, ResumeCallback(tmp_path / "run", every=10))
    assert checkpoints(tmp_path / "run") == there
    model.learn(10, ResumeCallback(tmp_path / "run", every=10), reset_num_timesteps=False)
    assert checkpoints(tmp_path / "run")[-1].name.endswith("_step_40"), "it goes on itself"


def test_what_only_looks_like_a_checkpoint_is_none(tmp_path) -> None:
    fresh("plain", 1).learn(20, ResumeCallback(tmp_path, every=20))
    (tmp_path / "7_step_notes").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["000000_step_20"]


@pytest.mark.parametrize("content", [b"rubbish", None], ids=["rubbish", "cut"])
def test_a_damaged_state_is_named(tmp_path, content: bytes | None) -> None:
    fresh("plain", 1).learn(20, ResumeCallback(tmp_path, every=20))
    state = checkpoints(tmp_path)[0] / "state.pth"
    state.write_bytes(content or state.read_bytes()[: state.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"state.pth is damaged .*: delete the folder 000000_step_20 to resume"):
        Dreamer.resume(tmp_path, WRAPPED["plain"](1))


def test_resuming_what_is_not_trusted_or_without_an_environment_is_refused(tmp_path) -> None:
    fresh("plain", 1).learn(20, ResumeCallback(tmp_path, every=20))
    with pytest.raises(ValueError, match="the replay of a checkpoint is a pickle, which may run code"):
        Dreamer.resume(tmp_path, WRAPPED["plain"](1), trusted=False)
    with pytest.raises(ValueError, match=r"resume\(\) needs the environment to continue in"):
        Dreamer.resume(tmp_path, None)


def test_half_written_and_half_deleted_ones_are_never_taken_and_go_away(tmp_path) -> None:
    model = fresh("plain", 1)
    model.learn(20, callback=ResumeCallback(tmp_path, every=10))
    for name in (".000009_step_90.part", ".000001_step_5.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.zip").write_bytes(b"half")
    assert Dreamer.resume(tmp_path, WRAPPED["plain"](1)).num_timesteps == 20
    model.learn(10, callback=ResumeCallback(tmp_path, every=10), reset_num_timesteps=False)
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_save_left_in_the_folder_is_nobodys_checkpoint(tmp_path) -> None:
    leftover = tmp_path / ".best_model.zip.1234.part"
    leftover.write_bytes(b"half")
    fresh("plain", 1).learn(20, callback=ResumeCallback(tmp_path, every=10))
    assert [path.name for path in checkpoints(tmp_path)] == ["000000_step_10", "000001_step_20"]
    assert leftover.exists()


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch) -> None:
    model = fresh("plain", 1)
    model.learn(20, callback=ResumeCallback(tmp_path, every=10))

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(th, "save", full)
    with pytest.raises(OSError, match="No space left"):
        model.learn(10, callback=ResumeCallback(tmp_path, every=10), reset_num_timesteps=False)
    monkeypatch.undo()
    assert Dreamer.resume(tmp_path, WRAPPED["plain"](1)).num_timesteps == 20


def test_a_folder_without_checkpoints_says_what_to_do(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no complete checkpoint: start a new run, with callback"):
        Dreamer.resume(tmp_path, WRAPPED["plain"](1))


def test_sb3s_checkpoints_keep_working(tmp_path) -> None:
    theirs = CheckpointCallback(10, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    fresh("normalized", 1).learn(20, callback=CallbackList([theirs, ResumeCallback(tmp_path / "ours", every=10)]))
    env = VecNormalize.load(tmp_path / "rl_model_vecnormalize_20_steps.pkl", DummyVecEnv([Walk]))
    model = Dreamer.load(tmp_path / "rl_model_20_steps", env=env, device="cpu")
    model.load_replay_buffer(tmp_path / "rl_model_replay_buffer_20_steps.pkl")
    model.learn(10, reset_num_timesteps=False)
    assert model.num_timesteps == 30


# -- kill -9 -----------------------------------------------------------------------------------------------------------

TRAIN = """
import test_resume as here
folder = {folder!r}
try:
    model = here.Dreamer.resume(folder + "/run", here.WRAPPED["plain"](1), device="cpu")
except FileNotFoundError:
    model = here.fresh("plain", 1)
print("ready", flush=True)
while True:
    model.learn(5, callback=here.ResumeCallback(folder + "/run", every=1), reset_num_timesteps=False)
    model.save(folder + "/model")
    model.save_replay_buffer(folder + "/replay_buffer")
"""


def kill_while_training(folder: Path, seconds: float) -> None:
    """Train, and save at every step, in a process of its own, and kill it after so many seconds of that."""
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    child = subprocess.Popen([sys.executable, "-c", head + TRAIN.format(folder=str(folder))], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    assert child.poll() is None, "it died by itself"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


def survive(folder: Path, kills: int) -> list[int]:
    """Kill that often at random moments; after each, everything that is there must be whole."""
    rng, steps = random.Random(0), []
    for _ in range(kills):
        kill_while_training(folder, rng.uniform(0.5, 3.0))
        if checkpoints(folder / "run"):
            model = Dreamer.resume(folder / "run", WRAPPED["plain"](1), device="cpu")
            assert model.replay_buffer.size() >= min(model.num_timesteps, DEBUG["buffer_size"])
            model.learn(3, reset_num_timesteps=False)
            steps.append(model.num_timesteps - 3)
        if (folder / "model.zip").exists():
            Dreamer.load(folder / "model.zip", device="cpu")
        if (folder / "replay_buffer.pkl").exists():
            pickle.loads((folder / "replay_buffer.pkl").read_bytes())
    assert steps == sorted(steps), "no checkpoint was lost"
    return steps


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path) -> None:
    assert survive(tmp_path, kills=1)[-1] > 0


@pytest.mark.slow
def test_fifty_kills_leave_whole_checkpoints(tmp_path) -> None:
    steps = survive(tmp_path, kills=50)
    assert len(steps) >= 45
    assert len(set(steps)) > 10, "and the run got on all the while"
