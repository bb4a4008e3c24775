"""Replay of sequences: every observation is stored once, and sequences are served with the latent to start from.

Time. ``add`` takes the transition of one ``env.step``. Its reward belongs to the *next* observation, so it waits
for the next entry; if the episode is done, the final entry is written in the same call::

    add call           1            2            3, done: its entry, and the final one       4
                       |            |            |                |                          |
    entry              0            1            2                3                          4 (next episode)
    obs                o_0          o_1          o_2              o_3, terminal_observation  o_0'
    reward             0            r_1          r_2              r_3                        0
    action             a_0          a_1          a_2              0                          a_0'
    is_first           1            0            0                0                          1
    is_last            0            0            0                1                          0
    is_terminal        0            0            0                unless it was a time limit 0
    latent             s_0          s_1          s_2              0                          s_0'

``rings`` shows how the entries of an environment are laid out in its ring.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.replay.columns import FIRST, LAST, TERMINAL, EntryCode, to_device
from sb3_dreamer.replay.latents import PendingLatents
from sb3_dreamer.replay.rings import Rings
from sb3_dreamer.replay.storage import DiskStorage, Storage, open_storage
from sb3_dreamer.types import Batch, Observation


class SequenceReplayBuffer:
    """Uniform replay over sequences, newest data first.

    Every ``sequence_length`` new entries of an environment are queued as a sequence. Up to half of a batch comes from
    that queue, newest first; the rest is uniform over all (environment, start). Sequences may contain ends of episodes.

    :param buffer_size: capacity in entries, all environments together. Memory is allocated at the first ``add``.
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of these.
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary.
    :param device: where sampled tensors go.
    :param n_envs: number of environments.
    :param sequence_length: entries T of a sequence.
    :param latent_size: width L of the latents, kept as float16; 0 for none.
    :param storage_path: folder for the entries, instead of memory. A folder that holds a replay is reopened and
        continued (``storage`` says what survives which failure); the next entry begins an episode.
    :raises ValueError: if ``buffer_size`` is too small for a sequence, or the folder has other spaces or sizes.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        *,
        sequence_length: int = 64,
        latent_size: int = 0,
        storage_path: str | Path | None = None,
    ) -> None:
        self.buffer_size, self.n_envs, self.rows = int(buffer_size), n_envs, int(buffer_size) // n_envs
        if self.rows < sequence_length + 1:
            raise ValueError(
                f"buffer_size={buffer_size} leaves {self.rows} entries to each of {n_envs} environments, a sequence of "
                f"{sequence_length} and the entry before it need {sequence_length + 1}: "
                f"use a buffer_size of at least {n_envs * (sequence_length + 1)}, or shorter sequences"
            )
        self.observation_space, self.action_space = observation_space, action_space
        self.device = get_device(device)
        self.sequence_length, self.latent_size = sequence_length, latent_size
        self.code = EntryCode(observation_space, action_space, latent_size)
        self._envs = np.arange(n_envs)
        self._pending_reward, self._next_is_first = np.zeros(n_envs, np.float32), np.ones(n_envs, bool)
        self._rings = Rings(n_envs, self.rows, sequence_length)
        self._pending_latents: PendingLatents | None = None
        self.storage_path = None if storage_path is None else Path(storage_path)
        self._storage: Storage | None = None
        if self.storage_path is not None and DiskStorage.exists(self.storage_path):
            self._storage = disk = self._open_storage()
            assert isinstance(disk, DiskStorage)
            self._rings.resume(disk.heads(), disk.oldest(disk.heads()))

    # -- writing ---------------------------------------------------------------------------------------------------

    def add(
        self,
        obs: Observation,
        next_obs: Observation,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
        latent: np.ndarray | None = None,
    ) -> None:
        """Store one step of all environments. Everything is checked before anything is written.

        :param obs: (n_envs, *shape), by key for Dict spaces; original, not normalized.
        :param next_obs: not read: it returns as the next ``obs``, or is in ``infos`` where an episode is done.
        :param action: (n_envs, *shape) taken after seeing ``obs``; Box actions scaled to [-1, 1], or integers.
        :param reward: (n_envs,) that came with ``next_obs``; original, not normalized.
        :param done: (n_envs,) whether the episode ended.
        :param infos: where done, with "terminal_observation", and "TimeLimit.truncated" if it was a time limit.
        :param latent: (n_envs, L) latents after seeing ``obs``; zeros if not given.
        :raises ValueError: for NaN, infinity, values out of range, wrong shapes and a missing terminal observation.
        """
        ended = np.flatnonzero(done)
        try:
            entry = self.code.encode(obs, action, latent, self._envs)
            rewards = self.code.reward.cast(reward, self._envs)
            final = self.code.encode_final(infos, rewards, ended) if ended.size else None
        except ValueError as error:
            kept = f"Nothing of this step was stored, the replay keeps its {self.size()} entries"
            raise ValueError(f"{error}. {kept}") from None
        storage = self._writable_storage()
        entry["reward"] = self._pending_reward
        entry["flags"] = self._next_is_first * np.uint8(FIRST)
        self._append(storage, self._envs, entry)
        self._pending_reward, self._next_is_first = rewards.copy(), np.zeros(self.n_envs, bool)
        if final is not None:
            self._append(storage, ended, final)
            self._interrupt(ended)

    def append_episode(self, entries: dict[str, np.ndarray], final: dict[str, np.ndarray]) -> None:
        """Append an encoded episode to the environment with the fewest entries so far; its stream is cut on both sides.

        :param entries: column name -> (L, *shape), see :func:`sb3_dreamer.replay.episodes.encoded_episode`.
        :param final: column name -> (1, *shape), the entry after the last action.
        """
        env = np.array([self._rings.head.argmin()])
        storage = self._writable_storage()
        self._interrupt(env)
        self._mark_newest(storage)
        for t in range(len(entries["flags"])):
            self._append(storage, env, {name: values[t : t + 1] for name, values in entries.items()}, new=False)
        self._append(storage, env, final, new=False)
        self._interrupt(env)

    def check(self, obs: Observation) -> None:
        """Refuse observations that could not be stored, before an action is chosen for them.

        :param obs: (n_envs, *shape), by key for Dict spaces; original, not normalized.
        :raises ValueError: for NaN, infinity, values out of range and wrong shapes.
        """
        self.code.encode_observation(obs, self._envs)

    def cut(self) -> None:
        """End the stream here: the next entries do not follow the newest ones.

        The newest entry of each environment becomes the last (not terminal) of its episode: for resets without a done.
        """
        self._interrupt(self._envs)
        if self._storage is not None and self._storage.writable:
            self._mark_newest(self._storage)

    def update_latents(self, index: np.ndarray, latents: th.Tensor) -> None:
        """Write refreshed latents back to sampled sequences, except to entries that were overwritten since.

        Latents from a GPU are written at the next call, or when the replay is saved: the host does not wait.

        :param index: (B, 2) the ``index`` of the batch.
        :param latents: (B, T, L) latents of its entries.
        :raises ValueError: for NaN.
        """
        if not self.latent_size:
            return
        self._write_pending_latents()
        self._pending_latents = PendingLatents(index, latents)
        if not self._pending_latents.arriving:
            self._write_pending_latents()

    def _write_pending_latents(self) -> None:
        pending, self._pending_latents = self._pending_latents, None
        if pending is not None:
            pending.write(self._writable_storage().arrays["latent"], self._rings)

    def _append(self, storage: Storage, envs: np.ndarray, entry: dict[str, np.ndarray], new: bool = True) -> None:
        number = self._rings.head[envs]
        storage.write(self._rings.row(envs, number), number, entry)
        self._rings.advance(envs, new)

    def _interrupt(self, envs: np.ndarray) -> None:
        self._pending_reward[envs] = 0.0
        self._next_is_first[envs] = True

    def _mark_newest(self, storage: Storage) -> None:
        """Mark the newest entries as the last of their episodes, or as not the last: what comes next decides."""
        envs = np.flatnonzero(self._rings.head > 0)
        newest, flags = self._rings.row(envs, self._rings.head[envs] - 1), storage.arrays["flags"]
        flags[newest] = np.where(self._next_is_first[envs], flags[newest] | LAST, flags[newest] & ~np.uint8(LAST))

    def _writable_storage(self) -> Storage:
        """The storage, created if there is none; its newest entries then are what this buffer knows of them."""
        if self._storage is None:
            self._storage = self._open_storage()
        if not self._storage.writable:
            self._storage.claim(self._rings.head)
            self._mark_newest(self._storage)
        return self._storage

    def _open_storage(self) -> Storage:
        described = {"observation_space": str(self.observation_space), "action_space": str(self.action_space)}
        return open_storage(self.storage_path, self.code.columns(), self.n_envs, self.rows, described)

    # -- reading ---------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, env: VecNormalize | None = None, since: np.ndarray | None = None) -> Batch:
        """Serve sequences: queued ones first, then uniformly over all starts.

        :param batch_size: number of sequences B.
        :param env: normalizes observations and rewards with its current statistics.
        :param since: (n_envs,) serve only sequences that begin at these entries or later, uniformly; the queue stays.
        :raises ValueError: if no environment has enough entries yet.
        """
        index = self._rings.draw(batch_size, since)
        arrays = self.arrays
        # (B, 1 + T): the entry before the sequence comes first; where there is none, is_first masks what is read
        with_before = self._rings.row(index[:, :1], index[:, 1:] + np.arange(-1, self.sequence_length))
        before, rows = with_before[:, 0], with_before[:, 1:]
        flags = arrays["flags"][rows]
        is_first = (flags & FIRST) != 0
        obs: Any = {key: arrays[f"obs/{key}"].take(rows, axis=0) for key in self.code.observation}
        reward = arrays["reward"][rows]
        if env is not None:
            obs, reward = self.normalize_obs(obs, env), env.normalize_reward(reward)
        prev_action = self.code.action.to_model(arrays["action"].take(with_before[:, :-1], axis=0))
        prev_action[is_first] = 0.0
        start = np.zeros((batch_size, self.latent_size), np.float32)
        if self.latent_size:
            start[~is_first[:, 0]] = arrays["latent"][before[~is_first[:, 0]]]
        return Batch(
            obs={key: to_device(value, self.device) for key, value in obs.items()},
            prev_action=to_device(prev_action, self.device),
            reward=to_device(reward, self.device),
            is_first=to_device(is_first, self.device),
            is_terminal=to_device((flags & TERMINAL) != 0, self.device),
            is_last=to_device((flags & LAST) != 0, self.device),
            start=to_device(start, self.device),
            index=index,
        )

    def peek(self, batch_size: int, env: VecNormalize | None = None) -> Batch:
        """As :meth:`sample`, without side effects: what is served next stays the same."""
        rings, self._rings = self._rings, copy.deepcopy(self._rings)
        try:
            return self.sample(batch_size, env)
        finally:
            self._rings = rings

    def reseed(self) -> None:
        """Seed the replay's own generator again, from numpy's global one, which SB3 seeds."""
        self._rings.reseed()

    def size(self) -> int:
        """Number of entries stored, all environments together."""
        return int(self._rings.stored().sum())

    def heads(self) -> np.ndarray:
        """(n_envs,) entries ever stored of each environment: the number of its next entry."""
        return self._rings.head.copy()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Column name -> (n_envs * rows, *shape) all rows, used or not; empty before the first entry."""
        return {} if self._storage is None else self._storage.arrays

    def stream(self, env: int, newest: int | None = None) -> np.ndarray:
        """(n,) rows of :attr:`arrays` with the entries of one environment, or only its newest ones, oldest first."""
        return self._rings.stream(env, newest)

    @property
    def n_sequences(self) -> int:
        """Number of different sequences that can be served."""
        return int(self._rings.servable()[1].sum())

    def can_sample(self, since: np.ndarray | int = 0) -> bool:
        """Whether there is a sequence to serve that begins at entry ``since`` (n_envs,) or later."""
        return bool(self._rings.servable(since)[1].any())

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in memory or on disk; none before the first ``add``."""
        return sum(array.nbytes for array in self.arrays.values())

    def normalize_obs(self, obs: dict[str, np.ndarray], env: VecNormalize) -> dict[str, np.ndarray]:
        """Observations by key, (..., *shape), with the current statistics of VecNormalize."""
        return env.normalize_obs(obs) if self.code.is_dict else {"obs": env.normalize_obs(obs["obs"])}  # type: ignore

    def flush(self) -> None:
        """Write everything to the disk, to survive a power loss; to survive a kill no flush is needed."""
        self._write_pending_latents()
        if self._storage is not None:
            self._storage.flush()

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds the rows in use; with a ``storage_path`` it only refers to them."""
        self._write_pending_latents()
        state = self.__dict__.copy()
        if self._storage is not None:
            state["_storage"] = self._storage.dump(int(min(self._rings.head.max(), self.rows)))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        dumped = state.pop("_storage")
        self.__dict__.update(state, _storage=None)
        if dumped is None:
            return
        if self.storage_path is not None and not DiskStorage.exists(self.storage_path):
            raise FileNotFoundError(f"the entries of this replay were in {self.storage_path}, no replay is there now")
        self._storage = self._open_storage()
        self._storage.restore(dumped)
        if isinstance(self._storage, DiskStorage):
            self._rings.lower_bound = self._storage.oldest(self._rings.head)
