"""Reading a replay that was saved."""

from __future__ import annotations

import io
import pathlib
import pickle

from stable_baselines3.common.save_util import load_from_pkl, open_path

from sb3_dreamer.replay.buffer import SequenceReplayBuffer


def read_replay(path: str | pathlib.Path | io.BufferedIOBase, verbose: int = 0) -> SequenceReplayBuffer:
    """A saved replay; it is a pickle.

    :param path: what ``save_replay_buffer`` was given.
    :param verbose: as in SB3.
    :raises ValueError: for a damaged file, and one that holds something else.
    """
    file = open_path(path, "r", verbose, suffix="pkl")
    try:
        buffer = load_from_pkl(file, verbose)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no saved replay ({error}): use an older one") from error
    finally:
        if file is not path:
            file.close()
    if not isinstance(buffer, SequenceReplayBuffer):
        raise ValueError(f"{path} holds a {type(buffer).__name__}, but Dreamer replays a SequenceReplayBuffer")
    return buffer
