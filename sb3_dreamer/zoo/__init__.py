"""Dreamer in RL Baselines3 Zoo: ``python -m sb3_dreamer.zoo <script> <rl_zoo3's own arguments>``.

In your own training script, call :func:`register` before rl_zoo3's function.
"""

from sb3_dreamer.zoo.registration import hyperparams_file, register

__all__ = ["hyperparams_file", "register"]
