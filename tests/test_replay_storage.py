"""The replay on disk: what survives, what is refused, what happens when the disk is full or the process dies."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.replay.latents import PendingLatents

WIDE = spaces.Box(-np.inf, np.inf, (500,), np.float32)
STICK = spaces.Box(-1.0, 1.0, (2,), np.float32)
LENGTH = 4


def make(folder: Path, buffer_size: int = 20, **kwargs: Any) -> SequenceReplayBuffer:
    given = {"observation_space": WIDE, "action_space": STICK, "sequence_length": LENGTH, "latent_size": 3, **kwargs}
    return SequenceReplayBuffer(buffer_size, device="cpu", storage_path=folder, **given)


def add(buffer: SequenceReplayBuffer, number: int, last: int | None = None) -> None:
    """Add entry ``number``: that number is in every element of every column but the reward, which came before.

    :param last: number of the final entry, if the episode ends.
    """
    info = {} if last is None else {"terminal_observation": np.full(500, last)}
    buffer.add(
        np.full((1, 500), number),
        None,
        np.full((1, 2), number / 1e6),
        np.array([number + 1.0]),
        np.array([last is not None]),
        [info],
        np.full((1, 3), number / 100),
    )


def fill(folder: Path, until: int, **kwargs: Any) -> SequenceReplayBuffer:
    buffer = make(folder, **kwargs)
    for number in range(until):
        add(buffer, number)
    return buffer


def served(buffer: SequenceReplayBuffer) -> set[int]:
    """All numbers served as observations, after a check that every entry served is whole and in its place."""
    batch = buffer.sample(40 * buffer.n_sequences)  # each with probability 1 - 1e-17
    number = batch.index[:, 1:] + np.arange(LENGTH)
    assert (batch.obs["obs"].numpy() == number[:, :, None]).all()
    counted = ~batch.is_first.numpy()
    before = np.repeat(number[counted][:, None] - 1, 2, 1)
    np.testing.assert_allclose(batch.prev_action.numpy()[counted], before / 1e6, rtol=1e-6)
    np.testing.assert_array_equal(batch.reward.numpy()[counted], number[counted])
    led_in = counted[:, 0]
    np.testing.assert_allclose(batch.start[led_in][:, 0], (number[led_in][:, 0] - 1) / 100, rtol=1e-3)
    return set(number.flatten().tolist())


class TestFolder:
    def test_nothing_is_made_before_the_first_entry(self, tmp_path):
        buffer = make(tmp_path / "replay")
        assert not (tmp_path / "replay").exists()
        assert buffer.nbytes == 0

    def test_a_reopened_replay_has_all_entries_and_goes_on(self, tmp_path):
        fill(tmp_path, 33)  # entries 13 ... 32 are kept
        buffer = make(tmp_path)
        assert buffer.size() == 20
        assert served(buffer) == set(range(14, 33))
        add(buffer, 33)
        assert served(buffer) == set(range(15, 34))

    def test_the_stream_is_cut_where_it_was_reopened(self, tmp_path):
        fill(tmp_path, 10)
        buffer = make(tmp_path)
        for number in range(10, 13):
            add(buffer, number)
        batch = buffer.sample(200)
        over_the_cut = batch.index[:, 1] == 8
        assert batch.is_last[over_the_cut][0].tolist() == [False, True, False, False]
        assert batch.is_first[over_the_cut][0].tolist() == [False, False, True, False]
        assert batch.reward[over_the_cut][0].tolist() == [8, 9, 0, 11]

    def test_looking_at_a_replay_does_not_change_it(self, tmp_path):
        fill(tmp_path, 10).flush()
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        buffer = make(tmp_path)
        buffer.cut()
        buffer.sample(10)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_entries_of_before_are_not_served_as_new(self, tmp_path):
        fill(tmp_path, 10)
        buffer = make(tmp_path)
        for number in range(10, 14):
            add(buffer, number)
        assert buffer.sample(2).index[0].tolist() == [0, 10]
        assert not buffer._rings._queue

    def test_refreshed_latents_reach_the_files(self, tmp_path):
        buffer = fill(tmp_path, 10)
        buffer.update_latents(np.array([[0, 2]]), th.full((1, LENGTH, 3), 7.0))
        batch = make(tmp_path).sample(100)
        assert {float(start[0]) for start, index in zip(batch.start, batch.index) if 3 <= index[1] <= 6} == {7.0}

    def test_flushed_latents_reach_them_though_they_are_still_pending(self, tmp_path, monkeypatch):
        monkeypatch.setattr(PendingLatents, "arriving", property(lambda self: True))
        buffer = fill(tmp_path, 4)
        buffer.update_latents(np.array([[0, 0]]), th.ones(1, LENGTH, 3))
        buffer.flush()
        assert np.load(tmp_path / "latent.npy", mmap_mode="r")[:4].tolist() == np.ones((4, 3)).tolist()

    def test_the_files_are_plain_numpy_arrays(self, tmp_path):
        fill(tmp_path, 3)
        assert np.load(tmp_path / "obs%2Fobs.npy")[:4, 0].tolist() == [0, 1, 2, 0]
        assert json.loads((tmp_path / "replay.json").read_text())["column reward"] == "float32 ()"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"observation_space": spaces.Box(-np.inf, np.inf, (400,))}, r"column obs/obs: float32 \(500,\) there"),
            ({"action_space": spaces.Box(-2, 2, (2,))}, r"action_space: Box\(-1.0, 1.0, .* Box\(-2.0, 2.0"),
            ({"latent_size": 5}, r"column latent: float16 \(3,\) there, float16 \(5,\) here"),
            ({"buffer_size": 30}, r"entries of each environment: 20 there, 30 here"),
        ],
    )
    def test_a_replay_of_another_kind_is_refused(self, tmp_path, change, message):
        fill(tmp_path, 10)
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **change)
        assert make(tmp_path).size() == 10

    def test_another_length_of_sequence_may_be_read(self, tmp_path):
        fill(tmp_path, 10)
        assert make(tmp_path, sequence_length=6).n_sequences == 5

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
    def test_a_folder_is_written_by_the_agent_of_this_process_that_claimed_it_last(self, tmp_path):
        first = fill(tmp_path, 3)
        add(make(tmp_path), 3)
        with pytest.raises(RuntimeError, match="is written by another agent by now"):
            add(first, 3)

    @pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX locks")
    @pytest.mark.parametrize("before", [0, 5])
    def test_entries_that_another_agent_has_stored_meanwhile_are_not_dropped(self, tmp_path, before):
        if before:
            fill(tmp_path, before)
        late = make(tmp_path)
        early = make(tmp_path)
        for number in range(before, 12):
            add(early, number)
        with pytest.raises(RuntimeError, match=f"another agent has written .*12 entries instead of {before}"):
            add(late, before)
        assert make(tmp_path).size() == 12

    def test_a_folder_is_written_by_one_process_at_a_time(self, tmp_path):
        (tmp_path / "lock").touch()
        code = (
            f"import fcntl; file = open({str(tmp_path / 'lock')!r}, 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
            "print(flush=True); input()"
        )
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            with pytest.raises(RuntimeError, match="is written by another process"):
                fill(tmp_path, 1)
            other.communicate(b"\n")
        assert fill(tmp_path, 1).size() == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_child_has_not_inherited_the_claim(self, tmp_path):
        code = (
            "import os, pathlib, sys\nfrom tests.test_replay_storage import add, fill, make\n"
            f"mine = fill(pathlib.Path({str(tmp_path)!r}), 3)\n"
            "if (child := os.fork()) == 0:\n"
            "    for writer in (mine, make(mine.storage_path)):\n"
            "        try: add(writer, 9)\n"
            "        except RuntimeError: continue\n"
            "        os._exit(1)\n"
            "    os._exit(0)\n"
            "sys.exit(os.waitpid(child, 0)[1])"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        assert make(tmp_path).size() == 3


class TestPickle:
    def test_a_pickle_refers_to_the_folder_and_goes_on_exactly(self, tmp_path):
        buffer = fill(tmp_path, 33)
        dumped = pickle.dumps(buffer)
        assert len(dumped) < 10_000
        loaded = pickle.loads(dumped)
        assert loaded.sample(9).index.tolist() == buffer.sample(9).index.tolist()
        add(loaded, 33)
        assert 33 in served(loaded)
        assert not loaded.sample(100).is_first.any()  # nothing was interrupted

    def test_an_older_pickle_has_what_was_not_overwritten_since_and_forgets_the_future(self, tmp_path):
        buffer = fill(tmp_path, 30)
        dumped = pickle.dumps(buffer)
        for number in range(30, 40):
            add(buffer, number)
        loaded = pickle.loads(dumped)  # 10 ... 19 were overwritten
        assert loaded.size() == 10
        assert served(loaded) == set(range(21, 30))
        loaded.cut()
        add(loaded, 30)
        reopened = make(tmp_path)
        assert served(reopened) == set(range(21, 31))

    def test_an_episode_that_was_cut_after_the_pickle_continues(self, tmp_path):
        buffer = fill(tmp_path, 8)
        dumped = pickle.dumps(buffer)
        buffer.cut()
        restored = pickle.loads(dumped)
        for number in range(8, 12):
            add(restored, number)
        batch = restored.sample(200)
        assert not batch.is_last.any()
        assert served(restored) == set(range(12))

    def test_a_pickle_of_another_replay_is_refused(self, tmp_path):
        dumped = pickle.dumps(fill(tmp_path / "replay", 10))
        (tmp_path / "replay").rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match="no replay is there now"):
            pickle.loads(dumped)
        fill(tmp_path / "replay", 10)
        with pytest.raises(ValueError, match="holds another replay than the one that was saved"):
            pickle.loads(dumped)


class TestFullDisk:
    def test_a_replay_larger_than_the_disk_is_refused_at_once(self, tmp_path):
        (tmp_path / "notes.txt").write_text("keep me")
        buffer = make(tmp_path, 10**13)
        with pytest.raises(OSError, match=r"No space left.* needs 2\d{16} bytes, \d+ are free") as told:
            add(buffer, 0)
        assert told.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(told.value)
        assert (tmp_path / "notes.txt").read_text() == "keep me"
        assert not list(tmp_path.glob("*.npy"))

    @pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
    def test_a_disk_that_fills_up_meanwhile_leaves_no_half_replay(self, tmp_path, monkeypatch):
        left = [3]

        def allocate(*_: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", allocate)
        buffer = make(tmp_path)
        with pytest.raises(OSError, match="use a smaller buffer_size or another storage_path"):
            add(buffer, 0)
        assert not list(tmp_path.glob("*.npy"))
        left[0] = 100  # somebody made room
        add(buffer, 0)
        assert buffer.size() == 1

    @pytest.mark.skipif(sys.platform == "win32", reason="needs st_blocks")
    @pytest.mark.parametrize("fallocate", [True, False])
    def test_the_space_of_all_rows_is_taken_when_the_folder_is_made(self, tmp_path, monkeypatch, fallocate: bool):
        if not fallocate:  # as on macOS and Windows
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        fill(tmp_path, 3, buffer_size=1000).flush()
        for file in tmp_path.glob("*.npy"):
            assert file.stat().st_blocks * 512 >= file.stat().st_size, file
        stored = np.load(tmp_path / "obs%2Fobs.npy", mmap_mode="r")
        assert stored.shape == (1000, 500)
        assert stored[:4, 0].tolist() == [0, 1, 2, 0]
        assert not stored[3:].any()
        assert make(tmp_path, buffer_size=1000).size() == 3


class Death(BaseException):
    """Stands for the end of the process."""


class Dying(dict):
    """Columns that die at the n-th access."""

    def __init__(self, columns: dict[str, np.ndarray], n: int) -> None:
        super().__init__(columns)
        self.n = n

    def __getitem__(self, name: str) -> Any:
        self.n -= 1
        if self.n < 0:
            self.die()
        return super().__getitem__(name)

    def die(self) -> NoReturn:
        raise Death


class TestDeath:
    @pytest.mark.parametrize("n", range(16))
    @pytest.mark.parametrize("last", [None, 34])
    def test_an_entry_is_served_as_a_whole_or_not_at_all(self, tmp_path, n, last):
        buffer = fill(tmp_path, 33)
        buffer._storage.arrays = Dying(buffer._storage.arrays, n)
        try:
            add(buffer, 33, last)
            died = False
        except Death:
            died = True
        per_entry = 7  # five columns, and the number twice
        entries = min(n // per_entry, 1 if last is None else 2)
        assert died == (n < per_entry * (1 if last is None else 2))
        reopened = make(tmp_path)
        newest = 33 + entries
        torn = died and n % per_entry > 0
        assert reopened.size() == 20 - torn
        assert served(reopened) == set(range(newest - 19 + torn, newest))

    def test_neither_is_one_torn_at_the_first_turn_of_the_ring(self, tmp_path):
        buffer = fill(tmp_path, 20)
        buffer._storage.arrays = Dying(buffer._storage.arrays, 3)  # entry 20 takes the place of entry 0
        with pytest.raises(Death):
            add(buffer, 20)
        reopened = make(tmp_path)
        assert reopened.size() == 19
        assert served(reopened) == set(range(2, 20))

    @pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
    @pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
    def test_kill_9_loses_no_entry_whose_add_returned(self, tmp_path, kills):
        stop = 0
        for kill in range(kills):
            stop = killed_writer(tmp_path / "replay", after=stop + 200 + 37 * kill)
            buffer = make(tmp_path / "replay", 60)
            head = int(buffer._rings.head[0])
            assert head >= stop
            assert buffer.size() >= 59  # all, or all but the one that was being overwritten
            assert served(buffer) == set(range(head - buffer.size() + 1, head))
            stop = head


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_replay_storage import add, make
buffer = make(Path({folder!r}), 60)
number = int(buffer._rings.head[0])
while True:
    add(buffer, number)
    number += 1
    print(number, flush=True)
"""


def killed_writer(folder: Path, after: int) -> int:
    """Let another process add entries, kill it, and return how many it said that it had added."""
    here = Path(__file__).parent
    code = WRITER.format(path=[str(here), str(here.parent)], folder=str(folder))
    added = 0
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        for line in writer.stdout:
            added = int(line)
            if added >= after:
                writer.send_signal(signal.SIGKILL)
                break
        said = [int(line) for line in writer.stdout if line.endswith("\n")]
    assert writer.returncode == -signal.SIGKILL
    return max([added, *said])
