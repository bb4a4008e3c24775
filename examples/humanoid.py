"""Train Dreamer on Humanoid-v4 for a few minutes, save it, load it again and evaluate it.

python examples/humanoid.py --steps 20000
"""

import argparse
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer import Dreamer

ENV_ID = "Humanoid-v4"


def evaluate(model: Dreamer, episodes: int) -> str:
    """Return of deterministic episodes in a separate environment."""
    env = Monitor(gym.make(ENV_ID))
    mean, std = evaluate_policy(model, env, n_eval_episodes=episodes)
    env.close()
    return f"return {mean:.0f} +- {std:.0f} over {episodes} episodes"


def main() -> None:
    """Train, save, load, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3_000, help="environment steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/dreamer_humanoid.zip"))
    args = parser.parse_args()

    model = Dreamer("MlpPolicy", ENV_ID, seed=args.seed)
    model.learn(args.steps, progress_bar=True)
    model.save(args.out)
    print(f"saved to {args.out}")

    trained = Dreamer.load(args.out)
    print(f"after {args.steps} steps: {evaluate(trained, args.eval_episodes)}; random actions get about 120")


if __name__ == "__main__":
    main()
