"""Environments by name, for the scripts in this folder.

Any Gymnasium id          that environment
dmc/<domain>-<task>       DeepMind Control through Shimmy: one float32 vector, every action repeated twice
<name>-no-velocity        Pendulum and CartPole without their velocities: a policy needs memory
Humanoid-45               Humanoid-v4, only its 45 positions and velocities: they determine its state
CartPole-pixels           CartPole as small gray images, one at a time: a policy needs memory too
Recall, Recall-30         a number seen once must be recalled 2 to 40, or 30 to 40, steps later: needs only memory
HalfCheetah-uphill        HalfCheetah-v4 on ground that rises by 15 degrees
HalfCheetah-lame          HalfCheetah-v4 whose front thigh has no motor
repeat-<n>/<name>         any of these, every action repeated n times, the rewards summed
"""

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import AddRenderObservation, FlattenObservation, RepeatAction, TransformObservation

DMC_PREFIX = "dmc/"
DMC_ACTION_REPEAT = 2
REPEATED = re.compile(r"repeat-([1-9]\d*)/(.+)")

# name -> (Gymnasium id, the visible entries of the observation)
PARTLY_OBSERVED = {
    "Pendulum-no-velocity": ("Pendulum-v1", [0, 1]),
    "CartPole-no-velocity": ("CartPole-v1", [0, 2]),
    "Humanoid-45": ("Humanoid-v4", list(range(45))),
}
CARTPOLE_ROWS = slice(150, 330)  # of the 400 rows of the rendered image: the track and the pole
CARTPOLE_PIXELS = (36, 60)
RECALL_WAITS = {"Recall": (2, 40), "Recall-30": (30, 40)}
UPHILL = np.deg2rad(15)
FRONT_THIGH = 3  # number of its motor


def make_env(name: str) -> gym.Env:
    """Build the environment of that name.

    :param name: see the top of this file
    """
    if repeated := REPEATED.fullmatch(name):
        return RepeatAction(make_env(repeated[2]), int(repeated[1]))
    if name.startswith(DMC_PREFIX):
        return _dm_control(name.removeprefix(DMC_PREFIX))
    if name in PARTLY_OBSERVED:
        return _partly_observed(*PARTLY_OBSERVED[name])
    if name == "CartPole-pixels":
        return _cartpole_pixels()
    if name in RECALL_WAITS:
        return Recall(*RECALL_WAITS[name])
    if name in CHANGED_BODIES:
        return _changed_body(*CHANGED_BODIES[name])
    return gym.make(name)


def action_repeat(name: str) -> int:
    """Simulator steps per decision of the agent, by which published results count."""
    if repeated := REPEATED.fullmatch(name):
        return int(repeated[1]) * action_repeat(repeated[2])
    return DMC_ACTION_REPEAT if name.startswith(DMC_PREFIX) else 1


def _dm_control(task: str) -> gym.Env:
    """Its episodes end at a time limit with discount 1, which Shimmy reports as truncation, not as termination."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a display, importing dm_control warns of it
        import shimmy
    gym.register_envs(shimmy)
    env = FlattenObservation(gym.make(f"dm_control/{task}-v0"))
    vector = spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    return RepeatAction(TransformObservation(env, np.float32, vector), DMC_ACTION_REPEAT)


def _partly_observed(env_id: str, kept: list[int]) -> gym.Env:
    env = gym.make(env_id)
    full = env.observation_space
    assert isinstance(full, spaces.Box)
    visible = spaces.Box(full.low[kept], full.high[kept], dtype=full.dtype.type)
    return TransformObservation(env, partial(np.take, indices=kept), visible)


def _cartpole_pixels() -> gym.Env:
    env = AddRenderObservation(gym.make("CartPole-v1", render_mode="rgb_array"))
    return TransformObservation(env, _small_and_gray, spaces.Box(0, 255, (*CARTPOLE_PIXELS, 1), np.uint8))


def _small_and_gray(image: np.ndarray) -> np.ndarray:
    """(400, 600, 3) -> (36, 60, 1): means over blocks of 5 x 10 pixels and their colors."""
    rows, columns = CARTPOLE_PIXELS
    blocks = image[CARTPOLE_ROWS].reshape(rows, 5, columns, 10, 3)
    return blocks.mean((1, 3, 4)).astype(np.uint8)[..., None]


def _changed_body(env_id: str, change: Callable[[Any], None]) -> gym.Env:
    env: Any = gym.make(env_id)
    change(env.unwrapped.model)
    return env


def _rise(mujoco_model: Any) -> None:
    """Tilt gravity backwards, which is equivalent to a slope."""
    mujoco_model.opt.gravity[:] = np.linalg.norm(mujoco_model.opt.gravity) * np.array(
        [-np.sin(UPHILL), 0, -np.cos(UPHILL)]
    )


def _lame(mujoco_model: Any) -> None:
    mujoco_model.actuator_gear[FRONT_THIGH] = 0


CHANGED_BODIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "HalfCheetah-uphill": ("HalfCheetah-v4", _rise),
    "HalfCheetah-lame": ("HalfCheetah-v4", _lame),
}


class Recall(gym.Env[np.ndarray, np.int64]):
    """A number, +10 or -10, is seen once; after a wait, whose end is visible, its sign must be recalled ten times.

    Observation (number or 0, whether answers count now). An answer that counts has reward -1 if wrong, else 2 for +10
    and 1 for -10: with equal rewards, neither number nor action alone would predict anything about the reward, and
    learning would be hard to start. The tenth answer ends the episode; until answers count, actions have no effect.
    Return with memory: 15 on average, without: 5. After the T-maze of Bakker, "Reinforcement learning with long
    short-term memory", NeurIPS 2001.

    :param shortest: wait, in steps.
    :param longest: wait, in steps; drawn evenly between the two.
    """

    ANSWERS = 10

    def __init__(self, shortest: int, longest: int) -> None:
        self.observation_space = spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.waits = range(shortest, longest + 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The only observation that contains the number."""
        super().reset(seed=seed)
        self.answer = int(self.np_random.integers(2))
        self.wait = int(self.np_random.choice(self.waits))
        return np.array([20 * self.answer - 10, 0], np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Wait, or answer."""
        reward = 0.0
        if self.wait <= 0:
            reward = 1.0 + self.answer if int(action) == self.answer else -1.0
        self.wait -= 1
        return np.array([0, self.wait <= 0], np.float32), reward, self.wait == -self.ANSWERS, False, {}
