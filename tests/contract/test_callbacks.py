"""Every callback of SB3 does with Dreamer what it does with SAC."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer import Dreamer

DEBUG = dict(
    model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=500, train_ratio=2,
    imagination_horizon=2, imagination_starts=2, seed=0, device="cpu",
)  # fmt: skip


class Ten(gym.Env):
    """Episodes of ten steps with a reward of one each."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return self.observation_space.sample(), {}

    def step(self, action):
        self.left -= 1
        return self.observation_space.sample(), 1.0, self.left == 0, False, {}


def agent(n_envs: int = 1) -> Dreamer:
    return Dreamer("MlpPolicy", vector(n_envs), **DEBUG)


def vector(n_envs: int = 1) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(Ten())] * n_envs)


class Watch(BaseCallback):
    """Notes when it is called, and what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.names: set[str] = set()

    def _on_training_start(self) -> None:
        self.calls.append("training start")
        self.first_locals = dict(self.locals)

    def _on_rollout_start(self) -> None:
        self.calls.append("rollout start")

    def _on_step(self) -> bool:
        self.calls.append("step")
        self.steps.append((self.num_timesteps, self.model.replay_buffer.size()))
        self.names = set(self.locals)
        self.shapes = {name: np.shape(self.locals[name]) for name in ("new_obs", "rewards", "dones", "actions")}
        return True

    def _on_rollout_end(self) -> None:
        self.calls.append("rollout end")

    def _on_training_end(self) -> None:
        self.calls.append("training end")


def test_callbacks_are_called_around_every_step_before_it_is_stored():
    watch = Watch()
    agent().learn(15, callback=watch)
    rollout = ["rollout start", "step", "rollout end"]
    assert watch.calls == ["training start", *rollout * 15, "training end"]
    assert watch.steps[:3] == [(1, 0), (2, 1), (3, 2)]
    assert watch.steps[9:11] == [(10, 9), (11, 11)]  # the end of an episode is two entries
    assert {"self", "total_timesteps", "callback", "log_interval", "tb_log_name"} < watch.first_locals.keys()
    assert {"new_obs", "rewards", "dones", "infos", "actions", "buffer_actions", "env", "replay_buffer"} < watch.names


def test_with_several_environments_a_call_is_a_step_of_all():
    watch = Watch()
    agent(3).learn(30, callback=watch)
    assert watch.n_calls * 3 == watch.num_timesteps == 30
    assert watch.shapes == {"new_obs": (3, 2), "rewards": (3,), "dones": (3,), "actions": (3,)}


def test_a_callback_that_stops_ends_the_training_but_no_rollout():
    watch = Watch()

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return np.bool_(self.num_timesteps < 4)

    model = agent().learn(50, callback=[watch, Stop()])
    assert model.num_timesteps == 4
    assert watch.calls[-4:] == ["rollout end", "rollout start", "step", "training end"]


def test_a_function_is_a_callback_too():
    seen = []
    agent().learn(5, callback=lambda local, _: seen.append(local["self"].num_timesteps) or True)
    assert seen == [1, 2, 3, 4, 5]


def test_checkpoints_hold_agent_replay_and_normalisation(tmp_path):
    env = VecNormalize(vector())
    callback = CheckpointCallback(10, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model = Dreamer("MlpPolicy", env, **DEBUG).learn(25, callback=callback)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"rl_model{kind}_{steps}_steps.{end}"
        for steps in (10, 20)
        for kind, end in (("", "zip"), ("_replay_buffer", "pkl"), ("_vecnormalize", "pkl"))
    )
    normalized = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_20_steps.pkl"), vector())
    other = Dreamer.load(tmp_path / "rl_model_20_steps", env=normalized)
    other.load_replay_buffer(tmp_path / "rl_model_replay_buffer_20_steps")
    assert other.num_timesteps == 20
    assert other.replay_buffer.size() == 20  # the 20th step is saved before it is stored; the 10th ended an episode
    assert normalized.obs_rms.count == pytest.approx(21, abs=0.01)
    other.learn(10, reset_num_timesteps=False)
    assert other.num_timesteps == 30
    assert other._n_updates > model._n_updates * 0.5


def test_evaluation_writes_the_best_agent_and_stops_at_a_threshold(tmp_path):
    stop = StopTrainingOnRewardThreshold(9.5, verbose=0)
    callback = EvalCallback(
        vector(2), callback_on_new_best=stop, eval_freq=8, n_eval_episodes=3, verbose=0,
        best_model_save_path=str(tmp_path), log_path=str(tmp_path),
    )  # fmt: skip
    model = agent().learn(100, callback=callback)
    assert model.num_timesteps == 8
    assert callback.best_mean_reward == 10.0
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (1, 3)
    assert Dreamer.load(tmp_path / "best_model").num_timesteps == 8


def test_an_evaluation_is_logged_beside_the_losses():
    class Written(KVWriter):
        rows: list[tuple[dict, dict]] = []

        def write(self, key_values, key_excluded, step=0):
            means = {f"train/{key}": mean for key, mean in model._metrics.means().items()}
            self.rows.append((dict(key_values), means))

        def close(self):
            pass

    model = agent()
    model.set_logger(Logger(None, [Written()]))
    evaluation = EvalCallback(vector(), eval_freq=20, n_eval_episodes=1, verbose=0)
    model.learn(40, callback=evaluation, log_interval=None)
    for row, means in Written.rows:
        assert means.keys() > {"train/actor_loss", "train/kl"}
        assert means.items() <= row.items()
        assert row["eval/mean_reward"] == 10.0
    assert 0 < Written.rows[0][0]["train/n_updates"] < Written.rows[1][0]["train/n_updates"]


def test_no_improvement_stops():
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, verbose=0)
    callback = EvalCallback(vector(), callback_after_eval=stop, eval_freq=5, n_eval_episodes=1, verbose=0)
    assert agent().learn(100, callback=callback).num_timesteps == 15


def test_a_number_of_episodes_stops():
    assert agent(2).learn(1000, callback=StopTrainingOnMaxEpisodes(2, verbose=0)).num_timesteps == 40


def test_something_happens_every_n_steps():
    watch = Watch()
    agent().learn(25, callback=EveryNTimesteps(10, watch))
    assert [steps for steps, _ in watch.steps] == [10, 20]


def test_logs_come_every_n_steps():
    class Written(KVWriter):
        steps: list[int] = []

        def write(self, key_values, key_excluded, step=0):
            self.steps.append(step)
            assert key_values["rollout/ep_rew_mean"] == 10.0

        def close(self):
            pass

    model, output = agent(), Written()
    model.set_logger(Logger(None, [output]))
    model.learn(45, callback=LogEveryNTimesteps(20), log_interval=None)
    assert output.steps == [20, 40]


@pytest.mark.filterwarnings("ignore:rich is experimental")  # tqdm's own, about the bar that SB3 uses
def test_a_progress_bar_moves_at_every_step():
    positions = []

    class Look(ProgressBarCallback):
        def _on_step(self) -> bool:
            go_on = super()._on_step()
            positions.append(self.pbar.n)
            return go_on

    agent(2).learn(20, callback=CallbackList([Look()]))
    assert positions == list(range(2, 21, 2))
    agent().learn(5, progress_bar=True)
