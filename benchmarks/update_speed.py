"""Seconds per update of everything (world model, actor, critic), on random data. Prints one JSON line.

python -m benchmarks.update_speed --model-size size1m --obs-dim 17 --act-dim 6 --threads 2 --updates 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th

from benchmarks.rows import machine
from sb3_dreamer import Dreamer
from sb3_dreamer.behavior.actor_critic import actor_loss, advantages, critic_loss
from sb3_dreamer.behavior.imagination import draw_starts, imagine, lambda_returns
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.types import Batch, Dream


class Shape(gym.Env[np.ndarray, np.ndarray]):
    """An environment with these widths; it is never stepped."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)


def random_batch(model: Dreamer) -> Batch:
    """One batch of noise; one of eight sequences has an episode start."""
    b, t, device = model.batch_size, model.batch_length, model.device
    spec = model.policy.actions.spec
    first = th.zeros(b, t, dtype=th.bool, device=device)
    first[::8, t // 2] = True
    return Batch(
        obs={k: th.randn(b, t, *s.shape, device=device) for k, s in model.policy.world_model.decoder.specs.items()},
        prev_action=(th.rand(b, t, spec.width, device=device) * 2 - 1) * ~first[..., None],
        reward=th.randn(b, t, device=device),
        is_first=first,
        is_terminal=th.zeros_like(first),
        is_last=first.roll(-1, 1),
        start=th.zeros(b, model.policy.world_model.rssm.latent_width, device=device),
        index=np.zeros((b, 2), np.int64),
    )


def time_updates(model: Dreamer, updates: int, warmup: int) -> list[float]:
    """Seconds of each update, as ``Dreamer.train`` makes them: captured in a CUDA graph on a GPU."""
    batch, update = random_batch(model), model._captured_update()
    seconds = []
    for _ in range(warmup + updates):
        start = time.perf_counter()
        update(batch)
        if model.device.type == "cuda":
            th.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def cpu_milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """Least processor time of several runs: on a busy machine, wall-clock time says little."""
    times = []
    for _ in range(repeats + 2):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return min(times[2:])


def time_parts(model: Dreamer, repeats: int) -> dict[str, float]:
    """Processor milliseconds of the parts of an update."""
    policy, batch = model.policy, random_batch(model)
    world_model = policy.world_model
    rssm, embed = world_model.rssm, world_model.embed(batch.obs).detach()
    precision = partial(mixed_precision, model.device)

    def scan() -> None:
        states, post = rssm.observe(embed, batch.prev_action, batch.is_first, rssm.restore(batch.start))
        (states.features.sum() + post.sum()).backward()

    def learn_model() -> None:
        with precision():
            losses, _, _ = world_model.loss(batch)
        th.stack([loss.mean() for loss in losses.values()]).sum().backward()

    def dream() -> Dream:
        with precision():
            return imagine(world_model, policy.actor, starts, model.imagination_horizon)

    def learn_behavior() -> None:
        with precision():
            logits = policy.critic(dreamt.features)
            values = policy.critic.mean(logits)
            returns = lambda_returns(dreamt.reward, dreamt.discount, values, model.gae_lambda)
            advantage = advantages(dreamt, returns, values, policy.return_scale.scale, model.center_advantage)
            loss, _ = actor_loss(policy.actor, dreamt, advantage, model._ent_coef)
            loss = loss + critic_loss(policy.critic, dreamt, logits, returns)
        loss.backward()

    states = world_model.observe(batch)[0].detach().flatten()
    starts = states[draw_starts(batch.reward.numel(), model.imagination_starts, model.device)]
    dreamt = dream()
    parts: dict[str, Callable[[], Any]] = {"scan": scan, "world_model": learn_model, "imagination": dream}
    parts |= {"actor_and_critic": learn_behavior, "update": lambda: model.update(batch)}
    return {name: cpu_milliseconds(work, repeats) for name, work in parts.items()}


def main() -> None:
    """Read the settings, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="size1m")
    parser.add_argument("--rssm-type", default="gru")
    parser.add_argument("--obs-dim", type=int, default=17)
    parser.add_argument("--act-dim", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batch-length", type=int, default=64)
    parser.add_argument("--imagination-starts", type=int, help="default: that of Dreamer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--parts", action="store_true", help="processor milliseconds of the parts too")
    args = parser.parse_args()

    th.set_num_threads(args.threads)
    knobs: dict[str, Any] = {} if args.imagination_starts is None else {"imagination_starts": args.imagination_starts}
    model = Dreamer(
        "MlpPolicy",
        Shape(args.obs_dim, args.act_dim),
        model_size=args.model_size,
        rssm_type=args.rssm_type,
        batch_size=args.batch_size,
        batch_length=args.batch_length,
        device=args.device,
        seed=0,
        **knobs,
    )
    seconds = time_updates(model, args.updates, args.warmup)
    settings = {**vars(args), "imagination_starts": model.imagination_starts, "machine": machine()}
    if model.device.type == "cuda":
        settings["gpu"] = th.cuda.get_device_name(model.device)
    result: dict[str, Any] = {
        "seconds_per_update": statistics.median(seconds),
        "min": min(seconds),
        "settings": settings,
    }
    if args.parts:
        result["cpu_milliseconds"] = time_parts(model, args.updates)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
