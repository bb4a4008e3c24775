"""Sequence replay: what is stored (``columns``), where (``storage``), and how time runs through it (``buffer``)."""

from sb3_dreamer.replay.buffer import SequenceReplayBuffer

__all__ = ["SequenceReplayBuffer"]
