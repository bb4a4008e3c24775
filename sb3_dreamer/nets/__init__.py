"""Layers, distributions and the optimizer: pure torch, no RL library."""
