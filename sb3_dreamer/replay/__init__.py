"""Sequence replay: what is stored (``columns``), where (``storage``), and how time runs through it (``buffer``)."""

from sb3_dreamer.replay.buffer import SequenceReplayBuffer
from sb3_dreamer.replay.episodes import Episode, encoded_episode, read_episodes, write_episode

__all__ = ["Episode", "SequenceReplayBuffer", "encoded_episode", "read_episodes", "write_episode"]
