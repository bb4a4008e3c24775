"""Environment steps per second of whole training loops: Dreamer and SAC, interleaved in one process.

python -m benchmarks.loop --env HalfCheetah-v4 --threads 2

Prints one JSON line. `share_not_train` is the time outside `train()`: acting, environment, storing, logging.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from benchmarks.envs import action_repeat, make_env
from benchmarks.rows import commit, machine
from benchmarks.runs import parse_overrides
from sb3_dreamer import Dreamer
from sb3_dreamer.spaces import policy_for


class Loop:
    """A training loop that can be run piece by piece.

    :param model: the agent; its ``train`` is replaced by a timed one.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self.model = model
        self.rates: list[float] = []  # decisions per second
        self.seconds = self.train_seconds = 0.0
        model.train = self._timed(model.train)  # type: ignore[attr-defined]

    def _timed(self, train: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            before = time.perf_counter()
            train(*args, **kwargs)
            self.train_seconds += time.perf_counter() - before

        return timed

    def warm_up(self, steps: int) -> None:
        """Fill the replay with random actions, then train a little, untimed."""
        self.model.learn(getattr(self.model, "learning_starts", 0) + steps, reset_num_timesteps=False)
        self.train_seconds = 0.0

    def run(self, steps: int) -> None:
        """Time some steps."""
        already, before = self.model.num_timesteps, time.perf_counter()
        self.model.learn(steps, reset_num_timesteps=False)
        elapsed = time.perf_counter() - before
        self.seconds += elapsed
        self.rates.append((self.model.num_timesteps - already) / elapsed)

    def measured(self, repeat: int) -> dict[str, float]:
        """Simulator steps per second (median and extremes of the pieces), and where the time went."""
        rates = repeat * np.array(self.rates)
        names = {"steps_per_second": np.median(rates), "min": rates.min(), "max": rates.max()}
        share = 1 - self.train_seconds / self.seconds
        return {key: round(float(value), 3) for key, value in {**names, "share_not_train": share}.items()}


def main() -> None:
    """Read the command line, run the loops in turn, print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v4")
    parser.add_argument("--steps", type=int, default=300, help="decisions in each piece")
    parser.add_argument("--pieces", type=int, default=5, help="pieces for each agent, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of Dreamer's constructor")
    args = parser.parse_intermixed_args()
    th.set_num_threads(args.threads)

    env = make_env(args.env)
    policy = policy_for(env.observation_space)
    overrides = parse_overrides(args.overrides)
    loops = {
        "dreamer": Loop(Dreamer(policy, env, seed=0, **overrides)),
        "sac": Loop(SAC(policy, make_env(args.env), seed=0)),
    }
    for loop in loops.values():
        loop.warm_up(args.steps)
    for _ in range(args.pieces):
        for loop in loops.values():
            loop.run(args.steps)

    results: dict[str, Any] = {name: loop.measured(action_repeat(args.env)) for name, loop in loops.items()}
    results["ratio"] = round(results["dreamer"]["steps_per_second"] / results["sac"]["steps_per_second"], 3)
    settings = {**vars(args), "overrides": overrides, "commit": commit(), "machine": machine()}
    print(json.dumps({**results, "settings": settings}))


if __name__ == "__main__":
    main()
