"""Does the world model know the effects of actions? Real and dreamed returns of the same actions in the same states.

python -m benchmarks.action_effects RUN            RUN: the folder of an agent of `benchmarks.learn` on a MuJoCo task

At some moments of the agent's own deterministic episodes the simulator is set back, once for each candidate: the
actions that follow there, shifted by a random constant. The real return of the next steps is compared with the one that
the model dreams from its state at that moment. One JSON line for each width of the shifts:

correlation     of real and dreamed returns over the candidates of a moment, mean over the moments, standard error
std             of the returns over the candidates of a moment, mean over the moments: how much actions matter
mean            of all returns
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from benchmarks.envs import make_env
from benchmarks.runs import trained
from sb3_dreamer import Dreamer
from sb3_dreamer.behavior.imagination import imagine_actions, lambda_returns

EPISODES, STEPS = 20, 400  # of each, at most
MOMENTS, LEAST_STEP = 4, 5  # moments in an episode, none before this step
SAMPLES = 16  # dreams of each candidate


@dataclass
class Moment:
    """Where candidates start.

    :param simulator: positions, velocities and the warm start of the solver.
    :param packed: (1, L) the model's state.
    :param actions: (H, A) encoded, what the agent did next.
    """

    simulator: tuple[np.ndarray, ...]
    packed: np.ndarray
    actions: np.ndarray


def moments(model: Dreamer, env: Any, horizon: int, rng: np.random.Generator) -> list[Moment]:
    """Some moments of each of the agent's episodes; beyond the end, its last action is repeated."""
    return [moment for seed in range(EPISODES) for moment in _moments_of(model, env, horizon, rng, seed)]


def _moments_of(model: Dreamer, env: Any, horizon: int, rng: np.random.Generator, seed: int) -> list[Moment]:
    data = env.unwrapped.data
    obs, _ = env.reset(seed=seed)
    state, start, ended = None, np.array([True]), False
    simulators: list[tuple[np.ndarray, ...]] = []
    packed: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    while not ended and len(actions) < STEPS:
        simulators.append((data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy()))
        action, state = model.predict(obs, state, start, deterministic=True)
        assert state is not None
        packed.append(state[0])
        actions.append(model.policy.actions.encode(action[None])[0])
        obs, _, ended, _, _ = env.step(action)
        start = np.array([False])
    steps = np.arange(LEAST_STEP, len(actions))
    chosen = rng.choice(steps, min(MOMENTS, len(steps)), replace=False)
    following = np.minimum(chosen[:, None] + np.arange(horizon), len(actions) - 1)
    encoded = np.stack(actions)
    return [Moment(simulators[t], packed[t], encoded[f]) for t, f in zip(chosen, following, strict=True)]


def real_return(env: Any, moment: Moment, actions: np.ndarray, gamma: float) -> float:
    """Discounted return of actions (H, A), in the units of the space, from that moment on."""
    simulator = env.unwrapped
    positions, velocities, warm = moment.simulator
    simulator.set_state(positions, velocities)
    simulator.data.qacc_warmstart[:] = warm
    total, weight = 0.0, 1.0
    for action in actions:
        _, reward, terminated, _, _ = simulator.step(action)
        total, weight = total + weight * reward, weight * gamma
        if terminated:
            break
    return total


@th.no_grad()
def dreamed_returns(model: Dreamer, moment: Moment, candidates: np.ndarray) -> np.ndarray:
    """Return that the model expects of candidates (K, H, A): (K,), means over samples."""
    world_model = model.policy.world_model
    actions = th.as_tensor(candidates).repeat_interleave(SAMPLES, 0)
    start = world_model.rssm.unpack(th.as_tensor(moment.packed).repeat(len(actions), 1))
    dream = imagine_actions(world_model, start, actions)
    returns = lambda_returns(dream.reward, dream.discount, th.zeros_like(dream.reward), gae_lambda=1.0)[:, 0]
    return returns.view(-1, SAMPLES).mean(1).numpy()


def compare(model: Dreamer, env: Any, places: list[Moment], width: float, n: int, rng: np.random.Generator) -> dict:
    """Statistics of the real and dreamed returns of ``n`` candidates at each moment."""
    rows = []
    for moment in places:
        shifts = width * rng.standard_normal((n, 1, moment.actions.shape[1]))
        candidates = np.clip(moment.actions + shifts, -1, 1).astype(np.float32)
        real = [real_return(env, moment, model.policy.actions.decode(c), model.gamma) for c in candidates]
        dreamed = dreamed_returns(model, moment, candidates)
        rows.append((np.corrcoef(real, dreamed)[0, 1], np.std(real), np.std(dreamed), np.mean(real), np.mean(dreamed)))
    names = "correlation", "std_real", "std_dreamed", "mean_real", "mean_dreamed"
    means = dict(zip(names, np.mean(rows, 0).round(3).tolist(), strict=True))
    error = np.std([row[0] for row in rows]) / len(rows) ** 0.5
    return {"width": width, **means, "standard_error": round(float(error), 3), "moments": len(rows)}


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that benchmarks.learn wrote")
    parser.add_argument(
        "--widths", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="of the shifts, in half ranges"
    )
    parser.add_argument("--candidates", type=int, default=12, help="at each moment")
    parser.add_argument("--horizon", type=int, default=15, help="steps")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    model, last = trained(args.run)
    env = make_env(last["env"])
    if not hasattr(env.unwrapped, "set_state"):
        parser.error(f"{last['env']} cannot be set back: this works with Gymnasium's MuJoCo tasks")
    rng = np.random.default_rng(0)
    places = moments(model, env, args.horizon, rng)
    for width in args.widths:
        about = {name: last[name] for name in ("env", "seed", "step", "commit")}
        print(json.dumps(about | compare(model, env, places, width, args.candidates, rng)), flush=True)


if __name__ == "__main__":
    main()
