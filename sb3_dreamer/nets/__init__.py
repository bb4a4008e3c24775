"""Layers, distributions and the optimiser: pure torch, no RL library."""
