"""The hybrid: from SB3 to Dreamer, from Dreamer to SB3, and SB3 inside the dream or at its side."""

from sb3_dreamer.hybrid.dream_env import DreamVecEnv
from sb3_dreamer.hybrid.guard import Guard
from sb3_dreamer.hybrid.latent_env import LatentVecEnv

__all__ = ["DreamVecEnv", "Guard", "LatentVecEnv"]
