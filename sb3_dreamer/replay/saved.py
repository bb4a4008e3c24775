"""Reading a replay that was saved."""

from __future__ import annotations

import io
import pathlib
import pickle
from typing import Any

from stable_baselines3.common.save_util import load_from_pkl, open_path

from sb3_dreamer.replay.buffer import SequenceReplayBuffer


def unpickled(path: str | pathlib.Path | io.BufferedIOBase, what: str, verbose: int = 0) -> Any:
    """What SB3 has pickled into a file.

    :param path: with or without its ``.pkl``, or an open file.
    :param what: it should be, for the message.
    :param verbose: as in SB3.
    :raises ValueError: for a file that is cut short or no pickle.
    """
    file = open_path(path, "r", verbose, suffix="pkl")
    try:
        return load_from_pkl(file, verbose)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no {what} ({error}): give another file") from error
    finally:
        if file is not path:
            file.close()


def read_replay(
    path: str | pathlib.Path | io.BufferedIOBase, own: SequenceReplayBuffer, verbose: int = 0
) -> SequenceReplayBuffer:
    """A saved replay, to take the place of another; it is a pickle.

    :param path: what ``save_replay_buffer`` was given.
    :param own: the other one: of the same shapes, on the device to use.
    :param verbose: as in SB3.
    :raises ValueError: for a file that is cut short or no pickle, and one that holds something else, or of other
        shapes, and where ``own`` is kept in a folder that is not the file's.
    """
    buffer = unpickled(path, "saved replay", verbose)
    if not isinstance(buffer, SequenceReplayBuffer):
        raise ValueError(
            f"{path} holds a {type(buffer).__name__}, but Dreamer replays a SequenceReplayBuffer: add_experience(path) "
            "takes over what one of SB3 holds"
        )
    for name in ("observation_space", "action_space", "n_envs", "sequence_length", "latent_size"):
        saved, needed = getattr(buffer, name), getattr(own, name)
        if saved != needed:
            way = "" if name.endswith("space") else ", or take its episodes over with add_experience(path)"
            raise ValueError(f"the replay in {path} has {name}={saved}, this agent {needed}: make them the same{way}")
    kept, there = own.storage_path, buffer.storage_path
    if kept is not None and (there is None or kept.resolve() != there.resolve()):
        raise ValueError(
            f"this agent keeps its replay in {kept}, the one of {path} was in {there or 'memory'}: make or load the "
            "agent without storage_path= to go on with that"
        )
    buffer.device = own.device
    return buffer
