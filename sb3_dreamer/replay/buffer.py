"""Replay of sequences: every observation is stored once, and sequences are served with the latent to start from.

Time. ``add`` is given the transition of one ``env.step``. Its reward belongs to the *next* observation, so it waits
for the next entry; where the episode is done, the final entry is written in the same call::

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

How the entries of an environment lie in its ring is drawn in ``rings``.
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

from sb3_dreamer.replay.columns import FIRST, LAST, TERMINAL, EntryCode, HalfLatents, to_device
from sb3_dreamer.replay.rings import Rings
from sb3_dreamer.replay.storage import DiskStorage, RamStorage
from sb3_dreamer.types import Batch, Observation


class SequenceReplayBuffer:
    """Uniform replay over sequences, newest data first.

    Each time an environment has ``sequence_length`` new entries, they are queued. Up to half of a batch are those, the
    newest first; the rest is drawn uniformly over all (environment, start). Sequences may contain ends of episodes.

    :param buffer_size: capacity in entries, all environments together. Memory is taken at the first ``add``.
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of these.
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary.
    :param device: where sampled tensors go.
    :param n_envs: number of environments.
    :param sequence_length: entries T of a sequence.
    :param latent_size: width L of the latents, kept as float16; 0 for none.
    :param storage_path: folder for the entries, instead of memory. A folder that holds a replay is opened and goes on
        where it stopped (what survives what is told in ``storage``); the first entry after that begins an episode.
    :raises ValueError: if an environment's share of ``buffer_size`` cannot hold a sequence, or if the folder holds
        the replay of other spaces or sizes.
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
        self._code = EntryCode(observation_space, action_space, latent_size)
        self._envs = np.arange(n_envs)
        self._pending_reward = np.zeros(n_envs, np.float32)
        self._next_is_first = np.ones(n_envs, bool)
        self._rings = Rings(n_envs, self.rows, sequence_length)
        self._pending_latents: tuple[np.ndarray, HalfLatents] | None = None
        self.storage_path = None if storage_path is None else Path(storage_path)
        self._storage: RamStorage | None = None
        if self.storage_path is not None and DiskStorage.exists(self.storage_path):
            self._storage = disk = self._disk_storage(self.storage_path)
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

        :param obs: (n_envs, *shape), by key for Dict spaces; original, not normalised.
        :param next_obs: not read: it comes back as ``obs``, or lies in ``infos`` where an episode is done.
        :param action: (n_envs, *shape) taken after seeing ``obs``; Box actions scaled to [-1, 1], or integers.
        :param reward: (n_envs,) that came with ``next_obs``; original, not normalised.
        :param done: (n_envs,) whether the episode ended.
        :param infos: where done, with "terminal_observation", and "TimeLimit.truncated" if it was a time limit.
        :param latent: (n_envs, L) latents after seeing ``obs``; zeros if not given.
        :raises ValueError: for NaN, infinity, values out of range, wrong shapes and a missing last observation.
        """
        ended = np.flatnonzero(done)
        try:
            entry = self._code.encode(obs, action, latent, self._envs)
            rewards = self._code.reward.cast(reward, self._envs)
            final = self._code.encode_final(infos, rewards, ended) if ended.size else None
        except ValueError as error:
            raise ValueError(
                f"{error}. Nothing of this step was stored, the replay keeps its {self.size()} entries"
            ) from None
        storage = self._writable_storage()
        entry["reward"] = self._pending_reward
        entry["flags"] = self._next_is_first * np.uint8(FIRST)
        self._append(storage, self._envs, entry)
        self._pending_reward, self._next_is_first = rewards.copy(), np.zeros(self.n_envs, bool)
        if final is not None:
            self._append(storage, ended, final)
            self._interrupt(ended)

    def check(self, obs: Observation) -> None:
        """Refuse observations that could not be stored, before anybody acts on them.

        :param obs: (n_envs, *shape), by key for Dict spaces; original, not normalised.
        :raises ValueError: for NaN, infinity, values out of range and wrong shapes.
        """
        self._code.encode_observation(obs, self._envs)

    def cut(self) -> None:
        """End the stream here: what is added next does not follow what was added last.

        The newest entry of each environment becomes the last (not terminal) of its episode. For ``set_env``, ``load``
        and every reset that no ``done`` announces.
        """
        self._interrupt(self._envs)
        if self._storage is not None and self._storage.writable:
            self._mark_last(self._storage)

    def update_latents(self, index: np.ndarray, latents: th.Tensor) -> None:
        """Write refreshed latents back to sampled sequences; entries overwritten since are left alone.

        Those that come from a GPU are written at the next call, or when the replay is saved: the host does not wait.

        :param index: (B, 2) the ``index`` of the batch.
        :param latents: (B, T, L) latents of its entries.
        :raises ValueError: for NaN.
        """
        if not self.latent_size:
            return
        self._write_pending_latents()
        self._pending_latents = index, HalfLatents(latents)
        if not self._pending_latents[1].arriving:
            self._write_pending_latents()

    def _write_pending_latents(self) -> None:
        """Write the latents that are still on their way."""
        if self._pending_latents is None:
            return
        (index, latents), self._pending_latents = self._pending_latents, None
        half = latents.numpy()
        stored = self._writable_storage().arrays["latent"]
        env, number = index[:, :1], index[:, 1:] + np.arange(half.shape[1])
        row, kept = self._rings.row(env, number), number >= self._rings.oldest()[env]
        if kept.all():
            stored[row] = half
        else:
            stored[row[kept]] = half[kept]

    def _append(self, storage: RamStorage, envs: np.ndarray, entry: dict[str, np.ndarray], new: bool = True) -> None:
        number = self._rings.head[envs]
        storage.write(self._rings.row(envs, number), number, entry)
        self._rings.advance(envs, new)

    def _interrupt(self, envs: np.ndarray) -> None:
        self._pending_reward[envs] = 0.0
        self._next_is_first[envs] = True

    def _mark_last(self, storage: RamStorage) -> None:
        """An entry that none will follow is the last one of its episode."""
        envs = np.flatnonzero(self._next_is_first & (self._rings.head > 0))
        storage.arrays["flags"][self._rings.row(envs, self._rings.head[envs] - 1)] |= LAST

    def _writable_storage(self) -> RamStorage:
        """The storage, made if there is none; episodes that a dead process left open in it are ended."""
        if self._storage is None:
            self._storage = self._new_storage()
        if not self._storage.writable:
            self._storage.claim(self._rings.head)
            self._mark_last(self._storage)
        return self._storage

    def _new_storage(self) -> RamStorage:
        if self.storage_path is None:
            return RamStorage(self._code.columns(), self.n_envs, self.rows)
        return self._disk_storage(self.storage_path)

    def _disk_storage(self, folder: Path) -> DiskStorage:
        words = {"observation_space": str(self.observation_space), "action_space": str(self.action_space)}
        return DiskStorage(folder, self._code.columns(), self.n_envs, self.rows, words)

    # -- reading ---------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, env: VecNormalize | None = None, since: np.ndarray | None = None) -> Batch:
        """Serve sequences: those queued first, then uniformly over all starts.

        :param batch_size: number of sequences B.
        :param env: normalises observations and rewards with its current statistics.
        :param since: (n_envs,) serve what begins at these entries or later, uniformly; what is queued stays so.
        :raises ValueError: if no environment has enough entries yet.
        """
        index = self._rings.draw(batch_size, since)
        arrays = self._storage.arrays  # type: ignore[union-attr]
        # (B, 1 + T): the entry before the sequence comes first; where there is none, is_first covers what is read
        entries = self._rings.row(index[:, :1], index[:, 1:] + np.arange(-1, self.sequence_length))
        before, rows = entries[:, 0], entries[:, 1:]
        flags = arrays["flags"][rows]
        is_first = (flags & FIRST) != 0
        obs: Any = {key: arrays[f"obs/{key}"].take(rows, axis=0) for key in self._code.observation}
        reward = arrays["reward"][rows]
        if env is not None:
            obs, reward = self.normalize_obs(obs, env), env.normalize_reward(reward)
        prev_action = self._code.action.to_model(arrays["action"].take(entries[:, :-1], axis=0))
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
        """As :meth:`sample`, but unnoticed: what is served next stays the same."""
        rings, self._rings = self._rings, copy.deepcopy(self._rings)
        try:
            return self.sample(batch_size, env)
        finally:
            self._rings = rings

    def reseed(self) -> None:
        """Draw anew from here on, by numpy's global generator, which SB3 seeds."""
        self._rings.reseed()

    def size(self) -> int:
        """Entries stored, all environments together."""
        return int(self._rings.stored().sum())

    def heads(self) -> np.ndarray:
        """(n_envs,) entries that were ever stored of each environment: the number that the next one will have."""
        return self._rings.head.copy()

    @property
    def n_sequences(self) -> int:
        """Number of different sequences that can be served."""
        return int(self._rings.servable()[1].sum())

    def can_sample(self, since: np.ndarray | int = 0) -> bool:
        """Whether there is a sequence to serve, of entries ``since`` these numbers (n_envs,)."""
        return bool(self._rings.servable(since)[1].any())

    @property
    def nbytes(self) -> int:
        """Bytes taken, in memory or on disk; none before the first ``add``."""
        return 0 if self._storage is None else self._storage.nbytes

    def normalize_obs(self, obs: dict[str, np.ndarray], env: VecNormalize) -> dict[str, np.ndarray]:
        """Observations by key, (..., *shape), with the current statistics of VecNormalize."""
        if isinstance(self.observation_space, spaces.Dict):
            return env.normalize_obs(obs)  # type: ignore[return-value]
        return {"obs": env.normalize_obs(obs["obs"])}  # type: ignore[dict-item]

    def flush(self) -> None:
        """Write everything to the disk, to outlive a loss of power; the death of the process needs no flush."""
        self._write_pending_latents()
        if self._storage is not None:
            self._storage.flush()

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds the rows in use; with a ``storage_path`` they stay there, and it only refers to them."""
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
        self._storage = self._new_storage()
        self._storage.restore(dumped)
        if isinstance(self._storage, DiskStorage):
            self._rings.lower_bound = self._storage.oldest(self._rings.head)
