"""Train one agent with one seed and append its evaluations to a CSV; started again, it goes on where it was stopped.

python benchmarks/learn.py --env Pendulum-v1 --seed 0 --steps 5000
python benchmarks/learn.py --env dmc/walker-walk --seed 1 --steps 100000 learning_rate=1e-4 policy_kwargs.units=256
python benchmarks/learn.py --env HalfCheetah-v4 --algo sac --steps 100000 --eval-every 5000
python benchmarks/learn.py --env Walker2d-v4 --steps 100000 learning_rate=lin_6e-4
"""

import argparse
import ast
import csv
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from benchmarks.envs import action_repeat, make_env
from sb3_dreamer.spaces import policy_for

ALGORITHMS = ("dreamer", "sac", "crossq", "ppo")
COLUMNS = (
    "env", "algo", "seed", "step", "return_mean", "return_std", "n_episodes", "train_return",
    "wall_clock", "train_seconds", "updates", "commit", "machine", "settings",
)  # fmt: skip


class Run(NamedTuple):
    """What decides the outcome of a run: a folder holds exactly one."""

    env: str
    algo: str
    seed: int
    overrides: dict[str, Any]
    normalize: bool = False
    init: str | None = None


class Progress(NamedTuple):
    """How far a run is, written beside its checkpoint."""

    step: int = 0
    wall_clock: float = 0.0
    train_seconds: float = 0.0


class EpisodeReturns(BaseCallback):
    """Collects the returns of the training episodes that end."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def pop_mean(self) -> float:
        """Mean since the last call; NaN when no episode ended."""
        mean = float(np.mean(self.returns)) if self.returns else float("nan")
        self.returns.clear()
        return mean


def algorithm(name: str) -> type[BaseAlgorithm]:
    """The class behind `--algo`; the optional packages load only when asked for."""
    if name == "dreamer":
        from sb3_dreamer import Dreamer

        return Dreamer
    if name == "crossq":
        from sb3_contrib import CrossQ

        return CrossQ
    return SAC if name == "sac" else PPO


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["learning_rate=1e-4", "policy_kwargs.units=256"]` as constructor arguments."""
    overrides: dict[str, Any] = {}
    for word in words:
        key, found, text = word.partition("=")
        if not found:
            raise SystemExit(f"'{word}' is no override: expected key=value, for example learning_rate=1e-4")
        *path, last = key.split(".")
        inner = overrides
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = _literal(text)
    return overrides


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def new_model(run: Run, env: VecEnv, decisions: int) -> BaseAlgorithm:
    """An agent with the overrides of this run: untrained, or as another run left it."""
    if run.init:
        return _heir(run, env)
    kwargs = arguments(run)
    if run.algo in ("sac", "crossq"):
        kwargs.setdefault("buffer_size", decisions)  # the default million would be written at every checkpoint
    return algorithm(run.algo)(policy_for(env.observation_space), env, seed=run.seed, **kwargs)


def arguments(run: Run) -> dict[str, Any]:
    """The overrides as the constructor takes them."""
    rate = first_rate(run)
    return dict(run.overrides) if rate is None else run.overrides | {"learning_rate": rate}


def first_rate(run: Run) -> float | None:
    """Where the learning rate begins that falls to zero by the end of the run, `lin_6e-4` as the Zoo writes it."""
    rate = run.overrides.get("learning_rate")
    return float(rate.removeprefix("lin_")) if isinstance(rate, str) and rate.startswith("lin_") else None


def follow_schedule(model: BaseAlgorithm, first: float, until: int, end: int) -> None:
    """Let the rate fall over the whole run: SB3 measures progress by what one call of `learn()` was asked for.

    :param first: rate at step 0.
    :param until: step at which the next call of `learn()` ends.
    :param end: step at which the run ends, and the rate is zero.
    """
    model.learning_rate = lambda left: first * max(1 - until * (1 - left) / end, 0)
    model._setup_lr_schedule()


def _heir(run: Run, env: VecEnv) -> BaseAlgorithm:
    """What another run has learned, with an empty replay and its steps counted from zero."""
    folder = checkpoint_folder(Path(run.init or ""))
    if folder is None:
        raise SystemExit(f"--init {run.init} holds no checkpoint: give the --out of a run that was saved")
    other, _ = read_progress(folder)
    if (other.algo, other.normalize) != (run.algo, run.normalize):
        raise SystemExit(f"--init {run.init} holds {other}: give the same --algo, and --normalize as there")
    if first_rate(other) is not None and "learning_rate" not in run.overrides:
        raise SystemExit(f"--init {run.init}: its learning rate has fallen with its steps, give learning_rate=")
    model = algorithm(run.algo).load(folder / "model.zip", env=env, **arguments(run))
    model.set_random_seed(run.seed)
    model.num_timesteps = 0
    return model


# A checkpoint is a folder written aside and then renamed, so that model, replay and progress always belong together.


def save_checkpoint(out: Path, model: BaseAlgorithm, run: Run, progress: Progress) -> None:
    """Write `out/checkpoint`; a kill at any moment leaves a complete one, this or the one before."""
    fresh, current, previous = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save(fresh / "model.zip")
    if isinstance(model.env, VecNormalize):
        model.env.save(str(fresh / "vecnormalize.pkl"))
    if hasattr(model, "save_replay_buffer"):
        model.save_replay_buffer(fresh / "replay.pkl")
    (fresh / "progress.json").write_text(json.dumps({"run": run._asdict(), "progress": progress._asdict()}))
    shutil.rmtree(previous, ignore_errors=True)
    if current.exists():
        current.rename(previous)
    fresh.rename(current)
    shutil.rmtree(previous, ignore_errors=True)


def checkpoint_folder(out: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((out / name for name in ("checkpoint", "checkpoint.old") if (out / name).exists()), None)


def trained(out: Path) -> tuple[Any, dict[str, str]]:
    """The agent of a run, on the CPU, and the last row of its results."""
    folder = checkpoint_folder(out)
    if folder is None:
        raise SystemExit(f"{out} holds no checkpoint: give the --out of a run that was saved")
    if (folder / "vecnormalize.pkl").exists():
        raise SystemExit(f"{out} is of a run with --normalize, whose statistics are not read here: give one without")
    saved = read_progress(folder)[1].step  # rows after it are of steps that no checkpoint holds
    with open(out / "results.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if int(row["step"]) <= saved][-1]
    return algorithm(last["algo"]).load(folder / "model.zip", device="cpu"), last


def read_progress(folder: Path) -> tuple[Run, Progress]:
    """Whose checkpoint it is, and how far that run was."""
    stored = json.loads((folder / "progress.json").read_text())
    return Run(**stored["run"]), Progress(**stored["progress"])


def load_checkpoint(out: Path, run: Run, env: VecEnv, decisions: int) -> tuple[BaseAlgorithm, Progress] | None:
    """The agent as `save_checkpoint` left it, drawing anew from there on, or None where there is no checkpoint."""
    folder = checkpoint_folder(out)
    if folder is None:
        return None
    stored, progress = read_progress(folder)
    if stored != Run(**json.loads(json.dumps(run._asdict()))):
        raise SystemExit(f"{out} holds another run, {stored}: choose another --out or remove the folder")
    model = algorithm(run.algo).load(folder / "model.zip", env=env)
    rows = getattr(model, "buffer_size", decisions)
    if "buffer_size" not in run.overrides and rows < decisions:
        raise SystemExit(f"{out} holds a run of {rows} steps, as many as its replay: choose another --out")
    if hasattr(model, "load_replay_buffer"):
        model.load_replay_buffer(folder / "replay.pkl")
    model.set_random_seed(run.seed + progress.step)  # or the first episodes would come once more
    return model, progress


class Results:
    """The CSV of a run: one row for each evaluation.

    :param path: the file
    :param constant: the columns that are the same in every row
    :param last_step: rows after this step belong to training that was lost, and are dropped
    """

    def __init__(self, path: Path, constant: dict[str, Any], last_step: int) -> None:
        self.path, self.constant = path, constant
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= last_step)

    def append(self, **measured: Any) -> None:
        """Add one row."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.constant | measured)


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add one row to a CSV that others may have begun; a new one gets its header."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """The commit of this checkout, with a + where the package differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "../sb3_dreamer"], capture_output=True, text=True)
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> str:
    """Processor, cores and PyTorch build."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {th.__version__}"


def training_env(run: Run, out: Path) -> VecEnv:
    """One environment; where the run normalises its observations, with the statistics of the checkpoint."""
    env = make_vec_env(lambda: make_env(run.env), seed=run.seed)
    if not run.normalize:
        return env
    begun_from = checkpoint_folder(Path(run.init)) if run.init else None
    statistics = (checkpoint_folder(out) or begun_from or out) / "vecnormalize.pkl"
    return VecNormalize.load(str(statistics), env) if statistics.exists() else VecNormalize(env, norm_reward=False)


def evaluate(model: BaseAlgorithm, name: str, episodes: int, seed: int, deterministic: bool = True) -> dict[str, Any]:
    """Episodes side by side in environments of their own."""
    env = make_vec_env(lambda: make_env(name), n_envs=min(episodes, 10), seed=seed)
    if isinstance(model.env, VecNormalize):
        env = VecNormalize(env, training=False, norm_reward=False)
        sync_envs_normalization(model.env, env)
    returns, _ = evaluate_policy(model, env, episodes, deterministic, return_episode_rewards=True)
    env.close()
    return {"return_mean": np.mean(returns), "return_std": np.std(returns), "n_episodes": episodes}


def check_eval_env(name: str | None, env: VecEnv) -> None:
    """Refuse an environment to evaluate in that does not fit, before any step is taken."""
    if name is None:
        return
    other = make_vec_env(lambda: make_env(name))
    if (other.observation_space.shape, other.action_space) != (env.observation_space.shape, env.action_space):
        raise SystemExit(f"--eval-env {name} has observations of another shape or other actions than --env")
    other.close()


def train(run: Run, out: Path, args: argparse.Namespace) -> None:
    """Learn, evaluate, write a row, save; until `args.steps` simulator steps are done."""
    repeat = action_repeat(run.env)
    env = training_env(run, out)
    decisions = args.steps // repeat
    check_eval_env(args.eval_env, env)
    model, progress = load_checkpoint(out, run, env, decisions) or (new_model(run, env, decisions), Progress())
    model.set_logger(configure(str(out / f"log_from_{progress.step}"), ["csv"]))
    results = Results(out / "results.csv", constant_columns(run, args), progress.step)
    episodes, saved, rate = EpisodeReturns(), progress.step, first_rate(run)
    started = time.perf_counter() - progress.wall_clock

    def note(step: int, train_seconds: float) -> Progress:
        score = evaluate(model, args.eval_env or run.env, args.eval_episodes, seed=10_000 + 1_000 * run.seed + step)
        progress = Progress(step, time.perf_counter() - started, train_seconds)
        row = {**score, **progress._asdict(), "train_return": episodes.pop_mean(), "updates": model._n_updates}
        row = {key: _rounded(value) for key, value in row.items()}
        results.append(**row)
        print(json.dumps(row), flush=True)
        return progress

    if run.init and progress.step == 0:
        progress = note(0, 0.0)
    while progress.step < args.steps:
        chunk = min(args.eval_every - progress.step % args.eval_every, args.steps - progress.step) // repeat
        if rate is not None:
            follow_schedule(model, rate, model.num_timesteps + chunk, decisions)
        before = time.perf_counter()
        model.learn(max(chunk, 1), callback=episodes, reset_num_timesteps=False)
        progress = note(model.num_timesteps * repeat, progress.train_seconds + time.perf_counter() - before)
        if progress.step - saved >= args.save_every or progress.step >= args.steps:
            save_checkpoint(out, model, run, progress)
            saved = progress.step
    model.logger.close()
    env.close()


def constant_columns(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The columns that say what ran, and on what."""
    settings = {"overrides": run.overrides, "threads": args.threads, "eval_every": args.eval_every}
    if run.normalize:
        settings["normalize"] = True
    if run.init:
        settings["init"] = run.init
    if args.eval_env:
        settings["eval_env"] = args.eval_env
    return {
        **{key: getattr(run, key) for key in ("env", "algo", "seed")},
        "commit": commit(),
        "machine": machine(),
        "settings": json.dumps(settings),
    }


def _rounded(value: Any) -> Any:
    """Three decimals; no number becomes an empty cell and a JSON null."""
    if not isinstance(value, float | np.floating):
        return value
    return None if np.isnan(value) else round(float(value), 3)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="a Gymnasium id, dmc/<domain>-<task>, Pendulum-no-velocity, ...")
    parser.add_argument("--algo", choices=ALGORITHMS, default="dreamer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, required=True, help="simulator steps: an action repeated twice counts two")
    parser.add_argument("--eval-env", help="environment to evaluate in, that of the training if not given")
    parser.add_argument("--eval-every", type=int, help="simulator steps, a tenth of --steps if not given")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=0, help="simulator steps, every evaluation if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--normalize", action="store_true", help="observations by VecNormalize")
    parser.add_argument("--init", help="begin with what the run in this folder has learned, without its replay")
    parser.add_argument("--out", type=Path, help="folder, runs/<env>-<algo>-<seed> if not given")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of the agent's constructor")
    args = parser.parse_intermixed_args()

    th.set_num_threads(args.threads)
    args.eval_every = args.eval_every or max(args.steps // 10, 1)
    run = Run(args.env, args.algo, args.seed, parse_overrides(args.overrides), args.normalize, args.init)
    out = args.out or Path("runs") / f"{args.env.replace('/', '-')}-{args.algo}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    train(run, out, args)


if __name__ == "__main__":
    main()
