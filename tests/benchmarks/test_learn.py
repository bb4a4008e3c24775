import argparse
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.vec_env import VecNormalize

from benchmarks.envs import make_env
from benchmarks.learn import COLUMNS, Trainer, follow_schedule
from benchmarks.rows import append_row
from benchmarks.runs import (
    Progress,
    Run,
    load_checkpoint,
    make_vec_env,
    new_model,
    parse_overrides,
    save_checkpoint,
    schedules,
    trained,
)
from sb3_dreamer.zoo.schedules import linear_schedule

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 1000, "policy_kwargs": {"net_arch": [8]}}
DREAMER = {"learning_starts": 10, "batch_size": 2, "batch_length": 4, "buffer_size": 1000, "model_size": "debug",
           "train_ratio": 8, "imagination_horizon": 2, "imagination_starts": 4}  # fmt: skip
RUN = Run("Pendulum-v1", "sac", 0, SETTINGS)


def pendulum():
    return make_vec_env(lambda: make_env("Pendulum-v1"), seed=0)


def train(run: Run, out: Path, args: argparse.Namespace) -> None:
    Trainer(run, out, args).train()


def options(steps: int, eval_every: int, eval_env: str | None = None) -> argparse.Namespace:
    given = dict(steps=steps, eval_every=eval_every, eval_env=eval_env, eval_episodes=2, save_every=0, threads=1)
    return argparse.Namespace(**given)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_is_read_back_with_its_last_row(tmp_path: Path):
    train(RUN, tmp_path, options(steps=40, eval_every=20))
    model, last = trained(tmp_path)
    assert (type(model), model.num_timesteps, last["step"]) == (SAC, 40, "40")


def test_of_a_run_that_was_killed_the_last_row_is_that_of_its_checkpoint(tmp_path: Path):
    train(RUN, tmp_path, options(steps=40, eval_every=40))
    append_row(tmp_path / "results.csv", COLUMNS, {"env": "Pendulum-v1", "step": 60})
    assert trained(tmp_path)[1]["step"] == "40"


@pytest.mark.parametrize(("normalize", "steps", "message"), [(True, 20, "--normalize"), (False, 0, "no checkpoint")])
def test_a_run_that_cannot_be_read_back_is_refused(tmp_path: Path, normalize: bool, steps: int, message: str):
    if steps:
        train(RUN._replace(normalize=normalize), tmp_path, options(steps, eval_every=steps))
    with pytest.raises(SystemExit, match=message):
        trained(tmp_path)


def test_overrides_are_python_literals_words_and_nested_names():
    words = ["learning_rate=1e-4", "device=cpu", "policy_kwargs.units=64", "policy_kwargs.sizes=(1, 2)"]
    expected = {"learning_rate": 1e-4, "device": "cpu", "policy_kwargs": {"units": 64, "sizes": (1, 2)}}
    assert parse_overrides(words) == expected


def test_an_override_without_value_is_refused():
    with pytest.raises(SystemExit, match="expected key=value"):
        parse_overrides(["learning_rate"])


def test_a_row_for_each_evaluation_and_a_resumed_run_continues_the_counts(tmp_path: Path):
    train(RUN, tmp_path, options(steps=40, eval_every=20))
    train(RUN, tmp_path, options(steps=60, eval_every=20))
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert [int(row["updates"]) for row in rows] == [10, 30, 50]
    seconds = [float(row["wall_clock"]) for row in rows]
    assert seconds == sorted(seconds)
    assert all(float(row["train_seconds"]) <= float(row["wall_clock"]) for row in rows)


def test_a_resumed_run_does_not_begin_with_the_episodes_of_before(tmp_path: Path):
    run = RUN._replace(overrides={**RUN.overrides, "learning_starts": 1000})
    for steps in (20, 40):
        train(run, tmp_path, options(steps, eval_every=20))
    replay = load_checkpoint(tmp_path, run, pendulum(), 40)[0].replay_buffer
    assert not np.allclose(replay.observations[0], replay.observations[20])
    assert not np.allclose(replay.actions[:20], replay.actions[20:40])


def test_a_baseline_is_not_continued_beyond_the_replay_of_its_first_steps(tmp_path: Path):
    run = RUN._replace(overrides={name: value for name, value in SETTINGS.items() if name != "buffer_size"})
    train(run, tmp_path, options(steps=20, eval_every=20))
    with pytest.raises(SystemExit, match="a run of 20 steps, as many as its replay: choose another --out"):
        train(run, tmp_path, options(steps=40, eval_every=20))


def test_evaluation_does_not_change_the_training(tmp_path: Path):
    for every in (20, 60):
        (tmp_path / str(every)).mkdir()
        train(RUN, tmp_path / str(every), options(steps=60, eval_every=every))
    often, once = rows_of(tmp_path / "20"), rows_of(tmp_path / "60")
    assert often[-1]["return_mean"] == once[-1]["return_mean"]


def test_observations_are_normalized_by_statistics_that_a_resumed_run_continues(tmp_path: Path):
    run = RUN._replace(normalize=True)
    counts = []
    for steps in (20, 40):
        train(run, tmp_path, options(steps, eval_every=20))
        statistics = VecNormalize.load(str(tmp_path / "checkpoint" / "vecnormalize.pkl"), pendulum())
        assert (statistics.norm_obs, statistics.norm_reward) == (True, False)
        counts.append(round(statistics.obs_rms.count))
    assert counts == [21, 42], "a reset and 20 steps each; evaluations do not count"
    assert all('"normalize": true' in row["settings"] for row in rows_of(tmp_path))


def test_a_rate_falls_to_zero_over_the_whole_run_however_often_learn_is_called():
    model = new_model(RUN._replace(overrides=SETTINGS | {"learning_rate": "lin_1e-3"}), pendulum(), 100)
    assert model.learning_rate == 1e-3
    rates = []
    for until in (40, 100):
        follow_schedule(model, "learning_rate", linear_schedule("lin_1e-3"), until, end=100)
        model.learn(until - model.num_timesteps, reset_num_timesteps=False)
        rates.append(model.actor.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3 * 0.6, 0])


def test_the_weight_of_the_entropy_falls_as_its_schedule_says_however_often_learn_is_called():
    run = RUN._replace(algo="dreamer", overrides=DREAMER | {"ent_coef": "lin_0.4_0.1_0.5"})
    model, weights = new_model(run, pendulum(), 100), []
    assert model.ent_coef == 0.4
    for until in (20, 40, 100):
        for name, schedule in schedules(run).items():
            follow_schedule(model, name, schedule, until, end=100)
        model.learn(until - model.num_timesteps, reset_num_timesteps=False)
        weights.append(model._ent_coef.item())
    assert weights == pytest.approx([0.28, 0.16, 0.1])
    assert schedules(RUN._replace(overrides={"ent_coef": "auto"})) == {}, "SAC's own"


def test_evaluation_may_be_in_another_environment(tmp_path: Path):
    random = Run("Recall", "ppo", 0, {"n_steps": 32, "batch_size": 32})
    for name in (None, "CartPole-no-velocity"):  # two numbers and two actions as well, but a reward for every step
        (tmp_path / str(name)).mkdir()
        train(random, tmp_path / str(name), options(32, 32, name))
    [own], [other] = rows_of(tmp_path / "None"), rows_of(tmp_path / "CartPole-no-velocity")
    assert own["train_return"] == other["train_return"]
    assert float(own["return_mean"]) in (-10, 0, 5, 10, 20)
    assert float(other["return_mean"]) >= 8  # no pole falls faster
    assert '"eval_env": "CartPole-no-velocity"' in other["settings"]


def test_checkpoint_survives_a_kill_between_the_two_renames(tmp_path: Path):
    model = new_model(RUN, pendulum(), decisions=100)
    save_checkpoint(tmp_path, model, RUN, Progress(step=7))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    loaded = load_checkpoint(tmp_path, RUN, pendulum(), 20)
    assert loaded is not None
    assert isinstance(loaded[0], SAC)
    assert loaded[1].step == 7


def test_checkpoint_survives_a_second_kill_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = new_model(RUN, pendulum(), decisions=100)
    save_checkpoint(tmp_path, model, RUN, Progress(step=7))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "checkpoint.new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model, RUN, Progress(step=8))
    loaded = load_checkpoint(tmp_path, RUN, pendulum(), 20)
    assert loaded is not None
    assert loaded[1].step == 7


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path, new_model(RUN, pendulum(), decisions=100), RUN, Progress())
    with pytest.raises(SystemExit, match="holds another run"):
        load_checkpoint(tmp_path, RUN._replace(seed=1), pendulum(), 20)


def test_a_folder_of_the_same_run_without_normalization_is_refused(tmp_path: Path):
    train(RUN, tmp_path, options(steps=20, eval_every=20))
    with pytest.raises(SystemExit, match="holds another run"):
        train(RUN._replace(normalize=True), tmp_path, options(steps=40, eval_every=20))


def test_a_checkpoint_written_before_a_column_of_run_existed_is_its_own(tmp_path: Path):
    save_checkpoint(tmp_path, new_model(RUN, pendulum(), decisions=100), RUN, Progress(step=7))
    file = tmp_path / "checkpoint" / "progress.json"
    stored = json.loads(file.read_text())
    del stored["run"]["init"]
    file.write_text(json.dumps(stored))
    loaded = load_checkpoint(tmp_path, RUN, pendulum(), 20)
    assert loaded is not None
    assert loaded[1].step == 7


def test_a_run_may_begin_with_what_another_has_learned(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    normal = RUN._replace(normalize=True)
    train(normal, tmp_path / "first", options(steps=40, eval_every=40))
    heir = normal._replace(init=str(tmp_path / "first"), overrides={"learning_rate": 0.0})
    train(heir, tmp_path / "second", options(steps=20, eval_every=20))
    [first], [at_once, later] = rows_of(tmp_path / "first"), rows_of(tmp_path / "second")
    assert [int(row["step"]) for row in (at_once, later)] == [0, 20]
    assert [int(row["updates"]) for row in (first, at_once, later)] == [30, 30, 40]
    first_agent, second_agent = (SAC.load(tmp_path / name / "checkpoint" / "model.zip") for name in ("first", "second"))
    for own, of_first in zip(second_agent.actor.parameters(), first_agent.actor.parameters(), strict=True):
        assert th.equal(own, of_first)
    with pytest.raises(SystemExit, match="the same --normalize"):
        train(RUN._replace(init=str(tmp_path / "first")), tmp_path, options(steps=20, eval_every=20))
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        train(RUN._replace(init=str(tmp_path)), tmp_path, options(steps=20, eval_every=20))


def test_who_begins_with_a_rate_that_has_fallen_says_with_which_to_go_on(tmp_path: Path):
    falling = RUN._replace(overrides=SETTINGS | {"learning_rate": "lin_1e-3"})
    (tmp_path / "first").mkdir()
    train(falling, tmp_path / "first", options(steps=20, eval_every=20))
    heir = RUN._replace(init=str(tmp_path / "first"), overrides={})
    with pytest.raises(SystemExit, match="its learning_rate has changed with its steps, give learning_rate="):
        new_model(heir, pendulum(), 20)
    assert new_model(heir._replace(overrides={"learning_rate": "lin_1e-3"}), pendulum(), 20).learning_rate == 1e-3


def test_an_environment_to_evaluate_in_that_does_not_fit_is_refused_before_a_step(tmp_path: Path):
    with pytest.raises(SystemExit, match="--eval-env CartPole-v1 has observations of another shape"):
        train(RUN, tmp_path, options(steps=20, eval_every=20, eval_env="CartPole-v1"))
    assert list(tmp_path.iterdir()) == []
