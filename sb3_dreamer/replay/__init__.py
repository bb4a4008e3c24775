"""Sequence replay: what is stored (``columns``), where (``storage``), and how time runs through it (``buffer``)."""

from sb3_dreamer.replay.buffer import SequenceReplayBuffer
from sb3_dreamer.replay.episodes import (
    Episode,
    Transition,
    encoded_episode,
    read_episodes,
    split_transitions,
    write_episode,
)
from sb3_dreamer.replay.saved import read_replay

__all__ = [
    "Episode",
    "SequenceReplayBuffer",
    "Transition",
    "encoded_episode",
    "read_episodes",
    "read_replay",
    "split_transitions",
    "write_episode",
]
