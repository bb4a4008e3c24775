"""A small Dreamer and its environment."""

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

SMALL = dict(
    model_size="debug",
    buffer_size=2_000,
    batch_size=4,
    batch_length=8,
    learning_starts=50,
    train_ratio=3.2,
    imagination_starts=8,
    imagination_horizon=5,
    seed=0,
    device="cpu",
)


def pendulum(n_envs: int = 1, steps: int = 50) -> VecEnv:
    """Episodes of 50 steps, so that time limits occur."""
    return DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=steps)] * n_envs)
