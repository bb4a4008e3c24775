"""Whole episodes, into a replay and out of it: for data that somebody else recorded, and to hand our own on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_dreamer.replay.buffer import SequenceReplayBuffer
from sb3_dreamer.replay.columns import FIRST, LAST, TERMINAL
from sb3_dreamer.types import Observation


@dataclass
class Episode:
    """One episode, or the part of one that is known: L actions and the L + 1 observations around them.

    :param obs: key -> (L + 1, *shape), original, not normalised; a space that is no Dict has the single key "obs".
    :param action: (L, *shape), action t taken after seeing observation t; Box actions scaled to [-1, 1], or integers.
    :param reward: (L,), reward t came with observation t + 1; original, not normalised.
    :param terminal: whether it ended for good; otherwise it was cut: by a time limit, a reset, or the end of the data.
    """

    obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminal: bool

    def __len__(self) -> int:
        return len(self.reward)

    def transitions(self) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any, Any, bool]]:
        """One after the other: observation and the next one by key, action, reward, and whether it is the last."""
        for t in range(len(self)):
            now, then = ({key: values[i] for key, values in self.obs.items()} for i in (t, t + 1))
            yield now, then, self.action[t], self.reward[t], t == len(self) - 1

    def part(self, begin: int, end: int) -> Episode:
        """Actions ``begin`` to ``end``, the latter not included; cut, unless it reaches the end."""
        obs = {key: values[begin : end + 1] for key, values in self.obs.items()}
        return Episode(obs, self.action[begin:end], self.reward[begin:end], self.terminal and end == len(self))


def read_episodes(buffer: SequenceReplayBuffer, newest: int | None = None) -> Iterator[Episode]:
    """The episodes of a replay, one environment after the other, the oldest first.

    What is not whole comes as far as it goes: where the beginning has been overwritten, from the oldest entry on;
    where the end is not known yet, to the newest one. Its last action has no outcome yet and is left out.

    :param newest: read at most this many of the newest entries, all environments together.
    """
    storage, rings = buffer._storage, buffer._rings
    if storage is None:
        return
    oldest_of = rings.oldest() if newest is None else np.maximum(rings.oldest(), rings.head - newest // buffer.n_envs)
    for env, (oldest, head) in enumerate(zip(oldest_of, rings.head, strict=True)):
        rows = rings.row(np.full(head - oldest, env), np.arange(oldest, head))
        flags = storage.arrays["flags"][rows]
        begins = (flags & FIRST) != 0
        begins[1:] |= (flags[:-1] & LAST) != 0
        for part in np.split(rows, np.flatnonzero(begins)):
            if len(part) > 1:
                yield _episode(buffer, storage.arrays, part)


def _episode(buffer: SequenceReplayBuffer, arrays: dict[str, np.ndarray], rows: np.ndarray) -> Episode:
    code = buffer._entries
    action = arrays["action"][rows[:-1]]
    return Episode(
        obs={key: arrays[f"obs/{key}"][rows] for key in code.observation},
        action=code.action.decode(action).reshape(len(action), *(buffer.action_space.shape or ())),
        reward=arrays["reward"][rows[1:]],
        terminal=bool(arrays["flags"][rows[-1]] & TERMINAL),
    )


def split_transitions(
    obs: dict[str, np.ndarray], next_obs: dict[str, np.ndarray], done: np.ndarray
) -> list[np.ndarray]:
    """Which transitions are of one episode: indices, cut where one is done or the next does not follow.

    :param obs: key -> (n, *shape), in the order of time, all of one environment.
    :param next_obs: key -> (n, *shape).
    :param done: (n,) bool, whether an episode ended with this transition.
    """
    same = [next_obs[key][:-1] == part[1:] for key, part in obs.items()]
    follows = [part.all(tuple(range(1, part.ndim))) for part in same]
    return np.split(np.arange(len(done)), np.flatnonzero(done[:-1] | ~np.all(follows, 0)) + 1)


def encoded_episode(
    buffer: SequenceReplayBuffer, episode: Episode
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """An episode as the replay would store it: its entries (L, .) and the one after the last action (1, .).

    :param buffer: the replay, which is only asked.
    :param episode: of its spaces.
    :raises ValueError: for NaN, infinity, values out of range and wrong shapes.
    :raises TypeError: for what is no episode.
    """
    if not isinstance(episode, Episode):
        raise TypeError(f"{type(episode).__name__} is no episode: give sb3_dreamer.replay.Episode objects")
    length, code = len(episode), buffer._entries
    lengths, wanted = {key: len(part) for key, part in episode.obs.items()}, dict.fromkeys(code.observation, length + 1)
    if length == 0 or lengths != wanted:
        raise ValueError(f"an episode of {length} rewards, at least one, has observations {wanted}, here {lengths}")
    steps = np.array([f"step {t}" for t in range(length)])
    obs = episode.obs if code.is_dict else episode.obs["obs"]
    entries = code.encode(_at(obs, slice(-1)), episode.action, None, steps)
    info = {"terminal_observation": _at(obs, -1), "TimeLimit.truncated": not episode.terminal}
    reward = code.reward.cast(episode.reward, steps)
    final = code.encode_final([info], reward[-1:], np.zeros(1, int))
    entries["reward"] = np.append(np.float32(0.0), reward[:-1])
    entries["flags"] = (np.arange(length) == 0) * np.uint8(FIRST)
    return entries, final


def write_episode(buffer: SequenceReplayBuffer, episode: Episode) -> None:
    """Append an episode to the environment that has seen least. Everything is checked before anything is written.

    The stream of that environment is cut: reset it before it goes on.

    :param buffer: the replay.
    :param episode: of its spaces.
    :raises ValueError: as :func:`encoded_episode`.
    """
    entries, final = encoded_episode(buffer, episode)
    env = np.array([buffer._rings.head.argmin()])
    storage = buffer._writable_storage()
    buffer._interrupt(env)
    buffer._mark_last(storage)
    for t in range(len(episode)):
        buffer._append(storage, env, {name: values[t : t + 1] for name, values in entries.items()}, new=False)
    buffer._append(storage, env, final, new=False)
    buffer._interrupt(env)


def _at(obs: Observation, index: int | slice) -> Observation:
    return {key: part[index] for key, part in obs.items()} if isinstance(obs, dict) else obs[index]
