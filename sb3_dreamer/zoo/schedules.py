"""Schedules as text, for hyperparameter files and command lines."""

from __future__ import annotations

from stable_baselines3.common.utils import LinearSchedule


def linear_schedule(text: str) -> LinearSchedule:
    """What ``lin_<start>`` means in rl_zoo3, a fall to zero, and ``lin_<start>_<end>_<end_fraction>``.

    :param text: such as "lin_3e-3", or "lin_3e-3_3e-4_0.5": from 3e-3 to 3e-4 in the first half of the training.
    :raises ValueError: for any other text.
    """
    kind, *numbers = text.split("_")
    try:
        start, end, end_fraction = map(float, numbers if len(numbers) == 3 else [*numbers, 0.0, 1.0])
    except ValueError:
        kind = "unknown"
    if kind != "lin" or not 0 < end_fraction <= 1:
        raise ValueError(f'"{text}" is no schedule: write lin_<start> or lin_<start>_<end>_<end_fraction>')
    return LinearSchedule(start, end, end_fraction)
