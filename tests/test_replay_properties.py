"""Whatever happens to the stream, every sequence served is a piece of the truth, and each piece is equally likely."""

import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_dreamer.replay import SequenceReplayBuffer

LINE = spaces.Box(-np.inf, np.inf, (1,), np.float32)
ACTIONS = 97


@dataclass
class Entry:
    obs: int
    reward: float
    action: int | None
    latent: float
    is_first: bool
    is_last: bool = False
    is_terminal: bool = False

    @property
    def one_hot(self) -> np.ndarray:
        return np.eye(ACTIONS + 1, ACTIONS)[ACTIONS if self.action is None else self.action]


@dataclass
class Truth:
    """All entries ever of each environment, kept in lists, one after the other."""

    n_envs: int
    counter: int = 0
    entries: list[list[Entry]] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = [[] for _ in range(self.n_envs)]
        self.cut()

    def cut(self) -> None:
        for entries in self.entries:
            if entries:
                entries[-1].is_last = True
        self.reward, self.begins = [0.0] * self.n_envs, [True] * self.n_envs

    def step(self, buffer: SequenceReplayBuffer, done: list[bool], timeout: bool) -> None:
        """One step with numbers never seen before, both here and there."""
        infos: list[dict] = [{} for _ in done]
        obs, action, reward = [], [], []
        for env, ends in enumerate(done):
            self.counter += 2
            obs.append([self.counter])
            action.append(self.counter % ACTIONS)
            reward.append(self.counter + 0.5)
            latent = self.counter % 1000
            self.entries[env].append(Entry(self.counter, self.reward[env], action[env], latent, self.begins[env]))
            self.reward[env], self.begins[env] = reward[env], False
            if ends:
                last = Entry(self.counter + 1, reward[env], None, 0.0, False, True, not timeout)
                self.entries[env].append(last)
                infos[env] = {"terminal_observation": np.array([self.counter + 1]), "TimeLimit.truncated": timeout}
                self.reward[env], self.begins[env] = 0.0, True
        latents = np.array(obs) % 1000
        buffer.add(np.array(obs), None, np.array(action), np.array(reward), np.array(done), infos, latents)

    def servable(self, rows: int, length: int) -> set[tuple[int, int]]:
        """(env, start) such that the sequence is there, and so is the entry before it unless it is the very first."""
        kept = [(env, max(0, len(entries) - rows), len(entries)) for env, entries in enumerate(self.entries)]
        return {
            (env, start)
            for env, oldest, end in kept
            for start in range(oldest, end - length + 1)
            if start == 0 or start - 1 >= oldest
        }

    def check(self, buffer: SequenceReplayBuffer, length: int) -> None:
        assert buffer.size() == sum(min(len(entries), buffer.rows) for entries in self.entries)
        wanted = self.servable(buffer.rows, length)
        assert buffer.n_sequences == len(wanted)
        if not wanted:
            return
        n = 40 * len(wanted)
        buffer.sample(n)  # empties the queue
        batch = buffer.sample(n)
        served, count = np.unique(batch.index, axis=0, return_counts=True)
        assert {tuple(index) for index in served.tolist()} == wanted
        surplus = ((count - 40) ** 2 / 40).sum() - (len(wanted) - 1)  # chi-square, less its mean
        assert surplus < 6 * np.sqrt(2 * len(wanted))
        for i in np.unique(batch.index, axis=0, return_index=True)[1]:
            env, start = batch.index[i]
            self.check_one(self.entries[env], start, {k: getattr(batch, k)[i] for k in FIELDS}, batch.obs["obs"][i])

    def check_one(self, truth: list[Entry], start: int, batch: dict[str, th.Tensor], obs: th.Tensor) -> None:
        piece = truth[start : start + len(obs)]
        before = truth[start - 1 : start] or [None]
        assert obs[:, 0].tolist() == [entry.obs for entry in piece]
        for name in ("reward", "is_first", "is_last", "is_terminal"):
            assert batch[name].tolist() == [getattr(entry, name) for entry in piece], name
        previous = [
            np.zeros(ACTIONS) if entry.is_first else one.one_hot for one, entry in zip(before + piece[:-1], piece)
        ]
        np.testing.assert_array_equal(batch["prev_action"], previous)
        assert batch["start"].tolist() == [0.0 if piece[0].is_first else before[0].latent]


FIELDS = ("reward", "is_first", "is_last", "is_terminal", "prev_action", "start")

Event = tuple[str, int, int]
events = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 12), st.integers(0, 2**31)),
        st.tuples(st.sampled_from(["cut", "pickle", "check"]), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 15))  # n_envs, length, spare rows


def play(shape: tuple[int, int, int], story: list[Event], folder: Path | None, interrupt: Callable) -> None:
    n_envs, length, spare = shape
    size = n_envs * (length + spare)
    options = dict(sequence_length=length, latent_size=1, storage_path=folder)

    def new() -> SequenceReplayBuffer:
        return SequenceReplayBuffer(size, LINE, spaces.Discrete(ACTIONS), "cpu", n_envs, **options)

    buffer, truth = new(), Truth(n_envs)
    for what, n, seed in story:
        if what == "steps":
            rng = np.random.default_rng(seed)
            for _ in range(n):
                truth.step(buffer, (rng.random(n_envs) < 0.25).tolist(), bool(rng.random() < 0.5))
        elif what == "cut":
            truth.cut()
            buffer = interrupt(buffer, new)
        elif what == "pickle":
            buffer = pickle.loads(pickle.dumps(buffer))
        else:
            truth.check(buffer, length)
    truth.check(buffer, length)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, events)
def test_in_memory(shape: tuple[int, int, int], story: list[Event]) -> None:
    def cut(buffer: SequenceReplayBuffer, _: Callable) -> SequenceReplayBuffer:
        buffer.cut()
        return buffer

    play(shape, story, None, cut)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(shapes, events)
def test_on_disk_where_a_cut_is_the_end_of_the_process(shape: tuple[int, int, int], story: list[Event]) -> None:
    def reopen(_: SequenceReplayBuffer, new: Callable) -> SequenceReplayBuffer:
        buffer = new()
        buffer.update_latents(np.zeros((0, 2), np.int64), th.zeros(0, 1, 1))  # the first write marks what was cut
        return buffer

    with tempfile.TemporaryDirectory() as folder:
        play(shape, story, Path(folder), reopen)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.lists(st.integers(1, 10), min_size=1, max_size=6), st.integers(1, 4))
def test_new_sequences_come_without_gap_or_repetition(
    shape: tuple[int, int, int], bursts: list[int], batch_size: int
) -> None:
    n_envs, length, _ = shape
    rng = np.random.default_rng(len(bursts))
    buffer = SequenceReplayBuffer(
        n_envs * 200, LINE, spaces.Discrete(ACTIONS), "cpu", n_envs, sequence_length=length, latent_size=1
    )
    truth, fresh = Truth(n_envs), []
    for burst in bursts:
        for _ in range(burst):
            truth.step(buffer, (rng.random(n_envs) < 0.25).tolist(), False)
        if buffer.can_sample():
            waiting = len(buffer._rings._queue)
            fresh += buffer.sample(batch_size).index[: min(waiting, batch_size // 2)].tolist()
    waiting = list(buffer._rings._queue)
    for env, entries in enumerate(truth.entries):
        mine = [start for one, start in [*fresh, *waiting] if one == env]
        assert sorted(mine) == [i * length for i in range(len(entries) // length)]
