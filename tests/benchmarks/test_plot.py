import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.plot import draw, read_references, read_results


@pytest.fixture
def results(tmp_path: Path) -> pd.DataFrame:
    rows = [
        {"env": "dmc/walker-walk", "algo": "dreamer", "seed": seed, "step": step, "return_mean": step * (1 + seed)}
        for seed, steps in ((0, (10, 20, 30)), (1, (10, 20)))
        for step in steps
    ]
    settings = json.dumps({"overrides": {"learning_rate": 1e-4}})
    pd.DataFrame(rows).assign(settings=settings, commit="abc1234").to_csv(tmp_path / "results.csv")
    return read_results([tmp_path / "results.csv"])


def test_both_forms_of_reference_give_the_same_points(tmp_path: Path):
    long, wide = tmp_path / "long.csv", tmp_path / "wide.csv"
    long.write_text("task,algorithm,env_steps,mean_return,n_seeds,source\nHopper-v4,SAC,100000,1103,10,them\n")
    wide.write_text("algorithm,n_seeds,env,r100k,source\nSAC,10,Hopper-v4,1103,them\n")
    columns = ["task", "algorithm", "env_steps", "mean_return", "n_seeds", "source"]
    first, second = (read_references([path], None)[columns].values.tolist() for path in (long, wide))
    assert first == second == [["Hopper-v4", "SAC", 100_000, 1103, 10, "them"]]


def test_the_mean_is_drawn_where_all_seeds_have_arrived(results: pd.DataFrame):
    axes = draw(results, read_references([], None), "return_mean").axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "dreamer, learning_rate=0.0001 (2 seeds)")
    assert list(mean.get_xdata()) == [10, 20]
    assert list(mean.get_ydata()) == [15, 30]


def test_runs_of_different_files_are_not_averaged(results: pd.DataFrame, tmp_path: Path):
    results[["env", "algo", "seed", "step", "return_mean", "settings", "commit"]].to_csv(tmp_path / "older.csv")
    both = read_results([tmp_path / "results.csv", tmp_path / "older.csv"])
    names = ["dreamer, learning_rate=0.0001 [results]", "dreamer, learning_rate=0.0001 [older]"]
    assert list(both["curve"].unique()) == names


def test_runs_with_normalized_observations_are_a_curve_of_their_own(results: pd.DataFrame, tmp_path: Path):
    settings = json.dumps({"overrides": {"train_ratio": 128}, "normalize": True})
    results[["env", "algo", "seed", "step", "return_mean", "commit"]].assign(settings=settings).to_csv(
        tmp_path / "normalized.csv"
    )
    assert set(read_results([tmp_path / "normalized.csv"])["curve"]) == {"dreamer, normalized, train_ratio=128"}


def test_runs_that_began_from_another_are_not_averaged_with_those_from_scratch(results: pd.DataFrame, tmp_path: Path):
    rows = results[["env", "algo", "seed", "step", "return_mean", "commit"]]
    heirs = rows.assign(settings=json.dumps({"init": "runs/a", "eval_env": "Uphill"}))
    pd.concat([heirs, rows.assign(settings="{}")]).to_csv(tmp_path / "both.csv")
    both = read_results([tmp_path / "both.csv"])
    assert list(both["curve"].unique()) == ["dreamer, init=runs/a, eval_env=Uphill", "dreamer"]


def test_a_run_of_several_commits_is_a_curve_for_each(results: pd.DataFrame, tmp_path: Path):
    rows = results[["env", "algo", "seed", "step", "return_mean"]].assign(settings=json.dumps({"dreamer": ["units=9"]}))
    newer = rows.assign(return_mean=7.0, commit="def5678")
    pd.concat([rows.assign(commit="abc1234"), newer]).to_csv(tmp_path / "both.csv")
    both = read_results([tmp_path / "both.csv"])
    assert list(both["curve"].unique()) == ["dreamer, units=9 [abc1234]", "dreamer, units=9 [def5678]"]


def test_what_is_no_curve_is_refused(results: pd.DataFrame, tmp_path: Path):
    rows = results[["env", "algo", "seed", "step", "return_mean", "settings", "commit"]]
    pd.concat([rows, rows.assign(return_mean=7.0)]).to_csv(tmp_path / "both.csv")
    with pytest.raises(SystemExit, match=r"walker-walk, dreamer.* seed 0 has several returns at step 10"):
        read_results([tmp_path / "both.csv"])


def test_two_numbers_for_one_step_of_a_seed_are_an_error(results: pd.DataFrame):
    with pytest.raises(ValueError, match="duplicate"):
        draw(pd.concat([results, results]), read_references([], None), "return_mean")


def test_an_algorithm_that_has_published_nothing_for_a_task_is_left_out(results: pd.DataFrame, tmp_path: Path):
    path = tmp_path / "reference.csv"
    path.write_text("algorithm,n_seeds,env,r100k,source\nSAC,10,walker-walk,,them\n")
    axes = draw(results, read_references([path], ["SAC"]), "return_mean").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dreamer, learning_rate=0.0001 (2 seeds)"]


def test_the_legend_quotes_the_source_of_published_points(results: pd.DataFrame, tmp_path: Path):
    path = tmp_path / "reference.csv"
    path.write_text("task,algorithm,env_steps,mean_return,n_seeds,source\nwalker-walk,dreamerv3,50,213,5,paper\n")
    figure = draw(results, read_references([path], ["dreamerv3"]), "return_mean")
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert "published dreamerv3 (5 seeds; paper)" in labels


@pytest.mark.parametrize(
    ("published", "shown"), [((15, 30, 45), [15, 30]), ((15, 29, 35, 45), [15, 29, 35]), ((90,), [90])]
)
def test_published_points_reach_to_the_end_of_the_runs_or_the_next_one(
    results: pd.DataFrame, tmp_path: Path, published: tuple[int, ...], shown: list[int]
):
    rows = [f"walker-walk,dreamerv3,{step},213,5,paper" for step in published]
    path = tmp_path / "reference.csv"
    path.write_text("\n".join(["task,algorithm,env_steps,mean_return,n_seeds,source", *rows]))
    axes = draw(results, read_references([path], None), "return_mean").axes[0]
    line = next(line for line in axes.lines if str(line.get_label()).startswith("published"))
    assert list(line.get_xdata()) == shown


def test_rows_of_hybrid_runs_are_drawn_by_agent(tmp_path: Path):
    rows = {"env": ["Hopper-v4"] * 2, "agent": ["dreamer", "dreamer-then-sac"], "seed": 0, "step": [10, 20]}
    pd.DataFrame(
        {**rows, "return_mean": [1.0, 2.0], "settings": json.dumps({"first": 10}), "commit": "abc1234"}
    ).to_csv(tmp_path / "h.csv")
    assert list(read_results([tmp_path / "h.csv"])["curve"]) == ["dreamer", "dreamer-then-sac"]
