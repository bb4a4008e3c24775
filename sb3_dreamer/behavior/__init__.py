"""Acting and learning to act: imagination, actor-critic. Usable on its own, without SB3."""
