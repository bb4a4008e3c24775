"""Whole episodes: writing recorded ones into a replay, and reading those of a replay back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sb3_dreamer.replay.buffer import SequenceReplayBuffer
from sb3_dreamer.replay.columns import FIRST, LAST, TERMINAL
from sb3_dreamer.types import Observation


class Transition(NamedTuple):
    """One step of an episode: ``action`` led from ``obs`` to ``next_obs``, by key, and to ``reward``.

    :param done: whether it is the last of the episode, for good or cut.
    """

    obs: dict[str, np.ndarray]
    next_obs: dict[str, np.ndarray]
    action: Any
    reward: Any
    done: bool


@dataclass
class Episode:
    """One episode, or the known part of one: L actions and the L + 1 observations around them.

    :param obs: key -> (L + 1, *shape), original, not normalized; a space that is no Dict has the single key "obs".
    :param action: (L, *shape), action t taken after seeing observation t; Box actions scaled to [-1, 1], or integers.
    :param reward: (L,), reward t came with observation t + 1; original, not normalized.
    :param terminal: whether it ended for good; otherwise it was cut: by a time limit, a reset, or the end of the data.
    """

    obs: dict[str, np.ndarray]
    action: np.ndarray
    reward: np.ndarray
    terminal: bool

    def __len__(self) -> int:
        return len(self.reward)

    def transitions(self) -> Iterator[Transition]:
        """The transitions, one after the other."""
        for t in range(len(self)):
            obs, next_obs = ({key: values[i] for key, values in self.obs.items()} for i in (t, t + 1))
            yield Transition(obs, next_obs, self.action[t], self.reward[t], done=t == len(self) - 1)

    def part(self, begin: int, end: int) -> Episode:
        """Actions ``begin`` to ``end`` (exclusive); cut, unless it reaches the end."""
        obs = {key: values[begin : end + 1] for key, values in self.obs.items()}
        return Episode(obs, self.action[begin:end], self.reward[begin:end], self.terminal and end == len(self))


def read_episodes(buffer: SequenceReplayBuffer, newest: int | None = None) -> Iterator[Episode]:
    """The episodes of a replay, one environment after the other, the oldest first.

    Incomplete episodes are included as far as they are known: if the beginning has been overwritten, from the oldest
    entry on; if the episode has not ended, up to the newest one. The last action of those has no outcome yet and is
    left out.

    :param newest: read at most this many of the newest entries, all environments together.
    """
    for env in range(buffer.n_envs):
        rows = buffer.stream(env, None if newest is None else newest // buffer.n_envs)
        if len(rows) == 0:
            continue
        flags = buffer.arrays["flags"][rows]
        begins = (flags & FIRST) != 0
        begins[1:] |= (flags[:-1] & LAST) != 0
        for part in np.split(rows, np.flatnonzero(begins)):
            if len(part) > 1:
                yield _decoded_episode(buffer, part)


def _decoded_episode(buffer: SequenceReplayBuffer, rows: np.ndarray) -> Episode:
    """The episode whose entries lie in these rows."""
    arrays, code = buffer.arrays, buffer.code
    action = arrays["action"][rows[:-1]]
    return Episode(
        obs={key: arrays[f"obs/{key}"][rows] for key in code.observation},
        action=code.action.from_rows(action).reshape(len(action), *(buffer.action_space.shape or ())),
        reward=arrays["reward"][rows[1:]],
        terminal=bool(arrays["flags"][rows[-1]] & TERMINAL),
    )


def split_transitions(
    obs: dict[str, np.ndarray], next_obs: dict[str, np.ndarray], done: np.ndarray
) -> list[np.ndarray]:
    """Which transitions belong to one episode: indices, split after a done and where the next one does not follow.

    :param obs: key -> (n, *shape), in the order of time, all from one environment.
    :param next_obs: key -> (n, *shape).
    :param done: (n,) bool, whether an episode ended with this transition.
    """
    same = [next_obs[key][:-1] == part[1:] for key, part in obs.items()]
    follows = [part.all(tuple(range(1, part.ndim))) for part in same]
    return np.split(np.arange(len(done)), np.flatnonzero(done[:-1] | ~np.all(follows, 0)) + 1)


def encoded_episode(
    buffer: SequenceReplayBuffer, episode: Episode
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """An episode as the replay stores it: its entries (L, ...), and the final one after the last action (1, ...).

    :param buffer: the replay; it is not changed.
    :param episode: with the spaces of the replay.
    :raises ValueError: for NaN, infinity, values out of range and wrong shapes.
    :raises TypeError: for anything but an episode.
    """
    if not isinstance(episode, Episode):
        raise TypeError(f"{type(episode).__name__} is no episode: give sb3_dreamer.replay.Episode objects")
    length, code = len(episode), buffer.code
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
    """Append an episode to the environment with the fewest entries so far. Everything is checked before it is written.

    The stream of that environment is cut: reset it before its next step is added.

    :param buffer: the replay.
    :param episode: with the spaces of the replay.
    :raises ValueError: as :func:`encoded_episode`.
    """
    entries, final = encoded_episode(buffer, episode)
    buffer.append_episode(entries, final)


def _at(obs: Observation, index: int | slice) -> Observation:
    return {key: part[index] for key, part in obs.items()} if isinstance(obs, dict) else obs[index]
