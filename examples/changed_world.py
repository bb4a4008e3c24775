"""The world changes after training: how soon does the agent adapt, and how far does a new one get in as many steps?

python examples/changed_world.py --gravity 14
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dreamer import Dreamer


def mean_return(model: Any, gravity: float, episodes: int) -> float:
    """Mean return of deterministic episodes, the same starts for every agent."""
    env = Monitor(gym.make("Pendulum-v1", g=gravity))
    env.reset(seed=0)
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, return_episode_rewards=True)
    return float(np.mean(returns))


def main() -> None:
    """Train, change the gravity, continue; next to it an agent that begins there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gravity", type=float, default=14.0, help="after the change; 10 before")
    parser.add_argument("--before", type=int, default=5_000, help="steps before the change")
    parser.add_argument("--after", type=int, default=2_000, help="steps after it")
    parser.add_argument("--pieces", type=int, default=4, help="evaluations on the way")
    parser.add_argument("--episodes", type=int, default=20, help="of an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    trained = Dreamer("MlpPolicy", gym.make("Pendulum-v1", g=10.0), seed=args.seed)
    trained.learn(args.before, progress_bar=True)
    before = mean_return(trained, 10.0, args.episodes)
    changed = mean_return(trained, args.gravity, args.episodes)
    print(f"trained with gravity 10: {before:.0f}; with gravity {args.gravity:g}: {changed:.0f}")

    # Saved and loaded without its replay, the agent learns from the new world alone.
    trained.save("before_the_change.zip")
    adapted = Dreamer.load("before_the_change.zip", env=gym.make("Pendulum-v1", g=args.gravity))
    new = Dreamer("MlpPolicy", gym.make("Pendulum-v1", g=args.gravity), seed=args.seed + 1)
    for piece in range(1, args.pieces + 1):
        for model in (adapted, new):
            model.learn(args.after // args.pieces, reset_num_timesteps=False)
        there = [mean_return(model, args.gravity, args.episodes) for model in (adapted, new)]
        print(f"after {piece * args.after // args.pieces} steps there: {there[0]:.0f}, a new agent {there[1]:.0f}")


if __name__ == "__main__":
    main()
