"""Train one agent with one seed and append its evaluations to a CSV; started again, it continues where it stopped.

python -m benchmarks.learn --env Pendulum-v1 --seed 0 --steps 5000
python -m benchmarks.learn --env dmc/walker-walk --seed 1 --steps 100000 learning_rate=1e-4 policy_kwargs.units=256
python -m benchmarks.learn --env HalfCheetah-v4 --algo sac --steps 100000 --eval-every 5000
python -m benchmarks.learn --env Walker2d-v4 --steps 100000 learning_rate=lin_6e-4
python -m benchmarks.learn --env Hopper-v4 --steps 100000 train_ratio=128 ent_coef=lin_3e-3_3e-4_0.5
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import action_repeat, make_env
from benchmarks.rows import append_row, commit, drop_rows_after, machine
from benchmarks.runs import (
    ALGORITHMS,
    Progress,
    Run,
    evaluate,
    load_checkpoint,
    new_model,
    parse_overrides,
    save_checkpoint,
    schedules,
    training_env,
)

COLUMNS = (
    "env", "algo", "seed", "step", "return_mean", "return_std", "n_episodes", "train_return",
    "wall_clock", "train_seconds", "updates", "commit", "machine", "settings",
)  # fmt: skip


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


class Trainer:
    """Trains the agent of a run, from its checkpoint if there is one.

    :param run: what to train.
    :param out: folder of the checkpoint, the results and the log.
    :param args: the command line.
    """

    def __init__(self, run: Run, out: Path, args: argparse.Namespace) -> None:
        self.run, self.out, self.args = run, out, args
        self.repeat = action_repeat(run.env)
        self.decisions = args.steps // self.repeat
        self.env = training_env(run, out)
        check_eval_env(args.eval_env, self.env)
        loaded = load_checkpoint(out, run, self.env, self.decisions)
        self.model, self.progress = loaded or (new_model(run, self.env, self.decisions), Progress())
        self.model.set_logger(configure(str(out / f"log_from_{self.progress.step}"), ["csv"]))
        self.constant = constant_columns(run, args)
        self.results = out / "results.csv"
        drop_rows_after(self.results, COLUMNS, self.progress.step)
        self.episodes = EpisodeReturns()
        self.saved = self.progress.step
        self.started = time.perf_counter() - self.progress.wall_clock

    def train(self) -> None:
        """Learn, evaluate, write a row, save; until `args.steps` simulator steps are done."""
        if self.run.init and self.progress.step == 0:
            self.record(0, 0.0)
        while self.progress.step < self.args.steps:
            seconds = self.learn_until_evaluation()
            self.record(self.model.num_timesteps * self.repeat, self.progress.train_seconds + seconds)
            step = self.progress.step
            if step - self.saved >= self.args.save_every or step >= self.args.steps:
                save_checkpoint(self.out, self.model, self.run, self.progress)
                self.saved = step
        self.model.logger.close()
        self.env.close()

    def learn_until_evaluation(self) -> float:
        """Learn up to the next evaluation: seconds that it took."""
        step, every = self.progress.step, self.args.eval_every
        decisions = min(every - step % every, self.args.steps - step) // self.repeat
        for name, schedule in schedules(self.run).items():
            follow_schedule(self.model, name, schedule, self.model.num_timesteps + decisions, self.decisions)
        before = time.perf_counter()
        self.model.learn(max(decisions, 1), callback=self.episodes, reset_num_timesteps=False)
        return time.perf_counter() - before

    def record(self, step: int, train_seconds: float) -> None:
        """Evaluate the agent, then write and print a row."""
        seed = 10_000 + 1_000 * self.run.seed + step
        score = evaluate(self.model, self.args.eval_env or self.run.env, self.args.eval_episodes, seed)
        self.progress = Progress(step, time.perf_counter() - self.started, train_seconds)
        measured = {
            **score,
            **self.progress._asdict(),
            "train_return": self.episodes.pop_mean(),
            "updates": self.model._n_updates,
        }
        row = {name: _rounded(value) for name, value in measured.items()}
        append_row(self.results, COLUMNS, self.constant | row)
        print(json.dumps(row), flush=True)


def follow_schedule(model: BaseAlgorithm, name: str, schedule: Schedule, until: int, end: int) -> None:
    """Let a schedule run over the whole run: SB3 measures progress by what one call of `learn()` was asked for.

    :param name: of the agent's attribute.
    :param schedule: of the progress that remains of the run.
    :param until: step at which the next call of `learn()` ends.
    :param end: step at which the run ends.
    """
    setattr(model, name, lambda left: schedule(max(1 - until * (1 - left) / end, 0)))
    model._setup_lr_schedule()


def check_eval_env(name: str | None, env: VecEnv) -> None:
    """Refuse an environment to evaluate in that does not fit, before any step is taken."""
    if name is None:
        return
    other = make_vec_env(lambda: make_env(name))
    if (other.observation_space.shape, other.action_space) != (env.observation_space.shape, env.action_space):
        raise SystemExit(f"--eval-env {name} has observations of another shape or other actions than --env")
    other.close()


def constant_columns(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The columns that say what ran, and on which machine."""
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
    """Three decimals; NaN becomes an empty cell and a JSON null."""
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
    parser.add_argument("--eval-env", help="environment to evaluate in; default: that of the training")
    parser.add_argument("--eval-every", type=int, help="simulator steps; default: a tenth of --steps")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=0, help="simulator steps; default: at every evaluation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--normalize", action="store_true", help="normalize observations by VecNormalize")
    parser.add_argument("--init", help="start with what the run in this folder has learned, without its replay")
    parser.add_argument("--out", type=Path, help="folder; default: runs/<env>-<algo>-<seed>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of the agent's constructor")
    args = parser.parse_intermixed_args()

    th.set_num_threads(args.threads)
    args.eval_every = args.eval_every or max(args.steps // 10, 1)
    run = Run(args.env, args.algo, args.seed, parse_overrides(args.overrides), args.normalize, args.init)
    out = args.out or Path("runs") / f"{args.env.replace('/', '-')}-{args.algo}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    Trainer(run, out, args).train()


if __name__ == "__main__":
    main()
