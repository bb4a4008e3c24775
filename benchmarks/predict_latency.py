"""Milliseconds per call of ``predict``, state carried, for one observation and for many. Prints one JSON line.

python benchmarks/predict_latency.py --model-size size1m --obs-dim 17 --act-dim 6 --threads 1
"""

import argparse
import json
import platform
import time

import numpy as np
import torch as th

from benchmarks.update_speed import Shape
from sb3_dreamer import Dreamer


def latencies(model: Dreamer, n_envs: int, calls: int, warmup: int = 50) -> np.ndarray:
    """Milliseconds of each of ``calls`` steps of ``n_envs`` environments at once; 0 for a single, unbatched one."""
    space = model.observation_space
    assert space.shape is not None
    shape = (calls + warmup, *([n_envs] * bool(n_envs)), *space.shape)
    obs = np.random.default_rng(0).standard_normal(shape, np.float32)
    state, milliseconds = None, []
    for one in obs:
        start = time.perf_counter()
        _, state = model.predict(one, state, deterministic=True)
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
    single, many = latencies(model, 0, args.calls), latencies(model, args.n_envs, args.calls // 4)
    result = {
        "single_ms_median": float(np.median(single)),
        "single_ms_p99": float(np.percentile(single, 99)),
        f"batch_of_{args.n_envs}_ms_median": float(np.median(many)),
        "settings": {**vars(args), "torch": th.__version__, "machine": platform.processor() or platform.machine()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
