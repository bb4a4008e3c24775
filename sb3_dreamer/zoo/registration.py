"""Registers the name "dreamer" in the Zoo."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.zoo.search_space import convert_dreamer_params, sample_dreamer_params

ALGO = "dreamer"


def register() -> None:
    """Add Dreamer, its search space and its converter to rl_zoo3's tables. Calling it again changes nothing.

    Call it before rl_zoo3 parses the command line. Importing rl_zoo3 replaces gymnasium's TimeLimit in the whole
    process: a termination at the last possible step is not a truncation then.

    :raises ModuleNotFoundError: naming the pip command, if rl_zoo3 is not installed.
    """
    require("rl_zoo3")
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    # In place: other modules of rl_zoo3 hold references to these dicts.
    ALGOS[ALGO] = Dreamer
    HYPERPARAMS_SAMPLER[ALGO] = sample_dreamer_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_dreamer_params


def hyperparams_file() -> Path:
    """The packaged ``dreamer.yml``: next to this file in a wheel, in ``zoo_hyperparams`` in a checkout.

    :raises FileNotFoundError: if the installation has neither.
    """
    here = Path(__file__).resolve()
    places = [here.with_name("dreamer.yml"), here.parents[2] / "zoo_hyperparams" / "dreamer.yml"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"dreamer.yml is missing, looked at {[str(place) for place in places]}; install sb3-dreamer again, "
        "or pass your own file with -conf"
    )


def require(*modules: str) -> None:
    """Check that modules of the extra ``zoo`` are installed.

    :param modules: top-level names.
    :raises ModuleNotFoundError: naming the pip command.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{", ".join(missing)} not found, but the Zoo needs it here: pip install "sb3-dreamer[zoo]"',
            name=missing[0],
        )
