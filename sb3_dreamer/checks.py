"""Checks of the arguments that users give."""

from __future__ import annotations

import inspect
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


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of a class's constructor by name, including those that it passes on to its base classes."""
    known: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()  # without self
            known = {one.name: one for one in own} | known
            if not any(one.kind is one.VAR_KEYWORD for one in own):
                break
    return {name: one for name, one in known.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
