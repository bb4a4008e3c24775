"""The rest of the Zoo, end to end; minutes on one core."""

import json
import shutil
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
import yaml

from tests.zoo.processes import ROOT, TINY, Run, command, environment

pytestmark = pytest.mark.slow
ENV = ["--algo", "dreamer", "--env", "Pendulum-v1", "-f", "logs"]


@pytest.fixture(scope="module")
def trained(zoo: Run, folder: Path) -> Path:
    said = zoo(
        "train", *ENV, "-n", "600", "--eval-freq", "200", "--eval-episodes", "2", "--save-freq", "300", "-params", *TINY
    )
    assert "Saving to logs/dreamer/Pendulum-v1_1" in said
    return folder / "logs/dreamer/Pendulum-v1_1"


@pytest.mark.parametrize(
    "which",
    [["--load-best"], ["--load-checkpoint", "300"], ["--load-last-checkpoint"], ["--n-envs", "2", "--stochastic"]],
)
def test_enjoy_finds_every_saved_model(trained, zoo, which):
    said = zoo("enjoy", *ENV, "--no-render", "-n", "210", *which)
    assert "Loading logs/dreamer/Pendulum-v1_1" in said


def test_frame_stack_reaches_training_and_enjoy(zoo, folder):
    zoo(
        "train",
        "--algo",
        "dreamer",
        "--env",
        "CartPole-v1",
        "-f",
        "stack",
        "-n",
        "60",
        "-params",
        *TINY,
        "frame_stack:3",
    )
    assert "Stacking 3 frames" in zoo(
        "enjoy", "--algo", "dreamer", "--env", "CartPole-v1", "-f", "stack", "--no-render"
    )


@pytest.mark.parametrize(
    ("env_id", "arguments"),
    [
        ("HalfCheetah-v5", []),
        ("dm_control/walker-walk-v0", ["--gym-packages", "shimmy"]),
        ("BreakoutNoFrameskip-v4", []),
    ],
)
def test_packaged_blocks_train_and_play(zoo, env_id, arguments):
    common = ["--algo", "dreamer", "--env", env_id, "-f", "blocks", *arguments]
    zoo("train", *common, "-n", "60", "--eval-freq", "-1", "-params", *TINY)
    said = zoo("enjoy", *common, "--no-render", "-n", "30")
    assert "Loading blocks/dreamer" in said


def test_other_algorithms_keep_the_zoo_s_own_hyperparameters(zoo, folder):
    said = zoo("train", "--algo", "sac", "--env", "Pendulum-v1", "-f", "sac", "-n", "60", "--eval-freq", "-1")
    assert "rl_zoo3/hyperparams/sac.yml" in said
    assert (folder / "sac/sac/Pendulum-v1_1/Pendulum-v1.zip").is_file()


def test_the_example_trains_with_the_zoo_s_own_function(folder):
    conf = str(ROOT / "zoo_hyperparams" / "dreamer.yml")
    arguments = [*ENV[:4], "-f", "example", "-conf", conf, "-n", "60", "--vec-env", "subproc", "-params", *TINY]
    script = [sys.executable, str(ROOT / "examples" / "zoo_train.py"), *arguments]
    done = subprocess.run(script, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "example/dreamer/Pendulum-v1_1/Pendulum-v1.zip").is_file()


# -- tuning ------------------------------------------------------------------------------------------------------------


def tune(folder: str, seed: int, n_trials: int, *more: str) -> list[str]:
    return [
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-n", "120", "-optimize", "--n-trials", str(n_trials),
        "--n-evaluations", "6", "--eval-episodes", "2", "--seed", str(seed), "-f", folder, "--no-optim-plots",
        "--storage", f"{folder}/study.log", "--study-name", "cartpole", *more,
        "-params", "model_size:'debug'", "batch_size:64", "learning_starts:60",
    ]  # fmt: skip


def trials_of(folder: Path) -> list:
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name="cartpole", storage=storage).trials


def test_two_processes_share_a_study_and_a_trial_becomes_a_training(zoo, folder):
    processes = [
        subprocess.Popen(command(*tune("shared", seed, 3)), cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
        for seed in (0, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    trials = trials_of(folder / "shared")
    assert len(trials) == 6
    starts = sorted((trial.datetime_start, trial.datetime_complete) for trial in trials)
    assert any(later[0] < earlier[1] for earlier, later in pairwise(starts))  # at the same time

    zoo(
        "train", "--algo", "dreamer", "--env", "CartPole-v1", "-f", "shared", "-n", "60", "--trial-id", "3",
        "--storage", "shared/study.log", "--study-name", "cartpole", "-params", "model_size:'debug'", "batch_size:8",
    )  # fmt: skip
    [config] = folder.glob("shared/dreamer/*/CartPole-v1/config.yml")
    saved = yaml.load(config.read_text(), Loader=yaml.UnsafeLoader)
    assert saved["ent_coef"] == trials[3].params["ent_coef"]
    assert saved["gamma"] == 1 - trials[3].params["one_minus_gamma"]


def test_hopeless_trials_are_pruned(zoo, folder):
    zoo(*tune("pruned", 0, 8, "--pruner", "halving", "--sampler", "random"))
    states = [trial.state.name for trial in trials_of(folder / "pruned")]
    assert {"PRUNED", "COMPLETE"} == set(states)


# -- pictures and videos -----------------------------------------------------------------------------------------------


def test_the_zoo_s_plots_come_out(trained, zoo, folder):
    for run in (1, 2):  # plot_from_file takes no algorithm with a single run
        shutil.copytree(trained, folder / f"curves/dreamer/Pendulum-v1_{run}")
    which = ["-a", "dreamer", "-e", "Pendulum-v1", "-f", "curves"]
    for script, arguments, picture in [
        ("plot_train", [*which, "-w", "2"], "Training_Episodic_Reward.png"),
        ("all_plots", [*which, "-o", "all", "--no-million"], "Results_Pendulum-v1.png"),
        ("plot_from_file", ["-i", "all.pkl", "-o", "bars.png", "--format", "png", "--no-million"], "bars.png"),
    ]:
        zoo(script, *arguments)
        assert (folder / picture).stat().st_size > 5_000


def test_videos_of_one_model_and_of_the_whole_training(trained, zoo):
    zoo("record_video", *ENV, "-n", "20", "-o", "videos")
    zoo("record_training", *ENV, "-n", "20")
    videos = {path.name for path in (trained / "videos").glob("*.mp4")}
    assert "training.mp4" in videos
    assert len(videos) == 5  # final, best, two checkpoints, and all of them in a row


def test_benchmark_plays_every_trained_agent(trained, zoo, folder):
    zoo(
        "benchmark",
        "--log-dir",
        "logs",
        "--benchmark-dir",
        "bench",
        "--no-hub",
        "--test-mode",
        "-n",
        "400",
        "--num-threads",
        "1",
    )
    assert "|dreamer|Pendulum-v1" in (folder / "bench/benchmark.md").read_text().replace(" ", "")


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(trained, zoo, folder) -> Path:
    zoo("push_to_hub", *ENV, "-orga", "me", "-n", "50", HF_HUB_OFFLINE="1")
    return folder / "hub/dreamer-Pendulum-v1"


def test_the_folder_for_the_hub_has_model_card_curve_and_video(published):
    assert json.loads((published / "results.json").read_text())["n_eval_episodes"] == 10
    assert zipfile.ZipFile(published / "dreamer-Pendulum-v1.zip").testzip() is None
    assert (published / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"ftyp" in (published / "replay.mp4").read_bytes()[:16]
    card = (published / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: stable-baselines3")
    assert "![Learning curve](learning_curve.png)" in card
    assert "python -m sb3_dreamer.zoo enjoy --algo dreamer --env Pendulum-v1" in card
    assert "rl_zoo3." not in card


class Hub(BaseHTTPRequestHandler):
    """The hub's download address, for one folder."""

    root: Path

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        file = self.root / self.path.rsplit("/", 1)[-1]
        found = file.is_file()
        body = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("Content-Length", str(len(body)))
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_what_was_published_is_loaded_and_played(published, zoo, folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"root": published}))
    Thread(target=server.serve_forever, daemon=True).start()
    network = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "cache"),
        "NO_PROXY": "*",
    }
    downloaded = ["--algo", "dreamer", "--env", "Pendulum-v1", "-f", "downloaded"]
    try:
        # what is downloaded will be unpickled: the hub's library wants the user's word for that, and so does ours
        assert "TRUST_REMOTE_CODE" in zoo("load_from_hub", *downloaded, "-orga", "me", fails=True, **network)
        zoo("load_from_hub", *downloaded, "-orga", "me", TRUST_REMOTE_CODE="True", **network)
    finally:
        server.shutdown()
        server.server_close()
    assert "Mean reward" in zoo("enjoy", *downloaded, "--no-render", "-n", "210")
