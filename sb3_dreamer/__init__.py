"""DreamerV3 as one more Stable-Baselines3 algorithm."""

from sb3_dreamer.dreamer import Dreamer

__version__ = "0.1.0"
__all__ = ["Dreamer"]
