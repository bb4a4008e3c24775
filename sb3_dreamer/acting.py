"""Base class and checks for policies that are built on a trained Dreamer."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.environments import sees_other_units


class ActsWithDreamer:
    """Base of policies that act in place of a Dreamer: same observations, same units, same recurrent state."""

    model: Dreamer

    @property
    def observation_space(self) -> spaces.Space:
        """Of the model."""
        return self.model.observation_space

    @property
    def action_space(self) -> spaces.Space:
        """Of the model."""
        return self.model.action_space

    @property
    def trained_on_normalized_obs(self) -> bool:
        """Whether the model needs the statistics of a VecNormalize."""
        return self.model.trained_on_normalized_obs

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """The statistics of the model, if it has any."""
        return self.model.get_vec_normalize_env()

    def with_action(self, memory: Any, taken: np.ndarray) -> Any:
        """The state that ``predict`` returned, for the actions (n, *shape) that were taken instead of its own."""
        return memory[0], self.model.policy.actions.encode(taken)


def require_dreamer(model: Any, who: str) -> None:
    """Refuse another algorithm where a world model is needed.

    :raises TypeError: naming what was given.
    """
    if not isinstance(model, Dreamer):
        raise TypeError(f"{who} uses the world model of a Dreamer, and {type(model).__name__} has none: give a Dreamer")


def require_same_units(model: Dreamer, env: VecEnv) -> None:
    """Refuse an environment whose observations have other units than those the model was trained on.

    :raises ValueError: with what to do.
    """
    if sees_other_units(model, unwrap_vec_normalize(env)):
        learned, given = ("with", "without") if model.trained_on_normalized_obs else ("without", "with")
        raise ValueError(
            f"the model has learned {learned} VecNormalize around its observations, and env is {given}: wrap env as "
            "the model's environment was, with the same statistics"
        )


def require_statistics(model: Dreamer, who: str, rewards: bool = False) -> None:
    """Refuse a model that was trained on normalized observations (``rewards``: or rewards) and has no VecNormalize.

    :raises ValueError: with what to do.
    :raises TypeError: for a model that is no Dreamer.
    """
    require_dreamer(model, who)
    needed = model.trained_with_vecnormalize if rewards else model.trained_on_normalized_obs
    if needed and model.get_vec_normalize_env() is None:
        raise ValueError(
            f"{who} needs the statistics of VecNormalize that this model has learned with: load it with its "
            "environment, load(path, env=VecNormalize.load(statistics, env))"
        )
