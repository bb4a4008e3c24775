"""Does planning at act time help? An agent of benchmarks.learn, alone and with a Planner, from the same initial states.

python -m benchmarks.planning runs/HalfCheetah-v4-dreamer-0 --episodes 4 --horizon 5

Prints a JSON line and appends a CSV row for each of the two.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.envs import make_env
from benchmarks.rows import append_row, machine
from benchmarks.runs import trained
from sb3_dreamer.planning import Planner

COLUMNS = ("env", "seed", "agent", "step", "return_mean", "return_std", "n_episodes", "ms_per_decision", "commit",
           "machine", "settings")  # fmt: skip


def measure(policy: Any, env: str, episodes: int) -> dict[str, Any]:
    """Parallel deterministic episodes, from initial states that depend only on the number of episodes."""
    envs = DummyVecEnv([lambda: make_env(env) for _ in range(episodes)])
    envs.seed(1000)
    th.manual_seed(0)
    start = time.perf_counter()
    returns, lengths = evaluate_policy(policy, envs, episodes, return_episode_rewards=True, warn=False)
    seconds, decisions = time.perf_counter() - start, sum(map(int, np.array(lengths).flatten()))
    envs.close()
    return {
        "return_mean": round(float(np.mean(returns)), 2),
        "return_std": round(float(np.std(returns)), 2),
        "n_episodes": episodes,
        "ms_per_decision": round(1e3 * seconds / decisions, 2),
    }


def main() -> None:
    """Read the command line, load the agent, evaluate both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of benchmarks.learn")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/planning.csv"), help="rows are appended")
    for name in ("horizon", "n-candidates", "n-elites", "iterations"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS, help="of the Planner")
    given = vars(parser.parse_args())
    run, episodes, threads, out = (given.pop(name) for name in ("run", "episodes", "threads", "out"))
    th.set_num_threads(threads)
    model, last = trained(run)
    about = {name: last[name] for name in ("env", "seed", "step", "commit")}
    about |= {"machine": machine(), "settings": json.dumps({"trained": json.loads(last["settings"]), **given})}
    for agent, policy in (("dreamer", model), ("planner", Planner(model, **given))):
        row = {**about, "agent": agent, **measure(policy, last["env"], episodes)}
        print(json.dumps(row), flush=True)
        append_row(out, COLUMNS, row)


if __name__ == "__main__":
    main()
