"""Train a world model on Pendulum from random actions, without a policy, and look at its predictions.

python examples/pendulum_world_model.py --updates 1500 --out dreams/pendulum
"""

import argparse
from pathlib import Path

import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_dreamer import Dreamer
from sb3_dreamer.dreamer import total_loss
from sb3_dreamer.dreams import collect, horizon_errors, open_loop, write_report

ENV_ID = "Pendulum-v1"
CONTEXT, HORIZON = 14, 50
WIDTHS = dict(deter=256, hidden=64, units=64, stoch=16, classes=8)  # a small model is enough


def main() -> None:
    """Collect, train, dream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4_000, help="environment steps with random actions")
    parser.add_argument("--updates", type=int, default=1_500, help="gradient steps of the world model")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="initial value; falls to zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("dreams/pendulum"))
    args = parser.parse_args()

    env = make_vec_env(ENV_ID, n_envs=5, seed=args.seed)
    model = Dreamer("MlpPolicy", env, batch_length=CONTEXT + HORIZON, policy_kwargs=WIDTHS, seed=args.seed)
    data, _ = collect(model, env, args.steps // 5, model.batch_length, random_actions=True)
    fresh, _ = collect(model, env, 400, model.batch_length, random_actions=True)  # never trained on

    world_model = model.policy.world_model
    optimizer = th.optim.Adam(world_model.parameters(), args.learning_rate)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.updates)
    for update in range(1, args.updates + 1):
        batch = data.sample(model.batch_size)
        losses, states, _ = world_model.loss(batch)
        data.update_latents(batch.index, world_model.rssm.latents(states.detach()))  # initial states of sequences
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
        schedule.step()
        if update % 250 == 0 or update == args.updates:
            error = horizon_errors(open_loop(model.policy, fresh.peek(30), CONTEXT))["obs"]
            print(
                f"{update} updates: error over {HORIZON} steps is {error.ratio():.2f} times that of persistence",
                flush=True,
            )

    page = write_report(model, fresh.peek(30), args.out / "index.html", "A world model of Pendulum", context=CONTEXT)
    print(f"written: {page}")


if __name__ == "__main__":
    main()
