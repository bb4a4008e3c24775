"""``python -m sb3_dreamer.zoo <script> <arguments>``: register Dreamer, then run rl_zoo3's own script."""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple
from unittest.mock import patch

from sb3_dreamer.zoo.hub import hub_knows_dreamer
from sb3_dreamer.zoo.patches import (
    dreamer_experiments,
    ffmpeg_on_path,
    figures_to_files,
    missing_environments_explained,
    register_dm_control,
    subprocesses_know_dreamer,
)
from sb3_dreamer.zoo.registration import register, require


class Script(NamedTuple):
    """One of rl_zoo3's scripts.

    :param target: "module:function", or a module that runs as a program.
    :param needs: libraries in addition to rl_zoo3 and its dependencies.
    :param patches: applied while it runs, in addition to those of all scripts.
    """

    target: str
    needs: tuple[str, ...] = ()
    patches: tuple[Callable[[], AbstractContextManager[None]], ...] = ()


SCRIPTS = {
    "train": Script("rl_zoo3.train:train", patches=(dreamer_experiments,)),
    "enjoy": Script("rl_zoo3.enjoy:enjoy", ("requests",)),
    "record_video": Script("rl_zoo3.record_video", ("moviepy",)),
    "record_training": Script("rl_zoo3.record_training", ("moviepy",), (subprocesses_know_dreamer, ffmpeg_on_path)),
    "plot_train": Script("rl_zoo3.plots:plot_train", ("seaborn",), (figures_to_files,)),
    "all_plots": Script("rl_zoo3.plots:all_plots", ("seaborn",), (figures_to_files,)),
    "plot_from_file": Script("rl_zoo3.plots:plot_from_file", ("seaborn",), (figures_to_files,)),
    "push_to_hub": Script("rl_zoo3.push_to_hub", ("moviepy", "requests"), (hub_knows_dreamer, ffmpeg_on_path)),
    "load_from_hub": Script("rl_zoo3.load_from_hub", ("requests",), (hub_knows_dreamer,)),
    "benchmark": Script("rl_zoo3.benchmark", ("requests",), (subprocesses_know_dreamer,)),
}


def main() -> None:
    """Run the script that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sb3_dreamer.zoo", description="RL Zoo's scripts, with Dreamer.")
    parser.add_argument("script", choices=SCRIPTS, help="<script> --help lists its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="rl_zoo3's own")
    args = parser.parse_args()
    script = SCRIPTS[args.script]
    require("rl_zoo3", *script.needs)
    register()
    register_dm_control(args.arguments)
    with ExitStack() as stack:
        stack.enter_context(missing_environments_explained())
        stack.enter_context(patch.object(sys, "argv", [f"{parser.prog} {args.script}", *args.arguments]))
        for patched in script.patches:
            stack.enter_context(patched())
        module, _, function = script.target.partition(":")
        if function:
            getattr(importlib.import_module(module), function)()
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
