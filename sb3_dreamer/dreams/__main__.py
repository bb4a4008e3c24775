"""Look at the dreams of a trained model: writes one HTML page.

python -m sb3_dreamer.dreams model.zip --env Hopper-v4 --out dreams/
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import pickle
import sys
from pathlib import Path

import gymnasium as gym
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.collect import collect
from sb3_dreamer.dreams.extras import MissingExtra
from sb3_dreamer.dreams.figures import check_dims
from sb3_dreamer.dreams.report import write_report
from sb3_dreamer.dreams.videos import Body
from sb3_dreamer.files import read_settings


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} has to be at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m sb3_dreamer.dreams", description=__doc__)
    parser.add_argument("model", type=Path, help="what Dreamer.save wrote")
    parser.add_argument("--env", required=True, help="id of the environment, as in gymnasium.make")
    parser.add_argument("--out", type=Path, default=Path("dreams"), help="folder for the page")
    parser.add_argument("--vecnormalize", type=Path, help="statistics that VecNormalize.save wrote, if trained with it")
    parser.add_argument("--steps", type=positive, default=2_000, help="fresh steps in the environment")
    parser.add_argument("--sequences", type=positive, default=32, help="sequences drawn from them")
    parser.add_argument("--context", type=positive, default=15, help="entries that the model sees")
    parser.add_argument("--horizon", type=positive, default=50, help="steps that it dreams on")
    parser.add_argument("--samples", type=positive, default=32, help="dreams of each sequence")
    parser.add_argument("--dims", nargs="*", help='dimensions to plot, such as "obs[3]"; default: the largest errors')
    parser.add_argument("--random-actions", action="store_true", help="chance acts instead of the model")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_vecnormalize(model: Path, given: Path | None) -> None:
    """Refuse statistics that the agent has not learned with, and none where it has, before anything is made."""
    learned = read_settings(model)
    normalised = learned.get("trained_with_vecnormalize", False)
    if normalised and given is None:
        raise SystemExit(
            f"{model} learned from what a VecNormalize made of observations or rewards, and dreams of that: "
            "give its statistics, --vecnormalize PATH"
        )
    if given is not None and learned["_n_updates"] > 0 and not normalised:
        raise SystemExit(f"{model} learned from observations as they come: leave --vecnormalize out")


def make_env(env_id: str, vecnormalize: Path | None, seed: int) -> VecEnv:
    """One environment of the task, wrapped and normalised as in training."""
    env = Dreamer._wrap_env(make_vec_env(env_id, seed=seed))  # images, channels first
    if vecnormalize is None:
        return env
    try:
        return VecNormalize.load(str(vecnormalize), env)
    except AssertionError as error:  # SB3 has no words for it
        raise SystemExit(f"{vecnormalize} holds statistics of other observations than {env_id}'s: {error}") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise SystemExit(f"{vecnormalize} is damaged or not what VecNormalize.save wrote: {error}") from error


def find_body(env_id: str) -> Body | str:
    """The body of a MuJoCo task, or the reason why there is none to see."""
    try:
        return Body(gym.make(env_id))
    except (MissingExtra, ValueError) as error:
        return f"No video of the body: {error}."


def main(argv: list[str] | None = None) -> Path:
    """Load, collect, dream, write.

    :param argv: arguments; None: those of the command line.
    :return: the page.
    """
    args = parser().parse_args(argv)
    if not args.model.exists() and not args.model.with_name(f"{args.model.name}.zip").exists():
        raise SystemExit(f"{args.model} does not exist: give the file that Dreamer.save wrote")
    if args.vecnormalize is not None and not args.vecnormalize.exists():
        raise SystemExit(f"{args.vecnormalize} does not exist: give the file that VecNormalize.save wrote")
    if args.steps < (needed := args.context + args.horizon):
        raise SystemExit(f"--steps {args.steps}: --context and --horizon together need {needed} or more")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise SystemExit(f"--out {args.out} is a file: give a folder") from error
    if sys.platform == "linux" and "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    check_vecnormalize(args.model, args.vecnormalize)
    env = make_env(args.env, args.vecnormalize, args.seed)
    # its replay stays empty, and so takes no memory; not one on disk, which may hold the data of the training
    try:
        model = Dreamer.load(args.model, env=env, buffer_size=env.num_envs * 100_000, replay_buffer_kwargs={})
    except ValueError as error:
        raise SystemExit(f"{args.model} in {args.env}: {error}") from error
    try:
        check_dims(model.policy.world_model.decoder.specs, args.dims)
    except ValueError as error:
        raise SystemExit(f"--dims: {error}") from error
    model.set_random_seed(args.seed)
    acting = model.get_env()
    assert acting is not None
    replay, real_return = collect(model, acting, args.steps, args.context + args.horizon, args.random_actions)
    batch = replay.peek(args.sequences)
    body = find_body(args.env)
    with th.no_grad():
        page = write_report(
            model,
            batch,
            args.out / "index.html",
            title=f"Dreams of {args.model.stem} in {args.env}",
            real_return=real_return,
            context=args.context,
            samples=args.samples,
            dims=args.dims,
            body=body,
        )
    if isinstance(body, Body):
        body.env.close()
    env.close()
    sys.stdout.write(f"{page}\n")
    return page


if __name__ == "__main__":
    main()
