"""Stop at any moment and go on as if nothing had happened.

A folder holds complete checkpoints, numbered as they came. One appears by a rename when every byte of it is on the
disk, and goes by a rename before the first byte of it is deleted; what begins with a dot is never read::

    folder/
      000007_step_30000/         model.zip  replay_buffer.pkl  state.pth
      000008_step_40000/         the newest, which ``Dreamer.resume`` takes
      .000009_step_50000.part/   being written, or being deleted, or left by a kill

``model.zip`` and ``replay_buffer.pkl`` are what ``save`` and ``save_replay_buffer`` write. ``state.pth`` has the rest:
whose run it is, the random numbers of Python, NumPy and PyTorch, what the agent saw last and remembers, and the
environment; numbers, strings and plain containers only, read with ``weights_only=True``.

With an environment that can be restored, the resumed run has the same parameters, bit for bit on a CPU, as one that
was never stopped. An environment can be restored if it (or its outermost wrapper that knows) has two methods::

    def resume_state(self): ...              # all that decides its future, as arrays, numbers, strings, bytes,
    def set_resume_state(self, state): ...   # tuples, lists and dicts of these; called after a reset

Wrappers that remember something are restored too: VecNormalize, VecFrameStack and VecMonitor around the vector of
environments, the outermost TimeLimit and Monitor around each of them; others around a single one have to do it in
``resume_state``. Any other environment is reset on resume: the episode under way ends there, as by a time limit. A
replay on disk (``storage_path``) is not copied: what was collected after the checkpoint is dropped, what it overwrote
is lost, and refreshed latents stay. What is left of a ``warm_start`` is not kept: the actor goes on without a teacher.
"""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_dreamer.environments import remembering, restore_wrapper, wrapper_state
from sb3_dreamer.files import to_arrays, to_tensors
from sb3_dreamer.replay import read_replay

if TYPE_CHECKING:
    from sb3_dreamer.dreamer import Dreamer

SelfDreamer = TypeVar("SelfDreamer", bound="Dreamer")

FORMAT = 4
CHECKPOINT = re.compile(r"\d{6,}_step_\d+")
REMEMBERED = ("_last_obs", "_last_original_obs", "_last_episode_starts", "_online_state")


class ResumeCallback(BaseCallback):
    """Writes all that a resume needs, every so many steps and at the end of ``learn``.

    It saves between an update and the next step, where nothing is half done.

    :param folder: of the checkpoints of this run; those of another run in it are an error.
    :param every: environment steps between them.
    :param keep: how many of the newest to keep.
    :param verbose: 1 tells of each.
    :raises ValueError: when the training starts, if the folder belongs to another run; inside of another callback that
        decides when to call it, since ``every`` does that.
    :raises TypeError: when the training starts, if ``resume_state()`` gives what a checkpoint cannot hold.
    """

    model: Dreamer

    def __init__(self, folder: str | Path, every: int, keep: int = 2, verbose: int = 0) -> None:
        super().__init__(verbose)
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self._saved_at = 0

    def _init_callback(self) -> None:
        if isinstance(self.parent, EventCallback):
            raise ValueError(
                f"ResumeCallback inside of {type(self.parent).__name__} would never save: give it to learn() itself, "
                "it saves after so many steps by its every="
            )

    def _on_training_start(self) -> None:
        claim(self.folder, self.model)
        to_tensors(run_state(self.model))
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


# -- checkpoints -------------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in Path(folder).glob("*_step_*") if CHECKPOINT.fullmatch(path.name))


def claim(folder: Path, model: Dreamer) -> None:
    """Make sure that checkpoints in a folder are of the same run as the model: the oldest of them will be deleted.

    :raises ValueError: if they are of another.
    """
    there = checkpoints(folder)
    if there and _read_state(there[-1])["run_id"] != model.run_id:
        raise ValueError(
            f"{folder} has checkpoints of another run, the newest is {there[-1].name}: give this run a folder of its "
            f"own, or go on with that one by Dreamer.resume({str(folder)!r}, env)"
        )
    model.run_id = model.run_id or uuid.uuid4().hex


def save_checkpoint(model: Dreamer, folder: Path, keep: int) -> Path:
    """Add a checkpoint, whole or not at all, then delete the oldest beyond ``keep``.

    :raises OSError: if the disk is full; the checkpoints before stay.
    """
    model.begin_where_others_reset()
    for leftover in folder.glob(".[0-9]*_step_*.part"):
        shutil.rmtree(leftover)
    there = checkpoints(folder)
    number = int(there[-1].name.partition("_")[0]) + 1 if there else 0
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
    :param folder: where :class:`ResumeCallback` wrote.
    :param env: an environment like the one before, wrapped the same way, or its id.
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
        raise ValueError("resume() needs the environment to go on in: give env=")
    there = checkpoints(folder)
    if not there:
        raise FileNotFoundError(
            f"{folder} has no complete checkpoint: start a new run, with callback=ResumeCallback({str(folder)!r}, ...)"
        )
    state = _read_state(there[-1])  # before the replay, which may be large, and on disk forgets what came later
    model = cls.load(there[-1] / "model.zip", env=env, **kwargs)
    # load_replay_buffer would end the episode under way
    model.replay_buffer = read_replay(there[-1] / "replay_buffer.pkl", model.replay_buffer, model.verbose)
    restore_run_state(model, state)
    return model


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """What :func:`run_state` gave, from disk.

    :raises ValueError: for a damaged file, and one of another version.
    """
    path = checkpoint / "state.pth"
    try:
        state = to_arrays(th.load(path, weights_only=True))
    except (OSError, RuntimeError, IndexError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete the folder {checkpoint.name}, and the checkpoint before it is taken"
        ) from error
    if state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version of sb3_dreamer reads {FORMAT}")
    return state


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- the state of a run ------------------------------------------------------------------------------------------------


def run_state(model: Dreamer) -> dict[str, Any]:
    """What ``save`` leaves out, as plain containers of numbers, strings and arrays."""
    assert model.env is not None
    return {
        "format": FORMAT,
        "run_id": model.run_id,
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()],
        "action_space": model.action_space.np_random.bit_generator.state,
        "agent": {name: getattr(model, name) for name in REMEMBERED},
        "wrappers": [wrapper_state(wrapper) for wrapper in remembering(model.env)],
        "environments": model.env.env_method("resume_state") if _restorable(model.env) else None,
        "episodes": _episodes_under_way(model.env),
    }


def restore_run_state(model: Dreamer, state: dict[str, Any]) -> None:
    """Put back what :func:`run_state` gave; random numbers last, since a reset of the environment may draw some.

    :raises ValueError: if the environment is wrapped in another way than the one before.
    """
    env = model.env
    assert env is not None
    model.run_id = state["run_id"]
    goes_on = state["environments"] is not None and state["agent"]["_last_obs"] is not None and _restorable(env)
    if goes_on:
        _restore_environments(env, state["environments"], state["episodes"])
        for name, value in state["agent"].items():
            setattr(model, name, value)
        model.resets.note(env)
    elif model.seed is not None:
        env.seed(model.seed + model.num_timesteps)  # not the first episodes of the run again
    wrappers = remembering(env)
    now, then = [type(one).__name__ for one in wrappers], [one["kind"] for one in state["wrappers"]]
    if now != then:
        raise ValueError(f"the environments are wrapped in {now}, those of the run in {then}: wrap them the same way")
    for wrapper, one in zip(wrappers, state["wrappers"], strict=True):
        restore_wrapper(wrapper, one)
    model.action_space.np_random.bit_generator.state = state["action_space"]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    th.set_rng_state(th.from_numpy(state["torch"]))
    if len(state["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.from_numpy(one) for one in state["cuda"]])


def _restore_environments(env: VecEnv, states: list[Any], episodes: dict[str, list[Any]]) -> None:
    """Put each environment, and the wrappers around it, where they were."""
    env.reset()
    for i, one in enumerate(states):
        env.env_method("set_resume_state", one, indices=i)
    for name, values in episodes.items():
        for i, one in enumerate(values):
            env.env_method("set_wrapper_attr", name, one, indices=i)


def _restorable(env: VecEnv) -> bool:
    return all(env.has_attr(name) for name in ("resume_state", "set_resume_state"))


def _episodes_under_way(env: VecEnv) -> dict[str, list[Any]]:
    """What the wrappers around single environments remember of their episodes: TimeLimit and Monitor."""
    names = ["_elapsed_steps"] if env.has_attr("_elapsed_steps") else []
    names += ["rewards"] if all(env.env_is_wrapped(Monitor)) else []
    return {name: env.get_attr(name) for name in names}
