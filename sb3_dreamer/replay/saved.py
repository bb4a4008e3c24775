"""Reading a replay that was saved."""

from __future__ import annotations

from sb3_dreamer.files import FileLike, unpickled
from sb3_dreamer.replay.buffer import SequenceReplayBuffer


def read_replay(path: FileLike, own: SequenceReplayBuffer, verbose: int = 0) -> SequenceReplayBuffer:
    """Read a saved replay, which is a pickle, to replace another one.

    :param path: of the file that ``save_replay_buffer`` wrote.
    :param own: the replay to replace: of the same shapes, on the device to use.
    :param verbose: as in SB3.
    :raises ValueError: if the file is truncated or no pickle, if it holds something else or a replay of other shapes,
        and if ``own`` is kept in another folder than the saved one.
    """
    buffer = unpickled(path, "saved replay", verbose)
    if not isinstance(buffer, SequenceReplayBuffer):
        raise ValueError(
            f"{path} holds a {type(buffer).__name__}, but Dreamer replays a SequenceReplayBuffer: add_experience(path) "
            "imports the transitions of SB3's buffers"
        )
    for name in ("observation_space", "action_space", "n_envs", "sequence_length", "latent_size"):
        saved, needed = getattr(buffer, name), getattr(own, name)
        if saved != needed:
            hint = "" if name.endswith("space") else ", or import its episodes with add_experience(path)"
            raise ValueError(f"the replay in {path} has {name}={saved}, this agent {needed}: make them the same{hint}")
    folder, saved_folder = own.storage_path, buffer.storage_path
    if folder is not None and (saved_folder is None or folder.resolve() != saved_folder.resolve()):
        raise ValueError(
            f"this agent keeps its replay in {folder}, the one of {path} was in {saved_folder or 'memory'}: make or "
            "load the agent without storage_path= to continue with that"
        )
    buffer.device = own.device
    return buffer
