"""Train, go on, look at it, tune: one small story, each step a process of its own."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3.common.save_util import load_from_pkl

from sb3_dreamer import Dreamer
from sb3_dreamer.zoo.patches import figures_to_files, missing_environments_explained
from tests.zoo.processes import TINY, Run

RUN = Path("logs/dreamer/CartPole-v1_1")


@pytest.fixture(scope="module")
def trained(zoo: Run, folder: Path) -> Path:
    """A run with everything on."""
    zoo(
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-n", "80", "--seed", "3", "--vec-env", "subproc",
        "--eval-freq", "40", "--eval-episodes", "2", "--save-freq", "40", "--save-replay-buffer", "-P", "-tb", "tb",
        "--log-interval", "1", "-params", *TINY, "n_envs:2", "normalize:{'norm_obs':True,'norm_reward':False}",
        "learning_rate:'lin_4e-4'", "policy_kwargs:dict(units=24)",
        "env_wrapper:'sb3_contrib.common.wrappers.TimeFeatureWrapper'",
        "callback:[{'stable_baselines3.common.callbacks.CheckpointCallback':{'save_freq':20,'save_path':'mine'}}]",
    )  # fmt: skip
    return folder / RUN


def test_train_leaves_model_best_model_checkpoints_replay_statistics_and_curves(trained, folder):
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert names == {
        "CartPole-v1.zip", "best_model.zip", "rl_model_40_steps.zip", "rl_model_80_steps.zip", "replay_buffer.pkl",
        "evaluations.npz", "0.monitor.csv", "1.monitor.csv", "CartPole-v1/vecnormalize.pkl",
        "CartPole-v1/args.yml", "CartPole-v1/config.yml", "CartPole-v1/command.txt",
    }  # fmt: skip
    assert np.load(trained / "evaluations.npz")["timesteps"].tolist() == [40, 80]
    assert len(list(folder.glob("tb/CartPole-v1/Dreamer_1/events*"))) == 1
    assert len(list(folder.glob("mine/*.zip"))) == 2  # the callback of the YAML: every 20 calls are 40 steps


def test_hyperparameters_of_the_command_line_arrive(trained):
    model = Dreamer.load(trained / "CartPole-v1.zip")
    assert model.observation_space.shape == (5,)  # the wrapper added the time
    assert (model.model_size, model.policy_kwargs, model.n_envs) == ("debug", {"units": 24}, 2)
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([4e-4, 2e-4, 0.0])
    # 80 steps less the random ones, 16 replayed entries each, in batches of 8 x 16
    assert 6 <= model._n_updates <= 8


def test_looking_at_an_agent_takes_no_memory_for_a_replay(trained):
    Dreamer.load(trained / "CartPole-v1.zip")  # imports what the pickles name
    tracemalloc.start()
    model = Dreamer.load(trained / "CartPole-v1.zip", custom_objects={"learning_rate": 0.0})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.buffer_size == 1_000_000
    assert peak < 20e6  # bytes; the entries alone would be over 100 MB


def test_enjoy_plays_the_last_model(trained, zoo):
    said = zoo("enjoy", "--algo", "dreamer", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", "100")
    assert "Loading running average" in said
    assert "Mean reward" in said


def test_training_goes_on_from_a_zip_with_its_replay(trained, zoo, folder):
    said = zoo(
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-n", "40", "-i", str(RUN / "CartPole-v1.zip"),
        "--eval-freq", "-1", "--save-replay-buffer", "-params", "n_envs:2", "normalize:True", "train_ratio:16",
        "env_wrapper:'sb3_contrib.common.wrappers.TimeFeatureWrapper'",
    )  # fmt: skip
    assert "Loading replay buffer" in said
    assert "Loading saved VecNormalize stats" in said
    before, after = (folder / f"logs/dreamer/CartPole-v1_{run}" for run in (1, 2))
    replays = [load_from_pkl(run / "replay_buffer.pkl") for run in (before, after)]
    assert replays[1].size() >= replays[0].size() + 40
    models = [Dreamer.load(run / "CartPole-v1.zip") for run in (before, after)]
    # no second random phase: all 40 steps are paid for, 16 entries each, in batches of 8 x 16
    assert models[1]._n_updates - models[0]._n_updates == 5


def study(n_trials: int, seed: int) -> list[str]:
    return [
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-n", "90", "-optimize", "--n-trials", str(n_trials),
        "--n-evaluations", "3", "--eval-episodes", "1", "--n-startup-trials", "1", "--seed", str(seed), "-f", "opt",
        "--storage", "opt/study.log", "--study-name", "cartpole", "--pruner", "none",
        "-params", "model_size:'debug'", "batch_size:64", "learning_starts:60",
    ]  # fmt: skip


def test_a_study_runs_stops_and_goes_on_and_its_plots_are_files(zoo, folder):
    import optuna

    assert "Trial 1 finished" in zoo(*study(2, seed=0))
    assert "Trial 2 finished" in zoo(*study(1, seed=1))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "opt/study.log")))
    trials = optuna.load_study(study_name="cartpole", storage=storage).trials
    assert [trial.state.is_finished() for trial in trials] == [True] * 3
    assert all(1 <= len(trial.intermediate_values) <= 3 for trial in trials)
    assert len(list(folder.glob("opt/dreamer/report_*_optimization_history.png"))) == 2


def test_a_misspelt_hyperparameter_ends_the_run_with_the_right_name(zoo):
    said = zoo(
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-f", "no", "-params", "train_ration:8", fails=True
    )
    assert 'did you mean "train_ratio"?' in said


@pytest.mark.parametrize("hint", ["atari", "dmc"])
def test_an_environment_of_a_missing_library_names_the_pip_command(hint):
    env_id = {"atari": "PongNoFrameskip-v4", "dmc": "dm_control/walker-walk-v0"}[hint]
    for error in (  # of rl_zoo3's train and of its enjoy
        ValueError(f"{env_id} not found in gym registry, you maybe meant CartPole-v1?"),
        KeyError(env_id),
    ):
        with (
            pytest.raises(ValueError, match=rf"{env_id}.*pip install .sb3-dreamer\[{hint}\]"),
            missing_environments_explained(),
        ):
            raise error


@pytest.mark.parametrize("error", [ValueError("Cartpole-v1 not found"), KeyError("learning_rate"), ValueError()])
def test_other_errors_keep_the_zoo_s_message(error):
    with pytest.raises(type(error)) as caught, missing_environments_explained():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("named", ["dm_control/walker-walk-v0", "--env=dm_control/walker-walk-v0"])
def test_tasks_of_dm_control_are_known_once_one_is_named(named: str):
    code = (
        f"named = {named!r}\n"
        "import gymnasium as gym\n"
        "from sb3_dreamer.zoo.patches import register_dm_control\n"
        "for words in (['--env', 'Pendulum-v1'], [named]):\n"
        "    register_dm_control(words)\n"
        "    print('dm_control/walker-walk-v0' in gym.registry)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_without_a_display_figures_become_files(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.chdir(tmp_path)
    show = plt.show
    with figures_to_files():
        plt.figure("Results dm_control/walker-walk-v0")
        plt.plot([0, 1])
        plt.show()
    assert (tmp_path / "Results_dm_control_walker-walk-v0.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []  # shown and gone, as with a window
    assert plt.show is show


def test_an_unknown_script_is_answered_with_the_known_ones(zoo):
    assert "{train,enjoy,record_video,record_training," in zoo("trian", fails=True)
