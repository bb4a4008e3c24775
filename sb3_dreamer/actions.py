"""Actions in three forms: the environment's, the replay's, and the networks'."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from gymnasium import spaces

from sb3_dreamer.spaces import action_spec_of, check_action_bounds, float_bounds, one_hot


class ActionCodec:
    """Translates the actions of a space.

    Encoded, as the networks read and write them, they are float32 vectors (n, A): numbers in [-1, 1] for a Box,
    concatenated one-hot vectors for choices, zeros and ones for bits.

    :param space: Box with finite bounds, Discrete, flat MultiDiscrete or MultiBinary.
    :raises ValueError: for other spaces.
    """

    def __init__(self, space: spaces.Space) -> None:
        check_action_bounds(space)
        self.space, self.spec = space, action_spec_of(space)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the space (n, *shape) -> encoded (n, A).

        :raises ValueError: for choices that the space does not have.
        """
        n = len(actions)
        if isinstance(self.space, spaces.Box):
            actions = self.scale(actions)
        elif self.spec.kind == "discrete":
            choices = np.asarray(actions).reshape(n, -1) - self.spec.start
            if ((choices < 0) | (choices >= self.spec.classes)).any():
                raise ValueError(f"{actions}: not all of them are in {self.space}")
            return one_hot(choices, self.spec.classes)
        return np.asarray(actions, np.float32).reshape(n, -1)

    def decode(self, encoded: np.ndarray) -> np.ndarray:
        """Encoded actions (n, A) -> actions of the space (n, *shape), clipped to its bounds."""
        if isinstance(self.space, spaces.Box):
            low, high = self._bounds
            actions = np.minimum(np.maximum(self.unscale(encoded.reshape(-1, *self.space.shape)), low), high)
            actions = actions if np.issubdtype(self.space.dtype, np.floating) else np.rint(actions)
            return actions.astype(self.space.dtype)
        if self.spec.kind == "discrete":
            ends = np.cumsum(self.spec.classes)[:-1]
            columns = [part.argmax(-1) for part in np.split(encoded, ends, -1)]
            encoded = np.stack(columns, -1) + self.spec.start
        assert self.space.shape is not None
        return encoded.reshape(-1, *self.space.shape).astype(self.space.dtype)

    def to_replay(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the space (n, *shape) as the replay stores them: those of a Box scaled, others as they are."""
        return self.scale(actions) if isinstance(self.space, spaces.Box) else actions

    def scale(self, actions: np.ndarray) -> np.ndarray:
        """From the bounds of the Box to [-1, 1]; -1 where they leave no choice."""
        low, high = self._bounds
        return 2.0 * ((actions - low) / np.where(high > low, high - low, 1)) - 1.0

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the bounds of the Box, in floats."""
        low, high = self._bounds
        return low + 0.5 * (scaled + 1.0) * (high - low)

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(self.space, spaces.Box):
            raise ValueError(f"only Box actions can be scaled, not {self.space}")
        return float_bounds(self.space)
