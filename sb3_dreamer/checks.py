"""Checks of numbers that users give."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple


class Check(NamedTuple):
    """A test of a value, and the words for what passes it."""

    passes: Callable[[Any], bool]
    words: str


def is_number(x: Any, kind: type) -> bool:
    """Whether it is that kind of number; True and False are none."""
    return isinstance(x, kind) and not isinstance(x, bool)


def whole(least: int) -> Check:
    """Whole numbers."""
    return Check(lambda x: is_number(x, Integral) and int(x) >= least, f"a whole number of at least {least}")


def as_whole(name: str, value: Any, least: int) -> int:
    """An argument that counts something, as an int; as in ``learn(1e5)`` it may be given as a float.

    :raises ValueError: for any other value, naming the argument.
    """
    if not (is_number(value, Real) and float(value).is_integer() and value >= least):
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def number(low: float, high: float = math.inf) -> Check:
    """Numbers within bounds; NaN and infinity never pass."""
    words = f"a number of at least {low:g}" if high == math.inf else f"a number within [{low:g}, {high:g}]"
    return Check(lambda x: is_number(x, Real) and low <= float(x) <= high and math.isfinite(x), words)


def either(check: Check, other: Callable[[Any], bool], words: str) -> Check:
    """Values that pass one of two checks."""
    return Check(lambda x: other(x) or check.passes(x), f"{check.words}, or {words}")
