"""``python -m sb3_dreamer.zoo <script> <arguments>``: register Dreamer, then run rl_zoo3's own script."""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

from sb3_dreamer.zoo.bridges import (
    absent_environments_explained,
    children_know_dreamer,
    dreamer_experiments,
    ffmpeg_on_path,
    figures_to_files,
    register_dm_control,
    replaced,
)
from sb3_dreamer.zoo.hub import hub_knows_dreamer
from sb3_dreamer.zoo.registration import register, require


class Script(NamedTuple):
    """One of rl_zoo3's scripts.

    :param target: "module:function", or a module that runs as a program.
    :param needs: libraries beside rl_zoo3 and its own dependencies.
    :param bridges: what has to be in place while it runs, beside what all scripts need.
    """

    target: str
    needs: tuple[str, ...] = ()
    bridges: tuple[Callable[[], AbstractContextManager[None]], ...] = ()


SCRIPTS = {
    "train": Script("rl_zoo3.train:train", bridges=(dreamer_experiments,)),
    "enjoy": Script("rl_zoo3.enjoy:enjoy", ("requests",)),
    "record_video": Script("rl_zoo3.record_video", ("moviepy",)),
    "record_training": Script("rl_zoo3.record_training", ("moviepy",), (children_know_dreamer, ffmpeg_on_path)),
    "plot_train": Script("rl_zoo3.plots:plot_train", ("seaborn",), (figures_to_files,)),
    "all_plots": Script("rl_zoo3.plots:all_plots", ("seaborn",), (figures_to_files,)),
    "plot_from_file": Script("rl_zoo3.plots:plot_from_file", ("seaborn",), (figures_to_files,)),
    "push_to_hub": Script("rl_zoo3.push_to_hub", ("moviepy", "requests"), (hub_knows_dreamer, ffmpeg_on_path)),
    "load_from_hub": Script("rl_zoo3.load_from_hub", ("requests",), (hub_knows_dreamer,)),
    "benchmark": Script("rl_zoo3.benchmark", ("requests",), (children_know_dreamer,)),
}


def main() -> None:
    """Run the script that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sb3_dreamer.zoo", description="RL Zoo's scripts, with Dreamer.")
    parser.add_argument("script", choices=SCRIPTS, help="<script> --help tells its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="rl_zoo3's own")
    given = parser.parse_args()
    script = SCRIPTS[given.script]
    require("rl_zoo3", *script.needs)
    register()
    register_dm_control(given.arguments)
    with ExitStack() as stack:
        stack.enter_context(absent_environments_explained())
        stack.enter_context(replaced(sys, "argv", [f"{parser.prog} {given.script}", *given.arguments]))
        for bridge in script.bridges:
            stack.enter_context(bridge())
        module, _, function = script.target.partition(":")
        if function:
            getattr(importlib.import_module(module), function)()
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
