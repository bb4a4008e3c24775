"""An environment whose future is known: one part for certain, the other in distribution."""

import gymnasium as gym
import numpy as np
import torch as th

from sb3_dreamer import Dreamer


class Dial(gym.Env[np.ndarray, np.int64]):
    """A hand that moves one of eight places to the left or right as the action says; and a spring that a coin kicks."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.spring, self.steps = int(self.np_random.integers(8)), 0.0, 0
        return self._observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.spring = 0.8 * self.spring + self.np_random.choice([-2.0, 2.0])
        self.place, self.steps = (self.place + (1 if action else -1)) % 8, self.steps + 1
        return self._observe(), float(self.place == 0), False, self.steps == 50, {}

    def _observe(self) -> np.ndarray:
        angle = self.place * np.pi / 4
        return np.array([np.cos(angle), np.sin(angle), self.spring], np.float32)


def train_world_model(model: Dreamer, batches: int) -> None:
    """Gradient steps of the world model alone, ever smaller ones: where it ends must not depend on the last few."""
    optimizer = th.optim.Adam(model.policy.world_model.parameters(), 3e-3)
    falling = th.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, batches)
    for _ in range(batches):
        losses, _, _ = model.policy.world_model.loss(model.replay_buffer.sample(model.batch_size))
        loss = th.stack([value.mean() * (0.1 if key == "rep" else 1.0) for key, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
