"""What an agent asks of the teacher of a warm start; ``hybrid.cloning`` has one."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Imitation(Protocol):
    """A teacher that an agent imitates, with a weight that decays to zero."""

    def weight(self, n_updates: int) -> float:
        """Weight of the teacher in what the actor learns, from 1 to 0, after some updates."""

    def query(self, model: Any, taken: np.ndarray) -> None:
        """Ask the teacher what it would do now, in each environment of the agent, which takes other actions.

        :param model: the agent.
        :param taken: (n_envs, *shape) actions of the agent.
        """

    def imitate(self, model: Any, weight: float) -> None:
        """Updates of the actor alone, their learning rate scaled by the weight."""


class NoTeacher:
    """Nothing to imitate."""

    def weight(self, n_updates: int) -> float:
        """Zero."""
        return 0.0

    def query(self, model: Any, taken: np.ndarray) -> None:
        """Nothing."""

    def imitate(self, model: Any, weight: float) -> None:
        """Nothing."""


NO_TEACHER = NoTeacher()
