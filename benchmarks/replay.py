"""Time to add, sample and refresh replay entries, and the memory of one. Prints one JSON line.

python -m benchmarks.replay --entries 1000000 --obs-dim 376 --act-dim 17
python -m benchmarks.replay --entries 5000000 --n-envs 50 --disk /data/replay
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dreamer.replay import SequenceReplayBuffer

BATCH, LENGTH, REPEATS = 16, 64, 1000


def median_ms(call: Callable[[], object]) -> float:
    """Median time of a call, in milliseconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def main() -> None:
    """Fill a replay to its capacity, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000, help="capacity, all of it filled")
    parser.add_argument("--obs-dim", type=int, default=17)
    parser.add_argument("--act-dim", type=int, default=6)
    parser.add_argument("--latent-size", type=int, default=544, help="0 for none")
    parser.add_argument("--n-envs", type=int, default=1, help="add_us is the time for one step of all of them")
    parser.add_argument("--disk", default=None, metavar="FOLDER", help="use memory-mapped files there")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    n, width = args.n_envs, args.latent_size
    obs_space = spaces.Box(-np.inf, np.inf, (args.obs_dim,), np.float64)
    act_space = spaces.Box(-1.0, 1.0, (args.act_dim,), np.float32)
    buffer = SequenceReplayBuffer(
        args.entries, obs_space, act_space, "cpu", n, sequence_length=LENGTH, latent_size=width, storage_path=args.disk
    )
    obs, reward, done = rng.standard_normal((n, args.obs_dim)), np.ones(n), np.zeros(n, bool)
    action = rng.uniform(-1, 1, (n, args.act_dim)).astype(np.float32)
    latent = rng.standard_normal((n, width)).astype(np.float32) if width else None
    infos: list[dict] = [{} for _ in range(n)]

    def add() -> None:
        buffer.add(obs, obs, action, reward, done, infos, latent)

    for _ in range(args.entries // n):
        add()
    for _ in range(args.entries // (BATCH * LENGTH) + 1):
        buffer.sample(BATCH)  # until no new sequence is left; after that all starts are random
    indices = iter([buffer.sample(BATCH).index for _ in range(REPEATS)])
    latents = th.randn(BATCH, LENGTH, width)
    result = {
        **vars(args),
        "batch": [BATCH, LENGTH],
        "sample_ms": median_ms(lambda: buffer.sample(BATCH)),
        "update_latents_ms": median_ms(lambda: buffer.update_latents(next(indices), latents)),
        "add_us": 1e3 * median_ms(add),
        "bytes_per_entry": buffer.nbytes / args.entries,
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}))


if __name__ == "__main__":
    main()
