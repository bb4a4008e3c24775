"""Methods of Dreamer that are imported on first use have the arguments of the functions that they call."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import experience, hand_over, offline_training, warm_start
from sb3_dreamer.resume import resume


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (Dreamer.resume.__func__, resume),
        (Dreamer.warm_start, warm_start.warm_start),
        (Dreamer.add_experience, experience.add_experience),
        (Dreamer.pretrain, offline_training.pretrain),
        (Dreamer.to_model_free, hand_over.to_model_free),
    ],
)
def test_a_method_has_the_arguments_of_its_function(method: Callable[..., Any], function: Callable[..., Any]):
    def arguments(of: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.default, p.kind) for p in list(inspect.signature(of).parameters.values())[1:]]

    assert arguments(method) == arguments(function)
