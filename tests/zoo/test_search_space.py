import inspect
import pickle

import optuna
import pytest

from sb3_dreamer import Dreamer
from sb3_dreamer.zoo import register
from sb3_dreamer.zoo.search_space import convert_dreamer_params, sample_dreamer_params


@pytest.fixture(scope="module")
def trials():
    """Forty draws: (arguments for Dreamer, the finished trial)."""
    sampled = []

    def objective(trial: optuna.Trial) -> float:
        sampled.append(sample_dreamer_params(trial, 1, 1, {}))
        return 0.0

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=40)
    return list(zip(sampled, study.trials, strict=True))


def test_every_sampled_name_is_an_argument_of_the_constructor(trials):
    arguments = inspect.signature(Dreamer.__init__).parameters.keys()
    assert all(params.keys() <= arguments for params, _ in trials)


def test_a_trial_read_from_a_study_gives_the_same_arguments(trials):
    assert all(convert_dreamer_params(trial.params) == params for params, trial in trials)


def test_the_space_is_the_same_for_every_trial(trials):
    assert len({tuple(trial.distributions.items()) for _, trial in trials}) == 1


def test_values_stay_where_a_practitioner_would_look(trials):
    for params, _ in trials:
        assert 3e-5 <= params["learning_rate"] <= 1e-3
        assert 0.97 <= params["gamma"] <= 0.999
        assert 0.5 <= params["gae_lambda"] <= 0.99
        assert params["imagination_horizon"] in (5, 10, 15, 20, 25)


def test_defaults_of_the_constructor_lie_inside_the_space(trials):
    defaults = {name: p.default for name, p in inspect.signature(Dreamer.__init__).parameters.items()}
    for name in trials[0][0]:
        drawn = [params[name] for params, _ in trials]
        assert min(drawn) <= defaults[name] <= max(drawn), name


def test_the_report_shows_the_values_themselves(trials):
    for params, trial in trials:
        assert trial.user_attrs == {name: params[name] for name in ("gamma", "gae_lambda")}


def test_what_sets_the_price_of_a_trial_is_left_to_the_user(trials):
    price = {"model_size", "policy_kwargs", "train_ratio", "batch_size", "batch_length", "imagination_starts"}
    assert not any(price & params.keys() for params, _ in trials)


def test_a_study_becomes_two_pictures(tmp_path):
    register()
    from sb3_dreamer.zoo.experiment import draw_study

    def objective(trial: optuna.Trial) -> float:
        return sample_dreamer_params(trial, 1, 1, {})["gamma"]

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=12)
    report = tmp_path / "report.pkl"
    report.write_bytes(pickle.dumps(study))
    draw_study(report)
    pictures = {"report_optimization_history.png", "report_param_importances.png"}
    assert {file.name for file in tmp_path.glob("*.png")} == pictures


def test_the_first_trial_of_a_study_is_a_trial_too(tmp_path, monkeypatch):
    register()
    from rl_zoo3.exp_manager import ExperimentManager

    from sb3_dreamer.zoo.experiment import DreamerExperiment

    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage, study_name="first")
    study.optimize(lambda trial: float(bool(sample_dreamer_params(trial, 1, 1, {}))), n_trials=1)
    experiment = DreamerExperiment.__new__(DreamerExperiment)
    settings = dict(storage=storage, study_name="first", trial_id=0, algo="dreamer", config="", custom_hyperparams=None)
    experiment.__dict__.update({**settings, "custom_hyperparams": {"ent_coef": 0.5}})
    monkeypatch.setattr(ExperimentManager, "read_hyperparameters", lambda self: (self.custom_hyperparams, {}))
    read, _ = experiment.read_hyperparameters()
    assert read == {**convert_dreamer_params(study.trials[0].params), "ent_coef": 0.5}
    with pytest.raises(ValueError, match=r'--trial-id 7: the study "first" in sqlite:.* has fewer trials'):
        experiment.load_trial(storage, "first", 7)


def test_a_picture_that_cannot_be_drawn_does_not_end_the_study(tmp_path, monkeypatch, capsys):
    register()
    from optuna.visualization import matplotlib as plots

    from sb3_dreamer.zoo.experiment import draw_study

    def needs_sklearn(study: optuna.Study) -> None:
        raise ImportError("Tried to import 'sklearn' but failed")

    monkeypatch.setattr(plots, "plot_param_importances", needs_sklearn)
    report = tmp_path / "report.pkl"
    study = optuna.create_study()
    study.optimize(lambda trial: sample_dreamer_params(trial, 1, 1, {})["gamma"], n_trials=2)
    report.write_bytes(pickle.dumps(study))
    draw_study(report)
    assert [file.name for file in tmp_path.glob("*.png")] == ["report_optimization_history.png"]
    assert "No plot of param_importances: Tried to import 'sklearn'" in capsys.readouterr().out
