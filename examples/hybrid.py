"""A few thousand steps with Dreamer, then SAC continues from there; and back: a new Dreamer learns from that SAC.

python examples/hybrid.py --steps 3000
"""

import argparse
from typing import Any

import gymnasium as gym
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer import Dreamer


def report(what: str, model: Any, env_id: str) -> None:
    """Print the return of ten deterministic episodes."""
    mean, std = evaluate_policy(model, Monitor(gym.make(env_id)), n_eval_episodes=10)
    print(f"{what}: {mean:.0f} +- {std:.0f}")


def main() -> None:
    """Train, hand over, train, hand back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=3_000, help="of each of the two")
    parser.add_argument(
        "--updates", type=int, default=20_000, help="minibatches from which SAC learns Dreamer's policy"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    dreamer = Dreamer("MlpPolicy", args.env, seed=args.seed).learn(args.steps, progress_bar=True)
    report("Dreamer", dreamer, args.env)

    critic_updates = 3 * args.updates // 10
    sac = dreamer.to_model_free(SAC, updates=args.updates, critic_updates=critic_updates, progress_bar=True)
    report("SAC, just handed over", sac, args.env)
    sac.learn(args.steps, reset_num_timesteps=False, progress_bar=True)
    report("SAC", sac, args.env)
    sac.save("sac_after_dreamer.zip")  # a plain SB3 file

    pupil = Dreamer("MlpPolicy", args.env, seed=args.seed + 1)
    pupil.warm_start(sac, n_steps=max(args.steps // 3, pupil.batch_length), progress_bar=True)
    report("a new Dreamer that watched it", pupil, args.env)


if __name__ == "__main__":
    main()
