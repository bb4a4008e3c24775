"""The base of callbacks that have an interval of their own."""

from __future__ import annotations

from typing import ClassVar

from stable_baselines3.common.callbacks import BaseCallback, EventCallback


class IntervalCallback(BaseCallback):
    """A callback that counts steps itself, and is useless inside of one that decides when to call it."""

    consequence: ClassVar[str]  # of being called by another one, for the message

    def _init_callback(self) -> None:
        self._refuse_event()

    def _on_training_start(self) -> None:
        self._refuse_event()  # a CallbackList passes its parent on only after it has initialized its callbacks

    def _refuse_event(self) -> None:
        if isinstance(self.parent, EventCallback):
            raise ValueError(
                f"{type(self).__name__} inside of {type(self.parent).__name__} {self.consequence}: pass it to learn() "
                "itself, its every= sets the interval"
            )
