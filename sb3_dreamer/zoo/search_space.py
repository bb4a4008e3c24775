"""The hyperparameters of Dreamer that a study searches.

Those that determine the cost of a trial are left to the user: ``model_size``, ``train_ratio`` and the shape of a batch
(``-params "model_size:'size12m'" train_ratio:512``). In the few steps of a trial, larger ones are nearly always better,
so a study would only find the most expensive ones. The space is static, because the Zoo's TPE sampler is multivariate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


def sample_dreamer_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """Draw arguments of Dreamer's constructor; rl_zoo3 calls it once for each trial.

    :param trial: the trial to draw for.
    :param n_actions: not used.
    :param n_envs: not used.
    :param additional_args: not used, for HER.
    """
    sampled = {
        # The paper's 4e-5 is for 100 times more updates than a laptop can run.
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 1e-3, log=True),
        # A slow actor keeps exploring, a fast critic keeps up with it; the paper uses 1 and 1.
        "actor_lr_scale": trial.suggest_float("actor_lr_scale", 0.05, 1.0, log=True),
        "critic_lr_scale": trial.suggest_float("critic_lr_scale", 1.0, 8.0, log=True),
        # Horizons of 30 to 1000 steps.
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 1e-3, 0.03, log=True),
        # 0.5 relies on the critic after 2 steps, 0.99 only at the end of the dream.
        "one_minus_gae_lambda": trial.suggest_float("one_minus_gae_lambda", 0.01, 0.5, log=True),
        # Returns are divided by their range, so the paper uses one value for all tasks; this range is around it.
        "ent_coef": trial.suggest_float("ent_coef", 3e-5, 1e-2, log=True),
        "imagination_horizon": trial.suggest_int("imagination_horizon", 5, 25, step=5),
    }
    params = convert_dreamer_params(sampled)
    for name in ("gamma", "gae_lambda"):  # for the report
        trial.set_user_attr(name, params[name])
    return params


def convert_dreamer_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """Convert the parameters of a study to arguments of the constructor; also used by ``--trial-id``.

    :param sampled_params: ``one_minus_<name>`` stands for ``1 - <name>``.
    """
    params: dict[str, Any] = {}
    for name, value in sampled_params.items():
        if name.startswith("one_minus_"):
            params[name.removeprefix("one_minus_")] = 1 - value
        else:
            params[name] = value
    return params
