"""Comparisons of the hybrid methods, one command each; a CSV row for each evaluation, and a summary at the end.

python -m benchmarks.hybrid hand-over                    Dreamer, then SAC, CrossQ or PPO, and each of them alone
python -m benchmarks.hybrid warm-start --teacher sac     a teacher, then Dreamer
python -m benchmarks.hybrid dream                        PPO, a world model of what it did, PPO in the dream
python -m benchmarks.hybrid guard --envs Hopper-v4       how often Dreamer falls, alone and with a fallback
python -m benchmarks.hybrid hand-over --envs Pendulum-v1 --seeds 0 --first 3000 --then 2000 --eval-every 500
python -m benchmarks.hybrid hand-over --init runs/humanoid --envs Humanoid-v4 --seeds 0 --normalize --successors ppo

Steps are the agent's; evaluations use separate environments, and are deterministic unless a row says sampled.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from benchmarks.envs import make_env
from benchmarks.rows import append_row, commit, machine
from benchmarks.runs import algorithm, checkpoint_folder, evaluate, parse_overrides, trained
from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import DreamVecEnv, Guard
from sb3_dreamer.spaces import policy_for

ENVS = ("Hopper-v4", "HalfCheetah-v4", "dmc/walker-walk")
COLUMNS = ("comparison", "env", "seed", "agent", "step", "return_mean", "return_std", "n_episodes", "falls", "seconds",
           "commit", "machine", "settings")  # fmt: skip
Row = dict[str, Any]


class Runner:
    """One environment and seed: trains, evaluates, and writes rows.

    :param args: the command line.
    :param env: name of the environment.
    :param seed: of training and evaluation.
    """

    def __init__(self, args: argparse.Namespace, env: str, seed: int) -> None:
        self.args, self.env, self.seed = args, env, seed
        self.rows: list[Row] = []
        self.started = time.perf_counter()
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "envs", "seeds", "comparison")}
        self.constant = {"comparison": args.comparison, "env": env, "seed": seed, "commit": commit(),
                         "machine": machine(), "settings": json.dumps(settings, default=str)}  # fmt: skip

    def training_env(self) -> VecEnv:
        """One environment."""
        return make_vec_env(lambda: make_env(self.env), seed=self.seed)

    def new(self, name: str) -> Any:
        """An untrained agent."""
        env = self.training_env()
        kwargs = parse_overrides(self.args.dreamer) if name == "dreamer" else {}
        return algorithm(name)(policy_for(env.observation_space), env, seed=self.seed, **kwargs)

    def record(self, agent: str, model: BaseAlgorithm, step: int, deterministic: bool = True) -> float:
        """Evaluate, and write a row."""
        score = evaluate(model, self.env, self.args.eval_episodes, 10_000 + 1_000 * self.seed, deterministic)
        return self.write(agent, step, score)

    def write(self, agent: str, step: int, score: dict[str, Any]) -> float:
        """Print and write a row."""
        row = {"agent": agent, "step": step, **score, "seconds": time.perf_counter() - self.started}
        row = {key: round(float(value), 2) if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps({"env": self.env, "seed": self.seed, **row}), flush=True)
        self.rows.append(row)
        append_row(self.args.out, COLUMNS, {**self.constant, **row})
        return row["return_mean"]

    def learn(self, agent: str, model: Any, steps: int, already: int = 0) -> None:
        """Train for a number of steps with regular evaluations; ``already`` steps were taken before.

        Whole rollouts, as in PPO, may take more steps than requested; the steps that were taken are counted.
        """
        before = model.num_timesteps
        while (done := model.num_timesteps - before) < steps:
            model.learn(min(self.args.eval_every, steps - done), reset_num_timesteps=False)
            self.record(agent, model, already + model.num_timesteps - before)

    def falls(self, agent: str, policy: Any, step: int, deterministic: bool = False) -> float:
        """Write a row with the number of terminations in 1,000 steps of one environment."""
        env = make_vec_env(lambda: make_env(self.env), seed=10_000 + 1_000 * self.seed)
        fell: list[bool] = []

        def note_end(variables: dict[str, Any], _: dict[str, Any]) -> None:
            fell.append(variables["done"] and not variables["info"]["TimeLimit.truncated"])

        n = self.args.eval_episodes
        episodes: Any = evaluate_policy(policy, env, n, deterministic, callback=note_end, return_episode_rewards=True)
        returns, lengths = episodes
        falls = 1_000 * sum(fell) / sum(lengths)
        score = {"return_mean": np.mean(returns), "return_std": np.std(returns), "n_episodes": len(returns)}
        self.write(agent, step, {**score, "falls": falls})
        return falls

    def returns(self, agent: str) -> list[float]:
        """Mean returns of all evaluations of an agent, in order."""
        return [row["return_mean"] for row in self.rows if row["agent"] == agent]


def dreamer_before(run: Runner) -> Dreamer:
    """The Dreamer to hand over, evaluated: trained here, or saved by `benchmarks.learn`."""
    if run.args.init is None:
        dreamer = run.new("dreamer")
        run.learn("dreamer", dreamer, run.args.first)
        return dreamer
    dreamer, _ = trained(run.args.init)
    folder = checkpoint_folder(run.args.init)
    assert folder is not None
    dreamer.set_env(run.training_env())
    dreamer.load_replay_buffer(folder / "replay.pkl")
    run.record("dreamer", dreamer, dreamer.num_timesteps)
    return dreamer


def hand_over(run: Runner) -> Row:
    """Dreamer, then SB3, and each alone for as many steps in total; after a saved Dreamer only the successors."""
    dreamer = dreamer_before(run)
    first, then = dreamer.num_timesteps, run.args.then
    summary: Row = {"dreamer before": run.returns("dreamer")[-1]}
    for name in run.args.successors:
        agent = f"dreamer-then-{name}"
        env = run.training_env()
        env = VecNormalize(env, norm_reward=False) if run.args.normalize else env
        replay = {} if name == "ppo" else {"buffer_size": first + then}
        student = dreamer.to_model_free(algorithm(name), env=env, seed=run.seed, **replay)
        summary[f"{agent} at the start"] = run.record(agent, student, first)
        run.learn(agent, student, then, already=first)
        summary[f"{agent} lowest"] = min(run.returns(agent))
    if run.args.init is not None:
        return summary
    run.learn("dreamer", dreamer, then, already=first)
    for name in run.args.successors:
        run.learn(name, run.new(name), first + then)
    return summary | {f"{row['agent']} at the end": row["return_mean"] for row in run.rows}


def warm_start(run: Runner) -> Row:
    """A teacher, then Dreamer."""
    teacher = run.new(run.args.teacher)
    teacher.learn(run.args.first)
    summary: Row = {"teacher": run.record("teacher", teacher, run.args.first)}
    model = run.new("dreamer").warm_start(teacher, run.args.teacher_steps)
    summary["at the start"] = run.record("dreamer", model, run.args.teacher_steps)
    run.learn("dreamer", model, run.args.then, already=run.args.teacher_steps)
    return summary | {"lowest": min(run.returns("dreamer")), "at the end": run.returns("dreamer")[-1]}


def dream(run: Runner) -> Row:
    """PPO continues in a dream, without a new real step.

    The world model watches PPO explore: without its noise it would not see where other actions lead. PPO improves the
    return of its sampled actions, so that is evaluated too, before and after.
    """
    ppo = run.new("ppo")
    ppo.learn(run.args.first)
    summary: Row = {"ppo before": run.record("ppo", ppo, run.args.first)}
    summary["sampled before"] = run.record("ppo, sampled", ppo, run.args.first, deterministic=False)
    model = run.new("dreamer").warm_start(ppo, run.args.teacher_steps, deterministic=False, student_share=0.0)
    dreams = DreamVecEnv(model, n_envs=run.args.dreams, horizon=run.args.horizon)
    with tempfile.TemporaryDirectory() as folder:
        ppo.save(Path(folder) / "ppo")
        settings = dict(n_steps=run.args.horizon, batch_size=4096, n_epochs=4, learning_rate=1e-4)
        dreaming = PPO.load(Path(folder) / "ppo", env=dreams, custom_objects=settings)
    run.learn("ppo in the dream", dreaming, run.args.then)
    sampled = run.record("ppo in the dream, sampled", dreaming, run.args.then, deterministic=False)
    return summary | {"ppo after": run.returns("ppo in the dream")[-1], "sampled after": sampled}


def guard(run: Runner) -> Row:
    """Falls in 1,000 steps: of a fallback controller, of Dreamer, and of Dreamer with that fallback."""
    fallback = run.new(run.args.teacher)
    fallback.learn(run.args.first)
    model: Dreamer = run.new("dreamer")
    run.learn("dreamer", model, run.args.then)
    guarded = Guard(model, fallback)
    summary = {"falls of the fallback": run.falls("fallback", fallback, run.args.first, deterministic=True)}
    summary["falls of dreamer"] = run.falls("dreamer, sampled", model, run.args.then)
    summary["falls with the fallback"] = run.falls("dreamer with the fallback, sampled", guarded, run.args.then)
    return summary | {"percent of steps by the fallback": 100 * guarded.taken_over / guarded.decisions}


COMPARISONS: dict[str, Callable[[Runner], Row]] = {
    "hand-over": hand_over, "warm-start": warm_start, "dream": dream, "guard": guard}  # fmt: skip


def runs(args: argparse.Namespace) -> Iterator[Runner]:
    """All environments with all seeds."""
    for env in args.envs:
        for seed in args.seeds:
            yield Runner(args, env, seed)


def command_line() -> argparse.ArgumentParser:
    """The arguments of all comparisons, and those of single ones."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--envs", nargs="+", default=ENVS)
    common.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    common.add_argument("--first", type=int, default=30_000, help="steps of the agent that comes first")
    common.add_argument("--then", type=int, default=30_000, help="steps of the agent that takes over")
    common.add_argument("--eval-every", type=int, default=2_500)
    common.add_argument("--eval-episodes", type=int, default=10)
    common.add_argument("--threads", type=int, default=1)
    common.add_argument("--dreamer", nargs="*", default=[], metavar="key=value", help="arguments of Dreamer")
    common.add_argument("--out", type=Path, default=Path("runs/hybrid.csv"), help="rows are appended")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comparisons = parser.add_subparsers(dest="comparison", required=True)
    one = {name: comparisons.add_parser(name, parents=[common], description=comparison.__doc__)
           for name, comparison in COMPARISONS.items()}  # fmt: skip
    one["hand-over"].add_argument("--init", type=Path, help="a Dreamer: the --out of benchmarks.learn")
    one["hand-over"].add_argument("--normalize", action="store_true", help="VecNormalize around the successors")
    one["hand-over"].add_argument(
        "--successors", nargs="+", choices=("sac", "crossq", "ppo"), default=("sac", "crossq")
    )
    for name in ("warm-start", "guard"):
        one[name].add_argument("--teacher", choices=("ppo", "sac"), default="ppo", help="or fallback")
    for name in ("warm-start", "dream"):
        one[name].add_argument("--teacher-steps", type=int, default=10_000, help="in which the world model watches")
    one["dream"].add_argument("--dreams", type=int, default=128)
    one["dream"].add_argument("--horizon", type=int, default=128)
    return parser


def read_command_line() -> argparse.Namespace:
    """The arguments, without those that a saved Dreamer determines."""
    parser = command_line()
    args = parser.parse_args()
    args.out = args.out.absolute()
    for name in getattr(args, "successors", ()):
        algorithm(name)  # fail before hours of work if one is not installed
    if args.comparison == "hand-over" and args.init is not None:
        if len(args.envs) * len(args.seeds) > 1:
            parser.error("--init is one Dreamer: give its one environment and seed, --envs and --seeds")
        if args.dreamer:
            parser.error("--init is a Dreamer with its own settings: leave --dreamer out")
        del args.first
    return args


def main() -> None:
    """Read the command line, run, and print the means over the seeds."""
    args = read_command_line()
    th.set_num_threads(args.threads)

    summaries: dict[str, list[Row]] = {}
    for run in runs(args):
        summaries.setdefault(run.env, []).append(COMPARISONS[args.comparison](run))
    for env, of_seeds in summaries.items():
        means = {key: round(float(np.mean([summary[key] for summary in of_seeds])), 1) for key in of_seeds[0]}
        print(json.dumps({"env": env, "seeds": len(of_seeds), **means}))


if __name__ == "__main__":
    main()
