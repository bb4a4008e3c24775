"""Checkpoints: written by a callback, complete or not at all, and resumed from."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import GymEnv

from sb3_dreamer.callbacks import IntervalCallback
from sb3_dreamer.checks import as_whole
from sb3_dreamer.environments import NEW_STATISTICS
from sb3_dreamer.replay import read_replay
from sb3_dreamer.resume.state import FORMAT, restore_run_state, run_state, to_arrays, to_tensors

if TYPE_CHECKING:
    from sb3_dreamer.dreamer import Dreamer

SelfDreamer = TypeVar("SelfDreamer", bound="Dreamer")

CHECKPOINT = re.compile(r"\d{6,}_step_\d+")


class ResumeCallback(IntervalCallback):
    """Saves checkpoints to resume from, every so many steps and at the end of ``learn``.

    It saves between an update and the next step, when nothing is half done.

    :param folder: of the checkpoints of this run; those of another run in it are an error.
    :param every: environment steps between checkpoints.
    :param keep: number of the newest checkpoints to keep.
    :param verbose: 1 logs each checkpoint.
    :raises ValueError: for an ``every`` or ``keep`` that is no whole number of at least 1; when the training starts, if
        the folder belongs to another run, or if another callback decides when to call this one: ``every`` does that.
    :raises TypeError: when the training starts, if ``resume_state()`` returns objects that a checkpoint cannot hold.
    """

    model: Dreamer
    consequence = "would never save"

    def __init__(self, folder: str | Path, every: int, keep: int = 2, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.folder = Path(folder)
        self.every = as_whole("every", every, least=1)
        self.keep = as_whole("keep", keep, least=1)
        self._saved_at = 0

    def _on_training_start(self) -> None:
        super()._on_training_start()
        claim(self.folder, self.model)
        to_tensors(run_state(self.model))  # fails before the first step if an environment's state cannot be saved
        self._saved_at = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._saved_at >= self.every:
            self._save()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._saved_at:
            self._save()

    def _save(self) -> None:
        path = save_checkpoint(self.model, self.folder, self.keep)
        self._saved_at = self.model.num_timesteps
        if self.verbose:
            self.logger.log(f"Saved {path}")


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("*_step_*") if CHECKPOINT.fullmatch(path.name))


def claim(folder: Path, model: Dreamer) -> None:
    """Make sure that the checkpoints in a folder belong to the model's run: the oldest of them will be deleted.

    :raises ValueError: if they belong to another run.
    """
    found = checkpoints(folder)
    if found and _read_state(found[-1])["run_id"] != model.run_id:
        raise ValueError(
            f"{folder} has checkpoints of another run, the newest is {found[-1].name}: give this run a folder of its "
            f"own, or continue that one by Dreamer.resume({str(folder)!r}, env)"
        )
    model.run_id = model.run_id or uuid.uuid4().hex


def save_checkpoint(model: Dreamer, folder: Path, keep: int) -> Path:
    """Add a complete checkpoint or none, then delete the oldest beyond ``keep``.

    :raises OSError: if the disk is full; the earlier checkpoints stay.
    """
    model.begin_where_others_reset()
    for leftover in folder.glob(".[0-9]*_step_*.part"):
        shutil.rmtree(leftover)
    earlier = checkpoints(folder)
    number = int(earlier[-1].name.partition("_")[0]) + 1 if earlier else 0
    path = folder / f"{number:06d}_step_{model.num_timesteps}"
    part = _part(path)
    part.mkdir(parents=True)
    model.save(part / "model.zip")
    model.save_replay_buffer(part / "replay_buffer.pkl")
    model.replay_buffer.flush()
    th.save(to_tensors(run_state(model)), part / "state.pth")
    for file in part.iterdir():
        _sync(file)
    _sync(part)
    part.rename(path)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(_part(old)))
    return path


def resume(cls: type[SelfDreamer], folder: str | Path, env: GymEnv | str, **kwargs: Any) -> SelfDreamer:
    """The agent of the newest complete checkpoint, ready for ``learn(..., reset_num_timesteps=False)``.

    :param cls: Dreamer.
    :param folder: of :class:`ResumeCallback`.
    :param env: an environment like the one of the run, wrapped the same way, or its id.
    :param kwargs: further arguments of ``Dreamer.load``, but not ``trusted=False``: the replay is a pickle.
    :raises FileNotFoundError: if the folder has no complete checkpoint.
    :raises ValueError: if the replay has another number of environments, other spaces, or sequences of another length,
        for a damaged file, and without an environment.
    """
    if not kwargs.get("trusted", True):
        raise ValueError(
            "the replay of a checkpoint is a pickle, which may run code: Dreamer.load(CHECKPOINT/model.zip, env, "
            "trusted=False) reads the agent alone"
        )
    if env is None:
        raise ValueError("resume() needs the environment to continue in: give env=")
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no complete checkpoint: start a new run, with callback=ResumeCallback({str(folder)!r}, ...)"
        )
    newest = found[-1]
    state = _read_state(newest)  # before the replay, which may be large, and on disk drops what came later
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NEW_STATISTICS)  # the right ones are part of the state
        model = cls.load(newest / "model.zip", env=env, **kwargs)
    # load_replay_buffer would end the running episodes
    model.replay_buffer = read_replay(newest / "replay_buffer.pkl", model.replay_buffer, model.verbose)
    restore_run_state(model, state)
    return model


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """The :func:`run_state` of a checkpoint.

    :raises ValueError: if the file is damaged or from another version.
    """
    path = checkpoint / "state.pth"
    try:
        state = to_arrays(th.load(path, weights_only=True))
    except (OSError, RuntimeError, IndexError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete the folder {checkpoint.name} to resume from the checkpoint before it"
        ) from error
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version of sb3_dreamer reads {FORMAT}")
    return state


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
