"""Memory, open files and threads of a long run, printed as JSON lines.

python -m benchmarks.memory --steps 200000
"""

import argparse
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env

from sb3_dreamer import Dreamer


def resident_megabytes() -> float:
    """Resident memory of the process; its peak where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def open_files() -> int:
    """Number of file descriptors, 0 where the system has no /proc."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def main() -> None:
    """Train at debug size and print a line after each tenth of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--buffer-size", type=int, default=10_000)
    parser.add_argument("--train-ratio", type=float, default=4)
    parser.add_argument("--learns", type=int, default=50, help="calls of learn() that the run is made of")
    args = parser.parse_args()
    settings = dict(model_size="debug", batch_size=4, batch_length=16, train_ratio=args.train_ratio)
    model = Dreamer("MlpPolicy", make_vec_env(args.env), buffer_size=args.buffer_size, **settings)
    started = time.perf_counter()
    for call in range(args.learns):
        model.learn(args.steps // args.learns, reset_num_timesteps=False)
        if (call + 1) % max(args.learns // 10, 1) == 0:
            row = {
                "step": model.num_timesteps,
                "updates": model._n_updates,
                "megabytes": round(resident_megabytes(), 1),
            }
            row |= {"files": open_files(), "threads": threading.active_count()}
            print(json.dumps(row | {"seconds": round(time.perf_counter() - started)}), flush=True)


if __name__ == "__main__":
    main()
