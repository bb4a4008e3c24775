"""The world model: encoders, sequence model, decoders, reward and continue heads. Usable on its own, without SB3."""

from sb3_dreamer.world_model.world_model import WorldModel

__all__ = ["WorldModel"]
