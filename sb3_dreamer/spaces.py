"""Gymnasium's spaces, translated for the networks; unsupported spaces are refused here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_dreamer.types import Spec


def spec_of(space: spaces.Space) -> Spec:
    """Translate one space (no Dict) for the networks.

    :raises ValueError: for a kind of space that has no encoder.
    """
    if 0 in (space.shape or ()):
        raise ValueError(f"{space} has a dimension of size 0: leave it out")
    if is_image_space(space):
        assert space.shape is not None
        return Spec("image", space.shape)
    if isinstance(space, spaces.Box):
        return Spec("vector", space.shape)
    if isinstance(space, spaces.Discrete):
        return Spec("discrete", (), (int(space.n),), (int(space.start),))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = np.broadcast_to(getattr(space, "start", 0), space.shape)
        return Spec("discrete", space.shape, tuple(map(int, space.nvec)), tuple(map(int, start)))
    if isinstance(space, spaces.MultiBinary):
        return Spec("binary", space.shape)
    raise ValueError(
        f"{space} is not supported: use Box, Discrete, flat MultiDiscrete, MultiBinary, or a flat Dict of these "
        "(gymnasium.wrappers.FlattenObservation turns other spaces into a Box)"
    )


def action_spec_of(space: spaces.Space) -> Spec:
    """Translate a space of actions: every Box is a vector of numbers, also one that might be an image.

    :raises ValueError: for a kind of space that has no encoder.
    """
    if isinstance(space, spaces.Box) and 0 not in space.shape:
        return Spec("vector", space.shape)
    try:
        return spec_of(space)
    except ValueError as error:
        raise ValueError(
            f"actions of {space} are not supported: use Box, Discrete, flat MultiDiscrete or MultiBinary, of at least "
            "one number (gymnasium.wrappers.TransformAction turns others into these)"
        ) from error


def observation_specs(space: spaces.Space) -> dict[str, Spec]:
    """Specs by key; a space that is no Dict has the single key "obs"."""
    if not (parts := parts_of(space)):
        raise ValueError("an empty Dict cannot be observed: give it at least one key")
    return {key: spec_of(sub) for key, sub in parts.items()}


def parts_of(space: spaces.Space) -> dict[str, spaces.Space]:
    """Spaces by key; one that is no Dict has the single key "obs"."""
    return space.spaces if isinstance(space, spaces.Dict) else {"obs": space}


def by_key(observation: Any) -> Any:
    """Parts of an observation by key; one that is no dict has the single key "obs"."""
    return observation if isinstance(observation, dict) else {"obs": observation}


def as_observation(space: spaces.Space, parts: Mapping[str, Any]) -> Any:
    """The inverse of :func:`by_key`: an observation of the space, or many."""
    return parts if isinstance(space, spaces.Dict) else parts["obs"]


def policy_for(space: spaces.Space) -> str:
    """The alias of the policy that reads observations of this space."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def check_action_bounds(space: spaces.Space) -> None:
    """Refuse a Box whose actions cannot be scaled to [-1, 1] and back.

    :raises ValueError: for bounds that are infinite, or so far apart that their distance is.
    """
    if isinstance(space, spaces.Box):
        low, high = float_bounds(space)
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(high - low))
        if len(bad):
            where = tuple(int(i) for i in bad[0])
            raise ValueError(
                f"actions need finite bounds, dimension {where} has [{low[where]:g}, {high[where]:g}]: give the action "
                "space of the environment the bounds that it works with, or wrap it in "
                "gymnasium.wrappers.RescaleAction or TransformAction"
            )


def check_counted_from_zero(space: spaces.Space) -> None:
    """Refuse discrete spaces that do not start at 0, from where SB3's algorithms, unlike Dreamer, count.

    :raises ValueError: for a space with a start, or a Dict with one.
    """
    for part in parts_of(space).values():
        if np.any(getattr(part, "start", 0)):
            raise ValueError(
                f"SB3's algorithms count from 0 and can neither act in nor observe {part}: wrap the environment in "
                "gymnasium.wrappers.TransformAction or TransformObservation so that it begins there"
            )


def check_actions_of_sb3(space: spaces.Space) -> None:
    """Refuse actions that SB3's algorithms cannot take.

    :raises ValueError: as :func:`check_counted_from_zero`, and for a Box of integers, of which they make fractions.
    """
    check_counted_from_zero(space)
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise ValueError(
            f"SB3's algorithms make fractions of the actions of {space}: wrap the environment in "
            "gymnasium.wrappers.TransformAction, whose action space has floats and which rounds them"
        )


def one_hot(choices: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Choices (..., n), counted from 0, as one-hot vectors (..., sum of classes) one after the other; -1 as zeros."""
    columns = zip(np.moveaxis(choices, -1, 0), classes, strict=True)
    return np.concatenate([column[..., None] == np.arange(k) for column, k in columns], -1, dtype=np.float32)


def into_space(space: spaces.Space, numbers: np.ndarray) -> np.ndarray:
    """Decoded numbers (..., *shape) as observations of one space: whole if they have to be, clipped, in its dtype."""
    if not isinstance(space, spaces.Box):
        return numbers.astype(space.dtype)
    if numbers.dtype.kind == "f" and space.dtype.kind != "f":
        numbers = np.rint(numbers)
    return np.clip(numbers, space.low, space.high).astype(space.dtype)


def decoded_observations(space: spaces.Space, decoded: Mapping[str, th.Tensor]) -> dict[str, np.ndarray]:
    """Output of the decoder (n, *shape) by key as observations of the space, see :func:`into_space`."""
    parts = parts_of(space)
    # integers stay integers: float32 rounds large ones; NumPy has no bfloat16
    numbers = {key: part.float() if part.is_floating_point() else part for key, part in decoded.items()}
    return {key: into_space(parts[key], part.cpu().numpy()) for key, part in numbers.items()}


def float_bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds in a float type that holds them; int8 could not hold their distance."""
    dtype = np.promote_types(space.dtype or np.float32, np.float32)
    return space.low.astype(dtype), space.high.astype(dtype)
