"""Sequence replay: what is stored (``columns``), where (``storage``), and how time runs through it (``buffer``)."""

from sb3_dreamer.replay.buffer import SequenceReplayBuffer
from sb3_dreamer.replay.episodes import Episode, read_episodes, write_episode

__all__ = ["Episode", "SequenceReplayBuffer", "read_episodes", "write_episode"]
