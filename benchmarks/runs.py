"""Runs of benchmarks.learn: their agents, environments, checkpoints and evaluations."""

import ast
import csv
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from benchmarks.envs import make_env
from sb3_dreamer.spaces import policy_for
from sb3_dreamer.zoo.schedules import linear_schedule

ALGORITHMS = ("dreamer", "sac", "crossq", "ppo")


class Run(NamedTuple):
    """What decides the outcome of a run: a folder holds exactly one."""

    env: str
    algo: str
    seed: int
    overrides: dict[str, Any]
    normalize: bool = False
    init: str | None = None


class Progress(NamedTuple):
    """How far a run is, written next to its checkpoint."""

    step: int = 0
    wall_clock: float = 0.0
    train_seconds: float = 0.0


def algorithm(name: str) -> type[BaseAlgorithm]:
    """The class behind `--algo`; optional packages are imported only if it needs them."""
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
            raise SystemExit(f"'{word}' is not an override: expected key=value, for example learning_rate=1e-4")
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
        return _initialized(run, env)
    kwargs = arguments(run)
    if run.algo in ("sac", "crossq"):
        kwargs.setdefault("buffer_size", decisions)  # the default million would be written at every checkpoint
    return algorithm(run.algo)(policy_for(env.observation_space), env, seed=run.seed, **kwargs)


def arguments(run: Run) -> dict[str, Any]:
    """The overrides as the constructor takes them."""
    return run.overrides | {name: schedule(1.0) for name, schedule in schedules(run).items()}


def schedules(run: Run) -> dict[str, Schedule]:
    """Those overrides that change during the run, `learning_rate=lin_6e-4` as the Zoo writes it, by name."""
    texts = {name: str(run.overrides.get(name)) for name in ("learning_rate", "ent_coef")}
    return {name: linear_schedule(text) for name, text in texts.items() if text.startswith("lin_")}


def _initialized(run: Run, env: VecEnv) -> BaseAlgorithm:
    """The agent that another run has trained, with an empty replay and its steps counted from zero."""
    folder = checkpoint_folder(Path(run.init or ""))
    if folder is None:
        raise SystemExit(f"--init {run.init} holds no checkpoint: give the --out of a run that was saved")
    other, _ = read_progress(folder)
    if (other.algo, other.normalize) != (run.algo, run.normalize):
        raise SystemExit(f"--init {run.init} holds {other}: give the same --algo, and the same --normalize")
    if fallen := sorted(schedules(other).keys() - run.overrides.keys()):
        raise SystemExit(f"--init {run.init}: its {fallen[0]} has changed with its steps, give {fallen[0]}=")
    model = algorithm(run.algo).load(folder / "model.zip", env=env, **arguments(run))
    model.set_random_seed(run.seed)
    model.num_timesteps = 0
    return model


# A checkpoint is a folder, written under another name and then renamed: model, replay and progress belong together.


def save_checkpoint(out: Path, model: BaseAlgorithm, run: Run, progress: Progress) -> None:
    """Write `out/checkpoint`; whenever the process is killed, a complete one is left, this or the previous one."""
    fresh, current, previous = (out / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    model.save(fresh / "model.zip")
    if isinstance(model.env, VecNormalize):
        model.env.save(str(fresh / "vecnormalize.pkl"))
    if hasattr(model, "save_replay_buffer"):
        model.save_replay_buffer(fresh / "replay.pkl")
    (fresh / "progress.json").write_text(json.dumps({"run": run._asdict(), "progress": progress._asdict()}))
    if current.exists():  # else the previous one is all that an earlier kill has left
        shutil.rmtree(previous, ignore_errors=True)
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
        raise SystemExit(f"{out} is a run with --normalize, whose statistics are not read here: give one without")
    saved = read_progress(folder)[1].step  # no checkpoint holds the steps of later rows
    with open(out / "results.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if int(row["step"]) <= saved][-1]
    return algorithm(last["algo"]).load(folder / "model.zip", device="cpu"), last


def read_progress(folder: Path) -> tuple[Run, Progress]:
    """The run that the checkpoint belongs to, and how far that run was."""
    stored = json.loads((folder / "progress.json").read_text())
    return Run(**stored["run"]), Progress(**stored["progress"])


def load_checkpoint(out: Path, run: Run, env: VecEnv, decisions: int) -> tuple[BaseAlgorithm, Progress] | None:
    """The agent as `save_checkpoint` left it, with a new random seed; None without a checkpoint."""
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
    model.set_random_seed(run.seed + progress.step)  # with the same seed, the first episodes would repeat
    return model, progress


def training_env(run: Run, out: Path) -> VecEnv:
    """One environment; if the run normalizes observations, with the statistics of the checkpoint."""
    env = make_vec_env(lambda: make_env(run.env), seed=run.seed)
    if not run.normalize:
        return env
    initial = checkpoint_folder(Path(run.init)) if run.init else None
    statistics = (checkpoint_folder(out) or initial or out) / "vecnormalize.pkl"
    return VecNormalize.load(str(statistics), env) if statistics.exists() else VecNormalize(env, norm_reward=False)


def evaluate(model: BaseAlgorithm, name: str, episodes: int, seed: int, deterministic: bool = True) -> dict[str, Any]:
    """Return of parallel episodes in separate environments."""
    env = make_vec_env(lambda: make_env(name), n_envs=min(episodes, 10), seed=seed)
    if isinstance(model.env, VecNormalize):
        env = VecNormalize(env, training=False, norm_reward=False)
        sync_envs_normalization(model.env, env)
    returns, _ = evaluate_policy(model, env, episodes, deterministic, return_episode_rewards=True)
    env.close()
    return {"return_mean": np.mean(returns), "return_std": np.std(returns), "n_episodes": episodes}
