"""Milliseconds per call of ``predict``, state carried, for one observation and for many. Prints one JSON line.

python -m benchmarks.predict_latency --model-size size1m --obs-dim 17 --act-dim 6 --threads 1
"""

import argparse
import json
import time

import numpy as np
import torch as th

from benchmarks.rows import machine
from benchmarks.update_speed import Shape
from sb3_dreamer import Dreamer


def latencies(model: Dreamer, n_envs: int | None, calls: int, warmup: int = 50) -> np.ndarray:
    """Milliseconds of each of ``calls`` steps of ``n_envs`` environments together; None: a single, unbatched one."""
    shape = model.observation_space.shape
    assert shape is not None
    batch = shape if n_envs is None else (n_envs, *shape)
    sequence = np.random.default_rng(0).standard_normal((calls + warmup, *batch), np.float32)
    state, milliseconds = None, []
    for obs in sequence:
        start = time.perf_counter()
        _, state = model.predict(obs, state, deterministic=True)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return np.array(milliseconds[warmup:])


def main() -> None:
    """Read the settings, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="size1m")
    parser.add_argument("--obs-dim", type=int, default=17)
    parser.add_argument("--act-dim", type=int, default=6)
    parser.add_argument("--n-envs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()

    th.set_num_threads(args.threads)
    env = Shape(args.obs_dim, args.act_dim)
    model = Dreamer("MlpPolicy", env, model_size=args.model_size, device=args.device, seed=0)
    single, many = latencies(model, None, args.calls), latencies(model, args.n_envs, args.calls // 4)
    result = {
        "single_ms_median": float(np.median(single)),
        "single_ms_p99": float(np.percentile(single, 99)),
        f"batch_of_{args.n_envs}_ms_median": float(np.median(many)),
        "settings": {**vars(args), "machine": machine()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
