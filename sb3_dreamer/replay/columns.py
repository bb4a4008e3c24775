"""What an entry consists of: one column per quantity. A column checks its input before anything is written.

The spaces determine shape and dtype::

    space           observation column            action column -> for the model (A floats)
    Box, floats     its shape, float32 (or 16)    (A,) float32 in [-1, 1] -> as stored
    Box, integers   its shape and dtype           (A,) float32 in [-1, 1] -> as stored
    Discrete        (), smallest integer          (1,) integer            -> one-hot
    MultiDiscrete   its shape, smallest integer   (n,) integers           -> one-hot vectors, one after the other
    MultiBinary     its shape, int8               (n,) int8               -> zeros and ones
    Dict            one column per key            -
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dreamer.spaces import one_hot

FIRST, LAST, TERMINAL = 1, 2, 4  # bits of the column "flags"
ACTION_LIMIT = 1.001  # scaled actions, with room for rounding


@dataclass(frozen=True)
class Column:
    """One quantity of the entries.

    :param label: its name in messages.
    :param shape: of one entry.
    :param dtype: of storage.
    :param low: smallest value that may be stored, scalar or one per element; NaN never passes.
    :param high: largest value that may be stored.
    :param aliases: other shapes of one entry that are accepted.
    :param takes_all: whether every value of ``dtype`` may be stored, so that equal dtypes need no check.
    """

    label: str
    shape: tuple[int, ...]
    dtype: np.dtype
    low: Any
    high: Any
    aliases: tuple[tuple[int, ...], ...] = ()
    takes_all: bool = False

    def cast(self, value: Any, envs: np.ndarray, prefix: str = "") -> np.ndarray:
        """Check the values of some environments and convert them to the shape and dtype of storage.

        :param value: (n, *shape), one row per environment.
        :param envs: (n,) the numbers of these environments, or strings that name the rows in messages.
        :param prefix: put before the label in messages.
        :return: (n, *shape) in the dtype of storage.
        :raises ValueError: for another shape, NaN, infinity and values out of range.
        """
        array = np.asarray(value)
        wanted = (len(envs), *self.shape)
        if array.shape != wanted:
            if array.shape[:1] != wanted[:1] or array.shape[1:] not in self.aliases:
                raise ValueError(f"{prefix}{self.label} has shape {array.shape}, expected {wanted}")
            array = array.reshape(wanted)
        if self.takes_all and array.dtype == self.dtype:
            return array
        if array.dtype.kind == "f" and self.dtype.kind != "f":
            array = np.rint(array)  # integers that a normalizer scaled and scaled back
        good = (array >= self.low) & (array <= self.high)
        if not good.all():
            self._refuse(array, good, envs, prefix)
        return array.astype(self.dtype, copy=False)

    def _refuse(self, array: np.ndarray, good: np.ndarray, envs: np.ndarray, prefix: str) -> None:
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        element = f" at {where[1:]}" if len(where) > 1 else ""
        low, high = (np.broadcast_to(bound, array.shape)[where] for bound in (self.low, self.high))
        expected = f"numbers within [{low:g}, {high:g}]" if np.isfinite(array[where]) else "finite numbers"
        row = envs[where[0]]
        of = row if isinstance(row, str) else f"env {row}"
        raise ValueError(f"{prefix}{self.label} of {of} holds {array[where]}{element}, expected {expected}")


def float_column(label: str, shape: tuple[int, ...] = (), dtype: Any = np.float32) -> Column:
    """Finite floats."""
    limit = float(np.finfo(dtype).max)
    return Column(label, shape, np.dtype(dtype), -limit, limit)


def integer_column(label: str, shape: tuple[int, ...], low: Any, high: Any, *, no_action: bool = False) -> Column:
    """Integers within [low, high], in the smallest signed dtype that holds them.

    :param no_action: whether -1 must fit too; it stands for "no action".
    """
    least, most = min(int(np.min(low)), -1 if no_action else 0), int(np.max(high))
    kinds = (np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
    dtype = next(kind.dtype for kind in kinds if kind.min <= least and most <= kind.max)
    return Column(label, shape, dtype, low, high, aliases=() if shape else ((1,),))


def observation_column(label: str, space: spaces.Space) -> Column:
    """The column of one observation space that is no Dict.

    :raises ValueError: for a kind of space that has no column.
    """
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return float_column(label, space.shape, np.float16 if space.dtype == np.float16 else np.float32)
    if isinstance(space, spaces.Box):
        low, high = (False, True) if space.dtype == bool else (np.iinfo(space.dtype).min, np.iinfo(space.dtype).max)
        return Column(label, space.shape, np.dtype(space.dtype), low, high, takes_all=True)
    if isinstance(space, spaces.Discrete):
        return integer_column(label, (), int(space.start), int(space.start + space.n - 1))
    if isinstance(space, spaces.MultiDiscrete):
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)))
        return integer_column(label, space.shape, start, start + space.nvec - 1)
    if isinstance(space, spaces.MultiBinary):
        return integer_column(label, space.shape, 0, 1)
    raise ValueError(
        f"{label}: {space} is not supported by the replay, "
        "use Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of these"
    )


def observation_columns(space: spaces.Space) -> dict[str, Column]:
    """Columns by key of the observation; a space that is no Dict has the single key "obs"."""
    if isinstance(space, spaces.Dict):
        return {key: observation_column(f"observation {key!r}", sub) for key, sub in space.spaces.items()}
    return {"obs": observation_column("observation", space)}


class StoredActions:
    """How actions are stored (compactly), and converted for the model (to floats).

    :param space: Box, Discrete, MultiDiscrete or MultiBinary.
    :raises ValueError: for another space.
    """

    def __init__(self, space: spaces.Space) -> None:
        self.classes: tuple[int, ...] = ()  # of each integer, for one-hot vectors
        if isinstance(space, spaces.Box):
            flat = (prod(space.shape),)
            aliases = (space.shape,)
            self.column = Column("action", flat, np.dtype(np.float32), -ACTION_LIMIT, ACTION_LIMIT, aliases)
        elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            nvec = np.atleast_1d(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            start = np.broadcast_to(getattr(space, "start", 0), nvec.shape).flatten()
            self.classes = tuple(int(n) for n in nvec.flatten())
            high = start + nvec.flatten() - 1
            column = integer_column("action", (nvec.size,), start, np.maximum(high, high - start), no_action=True)
            self.column = replace(column, high=high, aliases=(space.shape or (),))  # both n and n - start fit
            self._start = start
        elif isinstance(space, spaces.MultiBinary):
            self.column = replace(integer_column("action", (prod(space.shape),), 0, 1), aliases=(space.shape,))
        else:
            raise ValueError(f"action space {space} is not supported, use Box, Discrete, MultiDiscrete or MultiBinary")
        self.width = sum(self.classes) or prod(self.column.shape)

    @property
    def no_action(self) -> int:
        """The stored value that the model sees as zeros."""
        return -1 if self.classes else 0

    def to_rows(self, action: Any, envs: np.ndarray) -> np.ndarray:
        """(n, *space.shape) scaled floats or integers -> (n, *column.shape) as stored, after a check."""
        stored = self.column.cast(action, envs)
        return (stored - self._start).astype(stored.dtype) if self.classes else stored

    def from_rows(self, stored: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`to_rows`: (n, *column.shape) as stored -> (n, *column.shape) scaled floats or integers."""
        return (stored + self._start).astype(stored.dtype) if self.classes else stored

    def to_model(self, stored: np.ndarray) -> np.ndarray:
        """(..., *column.shape) as stored -> (..., A) float32."""
        return one_hot(stored, self.classes) if self.classes else stored.astype(np.float32, copy=False)


class EntryCode:
    """How whole entries are stored: column name -> (n, *shape) for n environments. Nothing is written here.

    :param observation_space: any that ``observation_columns`` supports.
    :param action_space: any that ``StoredActions`` supports.
    :param latent_size: width L of the latents, 0 for none.
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, latent_size: int) -> None:
        self.is_dict = isinstance(observation_space, spaces.Dict)
        self.observation = observation_columns(observation_space)
        self.action = StoredActions(action_space)
        self.reward = float_column("reward")
        self.latent = float_column("latent", (latent_size,), np.float16) if latent_size else None

    def columns(self) -> dict[str, Column]:
        """All columns by name."""
        columns = {f"obs/{key}": column for key, column in self.observation.items()}
        columns |= {"action": self.action.column, "reward": self.reward}
        columns["flags"] = Column("flags", (), np.dtype(np.uint8), 0, FIRST | LAST | TERMINAL)
        return columns if self.latent is None else {**columns, "latent": self.latent}

    def encode(self, obs: Any, action: Any, latent: Any, envs: np.ndarray) -> dict[str, np.ndarray]:
        """Check and convert one entry of each environment; reward and flags are left to the caller.

        :param obs: (n, *shape), by key for Dict spaces.
        :param action: (n, *shape) scaled floats or integers.
        :param latent: (n, L) floats, or None for zeros.
        :param envs: (n,) numbers of the environments.
        :raises ValueError: for values that a column refuses.
        """
        entry = self.encode_observation(obs, envs)
        entry["action"] = self.action.to_rows(action, envs)
        if self.latent is not None:
            no_latent = np.zeros((len(envs), *self.latent.shape), np.float16)
            entry["latent"] = no_latent if latent is None else self.latent.cast(latent, envs)
        return entry

    def encode_final(self, infos: list[dict[str, Any]], reward: np.ndarray, envs: np.ndarray) -> dict[str, np.ndarray]:
        """Check and convert the final entries of episodes, with reward and flags, but no action and latent.

        :param infos: of all environments, with "terminal_observation" and "TimeLimit.truncated".
        :param reward: (n_envs,) of all environments.
        :param envs: (n,) numbers of the environments where an episode ended.
        :raises ValueError: for values that a column refuses, and for a missing terminal observation.
        """
        missing = [int(env) for env in envs if infos[env].get("terminal_observation") is None]
        if missing:
            raise ValueError(f"done without infos[i]['terminal_observation'] for i in {missing}, use an SB3 VecEnv")
        last = [infos[env]["terminal_observation"] for env in envs]
        if self.is_dict:
            obs: Any = {key: np.stack([parts[key] for parts in last]) for key in self.observation}
        else:
            obs = np.stack(last)
        entry = self.encode_observation(obs, envs, "terminal ")
        time_limit = np.array([bool(infos[env].get("TimeLimit.truncated", False)) for env in envs])
        entry["action"] = np.full(
            (len(envs), *self.action.column.shape), self.action.no_action, self.action.column.dtype
        )
        entry["reward"] = reward[envs]
        entry["flags"] = np.where(time_limit, LAST, LAST | TERMINAL).astype(np.uint8)
        if self.latent is not None:
            entry["latent"] = np.zeros((len(envs), *self.latent.shape), np.float16)
        return entry

    def encode_observation(self, obs: Any, envs: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
        """Check and convert observations alone.

        :param obs: (n, *shape), by key for Dict spaces.
        :param envs: (n,) numbers of the environments.
        :param prefix: put before the labels in messages.
        :raises ValueError: for values that a column refuses.
        """
        parts = obs if self.is_dict else {"obs": obs}
        return {f"obs/{key}": column.cast(parts[key], envs, prefix) for key, column in self.observation.items()}


def to_device(array: np.ndarray, device: th.device) -> th.Tensor:
    """A copy on a device, float16 as float32; the copy to a GPU is asynchronous."""
    tensor = th.from_numpy(array)
    if tensor.dtype == th.float16:
        tensor = tensor.float()
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
