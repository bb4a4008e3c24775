"""Write one HTML page that shows the dreams of a trained model.

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
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m sb3_dreamer.dreams", description=__doc__)
    parser.add_argument("model", type=Path, help="file that Dreamer.save wrote")
    parser.add_argument("--env", required=True, help="id of the environment, as in gymnasium.make")
    parser.add_argument("--out", type=Path, default=Path("dreams"), help="folder for the page")
    parser.add_argument("--vecnormalize", type=Path, help="file that VecNormalize.save wrote, if trained with it")
    parser.add_argument("--steps", type=positive, default=2_000, help="fresh steps in the environment")
    parser.add_argument("--sequences", type=positive, default=32, help="sequences drawn from them")
    parser.add_argument("--context", type=positive, default=15, help="entries that the model sees")
    parser.add_argument("--horizon", type=positive, default=50, help="steps that it dreams on")
    parser.add_argument("--samples", type=positive, default=32, help="dreams of each sequence")
    parser.add_argument("--dims", nargs="*", help='dimensions to plot, such as "obs[3]"; default: the largest errors')
    parser.add_argument("--random-actions", action="store_true", help="take random actions instead of the model's")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def check_vecnormalize(model: Path, statistics: Path | None) -> None:
    """Check that --vecnormalize is given exactly if the agent was trained with VecNormalize."""
    saved = read_settings(model)
    normalized = saved.get("trained_with_vecnormalize", False)
    if normalized and statistics is None:
        raise SystemExit(
            f"{model} was trained with VecNormalize, so it dreams in normalized units: "
            "pass its statistics, --vecnormalize PATH"
        )
    if statistics is not None and saved["_n_updates"] > 0 and not normalized:
        raise SystemExit(f"{model} was trained without VecNormalize: leave --vecnormalize out")


def make_env(env_id: str, vecnormalize: Path | None, seed: int) -> VecEnv:
    """One environment of the task, wrapped and normalized as in training."""
    env = Dreamer._wrap_env(make_vec_env(env_id, seed=seed))  # images, channels first
    if vecnormalize is None:
        return env
    try:
        return VecNormalize.load(str(vecnormalize), env)
    except AssertionError as error:  # SB3 gives no explanation
        raise SystemExit(f"{vecnormalize} has statistics of other observations than {env_id}'s: {error}") from error
    except (pickle.UnpicklingError, EOFError) as error:
        raise SystemExit(f"{vecnormalize} is damaged or not what VecNormalize.save wrote: {error}") from error


def find_body(env_id: str) -> tuple[Body | None, str | None]:
    """The body of a MuJoCo task, or None and the reason why it cannot be shown."""
    try:
        return Body(gym.make(env_id)), None
    except (MissingExtra, ValueError) as error:
        return None, f"No video of the body: {error}."


def main(argv: list[str] | None = None) -> Path:
    """Load the model, collect data, dream, write the page.

    :param argv: arguments; None: those of the command line.
    :return: path of the page.
    """
    args = parser().parse_args(argv)
    if not args.model.exists() and not args.model.with_name(f"{args.model.name}.zip").exists():
        raise SystemExit(f"{args.model} does not exist: pass the file that Dreamer.save wrote")
    if args.vecnormalize is not None and not args.vecnormalize.exists():
        raise SystemExit(f"{args.vecnormalize} does not exist: pass the file that VecNormalize.save wrote")
    if args.steps < (needed := args.context + args.horizon):
        raise SystemExit(f"--steps {args.steps}: --context and --horizon together need {needed} or more")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise SystemExit(f"--out {args.out} is a file: pass a folder") from error
    if sys.platform == "linux" and "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    check_vecnormalize(args.model, args.vecnormalize)
    env = make_env(args.env, args.vecnormalize, args.seed)
    # The replay stays empty and takes no memory; one on disk is not opened, it may hold the training data.
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
    body, body_missing = find_body(args.env)
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
            body_missing=body_missing,
        )
    if body is not None:
        body.env.close()
    env.close()
    sys.stdout.write(f"{page}\n")
    return page


if __name__ == "__main__":
    main()
