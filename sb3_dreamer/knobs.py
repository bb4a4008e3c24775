"""What each knob may be.

Checked when the networks are built, so that ``load(..., knob=...)`` is covered too, and before learning begins, since a
knob may have been assigned meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from sb3_dreamer.replay import SequenceReplayBuffer

Check = tuple[Callable[[Any], bool], str]


def _is(x: Any, kind: type) -> bool:
    """Of that kind of number; True and False are none."""
    return isinstance(x, kind) and not isinstance(x, bool)


def whole(least: int) -> Check:
    """Whole numbers."""
    return lambda x: _is(x, Integral) and int(x) >= least, f"a whole number of at least {least}"


def as_whole(name: str, value: Any, least: int) -> int:
    """An argument that counts something; as in ``learn(1e5)`` it may come as a float.

    :raises ValueError: for another one, naming it.
    """
    if not (_is(value, Real) and float(value).is_integer() and value >= least):
        raise ValueError(f"{name}={value!r} has to be a whole number of at least {least}")
    return int(value)


def number(low: float, high: float = math.inf) -> Check:
    """Numbers within bounds; NaN and infinity never pass."""
    words = f"a number of at least {low:g}" if high == math.inf else f"a number within [{low:g}, {high:g}]"
    return lambda x: _is(x, Real) and low <= float(x) <= high and math.isfinite(x), words


def either(check: Check, other: Callable[[Any], bool], words: str) -> Check:
    """What passes one of two checks."""
    return lambda x: other(x) or check[0](x), f"{check[1]}, or {words}"


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
    "train_ratio": (lambda x: _is(x, Real) and 0 < float(x) < math.inf, "a number above 0"),
    "imagination_starts": either(whole(1), lambda x: x is None, "None"),
    "imagination_horizon": whole(1),
    "gamma": (lambda x: _is(x, Real) and 0 < float(x) <= 1, "a number above 0 and up to 1"),
    "gae_lambda": number(0, 1),
    "ent_coef": number(0),
    "center_advantage": (lambda x: isinstance(x, bool), "True or False"),
    "policy_kwargs": (lambda x: isinstance(x, dict), "a dictionary"),
    "replay_buffer_kwargs": (lambda x: isinstance(x, dict), "a dictionary"),
}


def check_knobs(settings: Mapping[str, Any]) -> None:
    """Refuse settings that cannot work.

    :param settings: knobs by name; what is no knob is not looked at.
    :raises ValueError: names the knob, what was given and what it may be.
    """
    if "observation_space" not in settings:
        raise ValueError("a new agent needs an environment, whose spaces its networks are built for: give env=")
    for name, (passes, words) in KNOBS.items():
        value = settings[name]
        if not passes(value):
            raise ValueError(f"{name}={value!r} must be {words}")
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
            "sequences, leave it out (goals relabelled in hindsight, as HER does, do not fit into them)"
        )
    length, replay = settings["batch_length"], settings.get("replay_buffer")
    if replay is not None and replay.sequence_length != length:
        raise ValueError(
            f"batch_length={length} was assigned to an agent whose replay serves sequences of "
            f"{replay.sequence_length}: give it to the constructor or to load()"
        )
