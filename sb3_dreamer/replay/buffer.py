"""Replay of sequences: every observation is stored once, and sequences are served with the latent to start from.

Time. ``add`` is given the transition of one ``env.step``. Its reward belongs to the *next* observation, so it waits
("pending") for the next entry; where the episode is done, the final entry is written in the same call::

    add call           1            2            3, done: its entry, and the final one
                       |            |            |                |
    entry              0            1            2                3           4 (next episode)
    obs                o_0          o_1          o_2              o_3         o_0'
    reward             0            r_1          r_2              r_3         0
    action             a_0          a_1          a_2              0           a_0'
    is_first           1            0            0                0           1
    is_last            0            0            0                1           0
    is_terminal        0            0            0         not a time limit   0
    latent             s_0          s_1          s_2              0           s_0'

Each environment has its own ring of rows and counts its entries from 0 for ever; entry ``n`` lies in row ``n % rows``.
The count of entries is the write head. No sequence crosses it, because sequences are drawn as entry numbers::

    numbers    ...  13  14 | 15   16   17   18   19   20   21   22 | 23 ...         rows = 8, head = 23
    overwritten            | kept                                  | not yet
                             |    |--- sequence of 4 ---|
                             |    first start that is served: the entry before it is still there,
                             |    so its action (prev_action) and its latent (start) are known
                             oldest
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.replay.columns import ActionCode, Column, float_column, observation_columns
from sb3_dreamer.replay.storage import RamStorage
from sb3_dreamer.types import Batch

FIRST, LAST, TERMINAL = 1, 2, 4  # bits of the column "flags"
FLOAT16_MAX = 65504.0


class SequenceReplayBuffer:
    """Uniform replay over sequences, newest data first.

    Each time an environment has ``sequence_length`` new entries, they are queued and served before anything else;
    the rest of a batch is drawn uniformly over all (environment, start). Sequences may contain ends of episodes.

    :param buffer_size: capacity in entries, all environments together. Memory is taken at the first ``add``.
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a flat Dict of these.
    :param action_space: Box, Discrete, MultiDiscrete or MultiBinary.
    :param device: where sampled tensors go.
    :param n_envs: number of environments.
    :param sequence_length: entries T of a sequence.
    :param latent_size: width L of the packed latents, kept as float16; 0 for none.
    :raises ValueError: if an environment's share of ``buffer_size`` cannot hold a sequence.
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
        self._observation = observation_columns(observation_space)
        self._action = ActionCode(action_space)
        self._reward, self._latent = float_column("reward"), float_column("latent", (latent_size,), np.float16)
        # SB3 seeds numpy's global generator; from here on the buffer has its own, which is pickled
        self._rng = np.random.default_rng(np.random.randint(2**31 - 1))  # noqa: NPY002
        self._envs = np.arange(n_envs)
        self._head = np.zeros(n_envs, np.int64)  # entries ever written
        self._queued = np.zeros(n_envs, np.int64)  # entries below this number have been queued
        self._queue: deque[tuple[int, int]] = deque(maxlen=n_envs * (self.rows // sequence_length))
        self._pending_reward = np.zeros(n_envs, np.float32)
        self._next_is_first = np.ones(n_envs, bool)
        self._storage: RamStorage | None = None

    # -- writing ---------------------------------------------------------------------------------------------------

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],
        next_obs: np.ndarray | dict[str, np.ndarray],
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
        :param latent: (n_envs, L) packed latent after seeing ``obs``; zeros if not given.
        :raises ValueError: for NaN, infinity, values out of range, wrong shapes and a missing last observation.
        """
        ended = np.flatnonzero(done)
        try:
            entry = self._cast_observation(obs, self._envs)
            entry["action"] = self._action.store(action, self._envs)
            rewards = self._reward.cast(reward, self._envs)
            if self.latent_size:
                empty = np.zeros((self.n_envs, self.latent_size), np.float16)
                entry["latent"] = empty if latent is None else self._latent.cast(latent, self._envs)
            final = self._final_entry(ended, rewards, infos) if ended.size else None
        except ValueError as error:
            raise ValueError(
                f"{error}. This step was not stored; there are {self.size()} entries, "
                f"the entry would have been number {self._head.tolist()} of the environments"
            ) from None
        entry["reward"] = self._pending_reward
        entry["flags"] = self._next_is_first * np.uint8(FIRST)
        self._append(self._envs, entry)
        self._pending_reward, self._next_is_first = rewards.copy(), np.zeros(self.n_envs, bool)
        if final is not None:
            self._append(ended, final)
            self._interrupt(ended)

    def cut(self) -> None:
        """End the stream here: what is added next does not follow what was added last.

        The newest entry of each environment becomes the last (not terminal) of its episode. For ``set_env``, ``load``
        and every reset that no ``done`` announces.
        """
        written = np.flatnonzero(self._head > 0)
        if self._storage is not None:
            newest = written * self.rows + (self._head[written] - 1) % self.rows
            self._storage.arrays["flags"][newest] |= LAST
        self._interrupt(self._envs)

    def update_latents(self, index: np.ndarray, latents: th.Tensor) -> None:
        """Write refreshed latents back to sampled sequences; entries overwritten since are left alone.

        :param index: (B, 2) the ``index`` of the batch.
        :param latents: (B, T, L) packed latents of its entries.
        :raises ValueError: for NaN.
        """
        if self._storage is None or not self.latent_size:
            return
        half = latents.detach().clamp(-FLOAT16_MAX, FLOAT16_MAX).half().cpu()
        if not th.isfinite(half.sum(dtype=th.float32)):
            raise ValueError("latents hold NaN: the model's state has diverged, nothing was written back")
        env, number = index[:, :1], index[:, 1:] + np.arange(latents.shape[1])
        kept = number >= self._oldest()[env]
        row = env * self.rows + number % self.rows
        if kept.all():
            self._storage.arrays["latent"][row] = half.numpy()
        else:
            self._storage.arrays["latent"][row[kept]] = half.numpy()[kept]

    def _cast_observation(self, obs: Any, envs: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
        """Check observations: (n, *shape), by key for Dict spaces -> column name -> (n, *shape)."""
        by_key = obs if isinstance(self.observation_space, spaces.Dict) else {"obs": obs}
        return {f"obs/{key}": column.cast(by_key[key], envs, prefix) for key, column in self._observation.items()}

    def _final_entry(self, envs: np.ndarray, reward: np.ndarray, infos: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The last entries of the episodes that ended, of the environments ``envs``."""
        missing = [int(env) for env in envs if "terminal_observation" not in infos[env]]
        if missing:
            raise ValueError(f"done without infos[i]['terminal_observation'] for i in {missing}: use an SB3 VecEnv")
        terminal = [infos[env]["terminal_observation"] for env in envs]
        if isinstance(self.observation_space, spaces.Dict):
            obs: Any = {key: np.stack([one[key] for one in terminal]) for key in self._observation}
        else:
            obs = np.stack(terminal)
        entry = self._cast_observation(obs, envs, "terminal ")
        timeout = np.array([bool(infos[env].get("TimeLimit.truncated", False)) for env in envs])
        entry["action"] = np.full((len(envs), *self._action.column.shape), self._action.none, self._action.column.dtype)
        entry["reward"] = reward[envs]
        entry["flags"] = np.where(timeout, LAST, LAST | TERMINAL).astype(np.uint8)
        if self.latent_size:
            entry["latent"] = np.zeros((len(envs), self.latent_size), np.float16)
        return entry

    def _append(self, envs: np.ndarray, entry: dict[str, np.ndarray]) -> None:
        if self._storage is None:
            self._storage = RamStorage(self._columns(), self.n_envs, self.rows)
        number = self._head[envs]
        self._storage.write(envs * self.rows + number % self.rows, number, entry)
        self._head[envs] += 1
        for env in np.flatnonzero(self._head - self._queued >= self.sequence_length):
            self._queue.append((int(env), int(self._queued[env])))
            self._queued[env] += self.sequence_length

    def _interrupt(self, envs: np.ndarray) -> None:
        self._pending_reward[envs] = 0.0
        self._next_is_first[envs] = True

    def _columns(self) -> dict[str, Column]:
        columns = {f"obs/{key}": column for key, column in self._observation.items()}
        columns |= {"action": self._action.column, "reward": self._reward}
        columns["flags"] = Column("flags", (), np.dtype(np.uint8), 0, 255)
        return columns | ({"latent": self._latent} if self.latent_size else {})

    # -- reading ---------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Batch:
        """Serve sequences: those queued first, then uniformly over all starts.

        :param batch_size: number of sequences B.
        :param env: normalises observations and rewards with its current statistics.
        :raises ValueError: if no environment has enough entries yet.
        """
        index = self._draw(batch_size)
        assert self._storage is not None
        number = index[:, 1:] + np.arange(-1, self.sequence_length)  # (B, 1 + T), the entry before comes first
        rows = index[:, :1] * self.rows + number % self.rows
        before, rows = rows[:, 0], rows[:, 1:]
        arrays = self._storage.arrays
        flags = arrays["flags"][rows]
        is_first = (flags & FIRST) != 0
        obs: Any = {key: arrays[f"obs/{key}"].take(rows, axis=0) for key in self._observation}
        reward = arrays["reward"][rows]
        if env is not None:
            obs, reward = self._normalize(obs, env), env.normalize_reward(reward)
        action = self._action.serve(arrays["action"].take(rows, axis=0))
        prev_action = np.zeros_like(action)
        prev_action[:, 1:] = action[:, :-1]
        prev_action[:, 0] = self._action.serve(arrays["action"][before])
        prev_action[is_first] = 0.0
        return Batch(
            obs={key: self._to_torch(value) for key, value in obs.items()},
            action=self._to_torch(action),
            prev_action=self._to_torch(prev_action),
            reward=self._to_torch(reward),
            is_first=self._to_torch(is_first),
            is_terminal=self._to_torch((flags & TERMINAL) != 0),
            is_last=self._to_torch((flags & LAST) != 0),
            start=self._to_torch(self._start(before, is_first[:, 0])),
            index=index,
        )

    def size(self) -> int:
        """Entries stored, all environments together."""
        return int((self._head - self._oldest()).sum())

    @property
    def n_sequences(self) -> int:
        """Number of different sequences that can be served."""
        return int(self._servable()[1].sum())

    def can_sample(self) -> bool:
        """Whether there is a sequence to serve."""
        return self.n_sequences > 0

    def _oldest(self) -> np.ndarray:
        """(n_envs,) number of the oldest entry kept."""
        return np.maximum(self._head - self.rows, 0)

    def _servable(self) -> tuple[np.ndarray, np.ndarray]:
        """(n_envs,) the first start that can be served, and how many starts there are from there on."""
        oldest = self._oldest()
        first = oldest + (oldest > 0)  # entry 0 begins an episode, any other needs the entry before it
        return first, np.maximum(self._head - self.sequence_length + 1 - first, 0)

    def _draw(self, batch_size: int) -> np.ndarray:
        """(B, 2) environments and starts."""
        first, count = self._servable()
        total = int(count.sum())
        if total == 0:
            raise ValueError(
                f"no sequence to sample: the environments have {(self._head - self._oldest()).tolist()} entries, "
                f"a sequence needs {self.sequence_length} of one environment"
            )
        fresh: list[tuple[int, int]] = []
        while self._queue and len(fresh) < batch_size:
            env, start = self._queue.popleft()
            if start >= first[env]:
                fresh.append((env, start))
        drawn = self._rng.integers(total, size=batch_size - len(fresh))
        until = np.cumsum(count)
        envs = np.searchsorted(until, drawn, side="right")
        starts = first[envs] + drawn - (until - count)[envs]
        return np.concatenate([np.array(fresh, np.int64).reshape(-1, 2), np.stack([envs, starts], axis=1)])

    def _start(self, before: np.ndarray, is_first: np.ndarray) -> np.ndarray:
        """(B, L) latents of the entries before the sequences, zeros where an episode begins."""
        if not self.latent_size:
            return np.zeros((len(before), 0), np.float32)
        assert self._storage is not None
        start = self._storage.arrays["latent"][before].astype(np.float32)
        start[is_first] = 0.0
        return start

    def _normalize(self, obs: dict[str, np.ndarray], env: VecNormalize) -> dict[str, np.ndarray]:
        if isinstance(self.observation_space, spaces.Dict):
            normalized = env.normalize_obs(obs)
            assert isinstance(normalized, dict)
            return normalized
        return {"obs": env.normalize_obs(obs["obs"])}  # type: ignore[dict-item]

    def _to_torch(self, array: np.ndarray) -> th.Tensor:
        tensor = th.from_numpy(array)
        if tensor.dtype == th.float16:
            tensor = tensor.float()
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # -- keeping ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Only the rows in use are pickled."""
        state = self.__dict__.copy()
        if self._storage is not None:
            state["_storage"] = self._storage.filled(int(min(self._head.max(), self.rows)))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        filled = state.pop("_storage")
        self.__dict__.update(state, _storage=None)
        if filled is not None:
            self._storage = RamStorage(self._columns(), self.n_envs, self.rows)
            self._storage.refill(filled)
