"""Libraries that only pictures of dreams need. Without them the numbers remain, and messages say what to install."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A picture cannot be made; the message says what to install."""


def need(module: str, extra: str) -> Any:
    """Import a library of an extra.

    :param module: its name, dotted.
    :param extra: the extra of sb3-dreamer that brings it.
    :raises MissingExtra: naming the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f'{module.split(".")[0]} is not installed, so this picture is left out: pip install "sb3-dreamer[{extra}]"'
        ) from error
