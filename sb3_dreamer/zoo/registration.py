"""Make the Zoo know the name "dreamer"."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.zoo.search_space import convert_dreamer_params, sample_dreamer_params

ALGO = "dreamer"


def register() -> None:
    """Put Dreamer, its search space and its converter into rl_zoo3's tables. Calling it again changes nothing.

    It must come before rl_zoo3 parses the command line. Importing rl_zoo3 replaces gymnasium's TimeLimit for the
    whole process: a termination at the very last step is no truncation then.

    :raises ModuleNotFoundError: naming the pip command, if rl_zoo3 is not installed.
    """
    require("rl_zoo3")
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS

    # In place: other modules of rl_zoo3 hold references to these very dicts.
    ALGOS[ALGO] = Dreamer
    HYPERPARAMS_SAMPLER[ALGO] = sample_dreamer_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_dreamer_params


def hyperparams_file() -> Path:
    """The packaged ``dreamer.yml``: beside this file in a wheel, at the top level in a checkout.

    :raises FileNotFoundError: if the installation has neither.
    """
    here = Path(__file__).resolve()
    places = [here.with_name("dreamer.yml"), here.parents[2] / "zoo_hyperparams" / "dreamer.yml"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"dreamer.yml was found at none of {[str(place) for place in places]}; install sb3-dreamer again, "
        "or pass a file of your own with -conf"
    )


def require(*modules: str) -> None:
    """Check that modules of the extra ``zoo`` are there.

    :param modules: top-level names.
    :raises ModuleNotFoundError: naming the pip command.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{", ".join(missing)} not found, which the Zoo needs here: pip install "sb3-dreamer[zoo]"', name=missing[0]
        )
