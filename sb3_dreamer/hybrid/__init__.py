"""Dreamer and SB3 together: from SB3 to Dreamer, from Dreamer to SB3, SB3 in the world model or as a fallback."""

from sb3_dreamer.hybrid.dream_env import DreamVecEnv
from sb3_dreamer.hybrid.guard import Guard
from sb3_dreamer.hybrid.latent_env import LatentVecEnv

__all__ = ["DreamVecEnv", "Guard", "LatentVecEnv"]
