"""Experiment manager of rl_zoo3 with additions for Dreamer. Imports rl_zoo3: call ``register()`` before."""

from __future__ import annotations

import argparse
import difflib
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.zoo.registration import ALGO, hyperparams_file
from sb3_dreamer.zoo.schedules import linear_schedule

# hyperparameters that the Zoo uses itself
ZOO_KEYS = {
    "n_timesteps", "n_envs", "policy", "normalize", "frame_stack", "callback",
    "env_wrapper", "vec_env_wrapper", "env_kwargs", "monitor_kwargs",
}  # fmt: skip
# arguments of the constructor that the Zoo passes itself
PASSED_BY_ZOO = {"self", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"}


def experiment_manager(args: argparse.Namespace, algo: str, *rest: Any, **kwargs: Any) -> ExperimentManager:
    """Replaces rl_zoo3's class in ``rl_zoo3.train.train``; other algorithms get that class unchanged."""
    manager = DreamerExperiment if algo == ALGO else ExperimentManager
    return manager(args, algo, *rest, **kwargs)


class DreamerExperiment(ExperimentManager):
    """Finds the packaged hyperparameters, checks names, and writes the plots of a study to files.

    :param config: file of hyperparameters (``-conf``); None: the packaged one.
    """

    def __init__(self, *args: Any, config: str | None = None, **kwargs: Any) -> None:
        kwargs["config"] = config or str(hyperparams_file())
        super().__init__(*args, **kwargs)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in rl_zoo3, then checked.

        :raises ValueError: for a name or a number that would fail later, or be ignored.
        """
        if self.storage and self.study_name and self.trial_id == 0:  # rl_zoo3 takes 0 for "no trial"
            first = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = {**first, **(self.custom_hyperparams or {})}
        hyperparams, saved = super().read_hyperparameters()
        check_hyperparameters(hyperparams, self.config)
        return hyperparams, saved

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        """As in rl_zoo3, which does not know that ``ent_coef`` may be a schedule."""
        if isinstance(text := hyperparams.get("ent_coef"), str):
            hyperparams["ent_coef"] = linear_schedule(text)
        return ExperimentManager._preprocess_schedules(hyperparams)

    def load_trial(self, storage: str, study_name: str, trial_id: int | None = None, convert: bool = True) -> Any:
        """As in rl_zoo3.

        :raises ValueError: for a trial that the study does not have.
        """
        try:
            return super().load_trial(storage, study_name, trial_id, convert)
        except IndexError as error:
            raise ValueError(
                f'--trial-id {trial_id}: the study "{study_name}" in {storage} has fewer trials'
            ) from error

    def hyperparameters_optimization(self) -> None:
        """As in rl_zoo3, but its two plots are written next to the report: a server has no browser to show them."""
        draw, self.no_optim_plots = not self.no_optim_plots, True
        super().hyperparameters_optimization()
        if draw:
            reports = Path(self.log_folder, self.algo).glob(f"report_{self.env_name}_*.pkl")
            draw_study(max(reports, key=lambda report: report.stat().st_mtime))


def check_hyperparameters(hyperparams: dict[str, Any], source: str) -> None:
    """Refuse unknown names, and numbers that YAML parses as text.

    :param hyperparams: one block.
    :param source: the file it comes from, for the message.
    :raises ValueError: with the nearest known name, if there is one, or how to write the number.
    """
    known = sorted(ZOO_KEYS | inspect.signature(Dreamer.__init__).parameters.keys() - PASSED_BY_ZOO)
    for name, value in hyperparams.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            guess = f'; did you mean "{nearest[0]}"?' if nearest else "."
            available = f"Available: {', '.join(known)}"
            raise ValueError(
                f'"{name}" (from {source} or -params) is not a hyperparameter of Dreamer{guess} {available}'
            )
        if isinstance(value, str) and _is_number(value):
            raise ValueError(f"{name}: {value} is text to YAML; write {name}: !!float {value}")


def draw_study(report: Path) -> None:
    """Draw ``<report>_optimization_history.png`` and, if there are enough trials, ``<report>_param_importances.png``.

    :param report: the pickled study.
    """
    import matplotlib.pyplot as plt
    from optuna.exceptions import ExperimentalWarning
    from optuna.visualization import matplotlib as plots
    from wasabi import msg

    with report.open("rb") as file:
        study = pickle.load(file)
    for name in ("optimization_history", "param_importances"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # optuna calls its matplotlib plots so
                figure = getattr(plots, f"plot_{name}")(study).figure
        except (ValueError, RuntimeError, ImportError) as error:  # too few trials; scikit-learn, for optuna below 5
            msg.warn(f"No plot of {name}: {error}")
            continue
        figure.savefig(report.with_name(f"{report.stem}_{name}.png"), bbox_inches="tight")
        plt.close(figure)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
