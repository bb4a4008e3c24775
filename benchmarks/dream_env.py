"""Imagined steps per second of `DreamVecEnv`, on a replay of random actions. Prints one JSON line.

python -m benchmarks.dream_env --env HalfCheetah-v4 --n-envs 1024 --threads 2
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch as th
from gymnasium import spaces

from benchmarks.envs import make_env
from benchmarks.rows import machine
from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import DreamVecEnv


def seconds_of_steps(dreams: DreamVecEnv, steps: int, warmup: int = 20) -> list[float]:
    """Seconds of each step of all dreams; the random actions are drawn outside of the measured time."""
    dreams.reset()
    rng, space = np.random.default_rng(0), dreams.action_space
    assert isinstance(space, spaces.Box)
    seconds = []
    for _ in range(steps + warmup):
        actions = rng.uniform(space.low, space.high, (dreams.num_envs, *space.shape)).astype(np.float32)
        start = time.perf_counter()
        dreams.step(actions)
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def main() -> None:
    """Read the settings, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v4", help="with continuous actions")
    parser.add_argument("--model-size", default="size1m")
    parser.add_argument("--n-envs", type=int, default=1024)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    th.set_num_threads(args.threads)
    env = make_env(args.env)
    model = Dreamer("MlpPolicy", env, learning_starts=2_000, model_size=args.model_size, seed=0, device="cpu")
    model.learn(2_000)
    seconds = seconds_of_steps(DreamVecEnv(model, args.n_envs, args.horizon), args.steps)
    result = {
        "steps_per_second": round(args.n_envs / statistics.median(seconds)),
        "with_all_restarts": round(args.n_envs / statistics.mean(seconds)),
        "settings": {**vars(args), "machine": machine()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
