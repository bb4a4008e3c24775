"""Allowed values of the constructor's arguments.

Checked when the networks are built, so that ``load(..., knob=...)`` is covered too, and before learning begins, since
attributes may have been assigned in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from stable_baselines3.common.type_aliases import Schedule

from sb3_dreamer.checks import Check, either, is_number, number, whole
from sb3_dreamer.replay import SequenceReplayBuffer

KNOBS: dict[str, Check] = {
    "learning_rate": either(number(0), callable, "a function of the remaining progress"),
    "warmup_updates": whole(0),
    "actor_lr_scale": number(0),
    "critic_lr_scale": number(0),
    "critic_ema_decay": number(0, 1),
    "buffer_size": number(1),
    "learning_starts": number(0),
    "batch_size": whole(1),
    "batch_length": whole(2),
    "train_ratio": Check(lambda x: is_number(x, Real) and 0 < float(x) < math.inf, "a number above 0"),
    "imagination_starts": either(whole(1), lambda x: x is None, "None"),
    "imagination_horizon": whole(1),
    "gamma": Check(lambda x: is_number(x, Real) and 0 < float(x) <= 1, "a number above 0 and up to 1"),
    "gae_lambda": number(0, 1),
    "ent_coef": either(number(0), callable, "a function of the remaining progress"),
    "center_advantage": Check(lambda x: isinstance(x, bool), "True or False"),
    "policy_kwargs": Check(lambda x: isinstance(x, dict), "a dictionary"),
    "replay_buffer_kwargs": Check(lambda x: isinstance(x, dict), "a dictionary"),
}


def at_progress(name: str, knob: float | Schedule, progress_remaining: float) -> float:
    """The value of a knob that may be a function of the remaining progress.

    :raises ValueError: if the function returns a negative or infinite number.
    """
    value = knob(progress_remaining) if callable(knob) else knob
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value} at {progress_remaining:.3f} of the progress to go")
    return value


def check_knobs(settings: Mapping[str, Any]) -> None:
    """Refuse values that cannot work.

    :param settings: the agent's attributes by name; ``replay_buffer`` is None or missing before it is built.
    :raises ValueError: names the knob, what was given and what is allowed.
    """
    for name, check in KNOBS.items():
        if not check.passes(settings[name]):
            raise ValueError(f"{name}={settings[name]!r} must be {check.words}")
    if settings["center_advantage"] and settings["imagination_starts"] == 1:
        raise ValueError(
            "one dream has no mean to differ from: imagination_starts=2 or more, or center_advantage=False"
        )
    buffer_class = settings["replay_buffer_class"]
    sequences = isinstance(buffer_class, type) and issubclass(buffer_class, SequenceReplayBuffer)
    if buffer_class is not None and not sequences:
        name = getattr(buffer_class, "__name__", repr(buffer_class))
        raise ValueError(
            f"replay_buffer_class={name} is no SequenceReplayBuffer: a world model learns from "
            "sequences, leave it out (goals relabeled in hindsight, as HER does, do not fit into them)"
        )
    length, replay = settings["batch_length"], settings.get("replay_buffer")
    if replay is not None and replay.sequence_length != length:
        raise ValueError(
            f"batch_length={length} was assigned to an agent whose replay serves sequences of "
            f"{replay.sequence_length}: give it to the constructor or to load()"
        )
