"""Draw learning curves with published results: a panel for each task, thin lines for seeds, thick ones for means.

python -m benchmarks.plot results/*.csv --reference gym_v4.csv --algorithms SAC CrossQ --out curves.png

Two forms of reference file are read:
task,algorithm,env_steps,mean_return,std_over_seeds,n_seeds,source       a row for each point
algorithm,...,env,r100k,r200k,...,r1M,source                             a column for each point
"""

import argparse
import json
import math
import re
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLORS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#ca9161", "#56b4e9", "#d55e00")
REFERENCE_COLORS = ("#333333", "#8c8c8c", "#b0803c", "#7c6fb0", "#5a8a5a", "#a05050", "#3f7f93")
REFERENCE_STYLES = tuple(zip(REFERENCE_COLORS, "os^Dv*P", strict=True))
UNITS = {"k": 1_000, "M": 1_000_000}


def task_of(env: str) -> str:
    """`dmc/ball_in_cup-catch` and `ball-in-cup-catch` are one task."""
    return env.removeprefix("dmc/").replace("_", "-") if env.startswith("dmc/") else env


def read_results(paths: list[Path]) -> pd.DataFrame:
    """Rows of benchmarks.learn or benchmarks.hybrid, with the task and the curve's name in the legend."""
    files = [pd.read_csv(path).rename(columns={"agent": "algo"}).assign(file=path.stem) for path in paths]
    rows = pd.concat(files, ignore_index=True)
    rows["task"] = rows["env"].map(task_of)
    rows["curve"] = list(map(_curve_name, rows["algo"], rows["settings"]))
    # The same settings in several files, of different versions for example, are separate curves.
    several = rows.groupby(["task", "curve"])["file"].transform("nunique") > 1
    rows.loc[several, "curve"] += " [" + rows["file"] + "]"
    point = ["task", "curve", "seed", "step"]
    rows = rows.drop_duplicates([*point, "return_mean", "commit"])  # a Dreamer that was handed over to two students
    ambiguous = rows.duplicated(point, keep=False).groupby([rows["task"], rows["curve"]]).transform("any")
    rows.loc[ambiguous, "curve"] += " [" + rows["commit"] + "]"
    if len(repeated := rows[rows.duplicated(point)]) > 0:
        task, curve, seed, step = repeated.iloc[0][point]
        raise SystemExit(f"{task}, {curve}, seed {seed} has several returns at step {step}: this cannot be one curve")
    return rows


def _curve_name(algo: str, settings: str) -> str:
    known, words = json.loads(settings), [algo]
    if known.get("normalize"):
        words.append("normalized")
    words += [f"{key}={known[key]}" for key in ("init", "eval_env") if known.get(key)]
    words += [f"{key}={value}" for key, value in known.get("overrides", {}).items()]
    if algo.startswith("dreamer"):
        words += known.get("dreamer", [])  # as benchmarks.hybrid writes overrides
    return ", ".join(words)


def read_references(paths: list[Path], algorithms: list[str] | None) -> pd.DataFrame:
    """Published points as rows of (task, algorithm, env_steps, mean_return, n_seeds, source)."""
    rows = pd.concat([pd.DataFrame({"task": [], "algorithm": []}), *map(_read_reference, paths)], ignore_index=True)
    return rows[rows["algorithm"].isin(algorithms)] if algorithms else rows


def _read_reference(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path)
    if "env_steps" in rows:
        return rows
    points = [column for column in rows if re.fullmatch(r"r\d+[kM]", column)]
    kept = ["env", "algorithm", "n_seeds", "source"]
    rows = rows.melt(kept, points, var_name="env_steps", value_name="mean_return")
    rows["env_steps"] = [int(name[1:-1]) * UNITS[name[-1]] for name in rows["env_steps"]]
    return rows.rename(columns={"env": "task"})


def draw_curve(axes: Axes, runs: pd.DataFrame, name: str, color: str, column: str) -> None:
    """Thin lines for seeds, a thick one for their mean up to the last step that all of them have reached."""
    by_seed = runs.pivot(index="step", columns="seed", values=column).dropna(how="all")
    for seed in by_seed:
        single = by_seed[seed].dropna()
        axes.plot(single.index, single, color=color, linewidth=0.8, alpha=0.45)
    mean = by_seed.dropna().mean(axis=1)
    seeds = by_seed.shape[1]
    label = f"{name} ({seeds} seed{'s' if seeds > 1 else ''})"
    axes.plot(mean.index, mean, color=color, linewidth=2.2, marker=".", markersize=6, label=label)


def draw_reference(axes: Axes, points: pd.DataFrame, name: str, style: tuple[str, str], last_step: float) -> None:
    """Published points up to the end of our runs, or up to the first one after it."""
    points = points.dropna(subset=["mean_return"]).sort_values("env_steps")
    shown = points.head(points["env_steps"].searchsorted(0.98 * last_step) + 1)
    if shown.empty:
        return
    color, marker = style
    label = f"published {name} ({shown['n_seeds'].iloc[0]:.0f} seeds; {shown['source'].iloc[0]})"
    axes.plot(shown["env_steps"], shown["mean_return"], "--", color=color, marker=marker, markersize=6, label=label)


def panels(tasks: list[str]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each task."""
    columns = min(math.ceil(math.sqrt(len(tasks))), 4)
    lines = math.ceil(len(tasks) / columns)
    figure, grid = plt.subplots(lines, columns, figsize=(6.0 * columns, 4.2 * lines), squeeze=False)
    for unused in grid.flat[len(tasks) :]:
        unused.set_visible(False)
    return figure, list(grid.flat[: len(tasks)])


def decorate(axes: Axes, task: str, column: str) -> None:
    """Title, axes, grid; each panel has its own legend, below the x-axis, since numbers of seeds differ."""
    axes.set_title(task, fontsize=12, fontweight="bold")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("evaluation return" if column == "return_mean" else "training return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.5, frameon=False, fontsize=9)


def draw(results: pd.DataFrame, reference: pd.DataFrame, column: str) -> Figure:
    """All panels."""
    tasks = sorted(results["task"].unique())
    colors = dict(zip(results["curve"].unique(), cycle(COLORS), strict=False))
    styles = dict(zip(reference["algorithm"].unique(), cycle(REFERENCE_STYLES), strict=False))
    figure, axes_of = panels(tasks)
    for task, axes in zip(tasks, axes_of, strict=True):
        ours, theirs = (rows[rows["task"] == task] for rows in (results, reference))
        for name, runs in ours.groupby("curve", sort=False):
            draw_curve(axes, runs, str(name), colors[name], column)
        for name, points in theirs.groupby("algorithm", sort=False):
            draw_reference(axes, points, str(name), styles[name], ours["step"].max())
        decorate(axes, task, column)
    figure.tight_layout()
    return figure


def main() -> None:
    """Read the command line, draw, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="CSV files of benchmarks.learn or benchmarks.hybrid")
    parser.add_argument("--reference", type=Path, nargs="+", default=[], help="CSV files of published results")
    parser.add_argument("--algorithms", nargs="+", help="algorithms of the reference; default: all")
    parser.add_argument("--column", choices=("return_mean", "train_return"), default="return_mean")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    reference = read_references(args.reference, args.algorithms)
    draw(read_results(args.results), reference, args.column).savefig(args.out, dpi=130, bbox_inches="tight")
    print(args.out)


if __name__ == "__main__":
    main()
