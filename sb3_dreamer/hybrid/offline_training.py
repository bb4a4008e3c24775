"""Training outside of ``learn()``: updates from the replay alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from stable_baselines3.common.utils import configure_logger, get_latest_run_id

from sb3_dreamer.acting import require_dreamer, require_statistics
from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.environments import check_statistics
from sb3_dreamer.hybrid.progress import Advance, progress

UPDATES_PER_TICK = 16  # of the progress bar


def pretrain(model: Dreamer, updates: int, *, progress_bar: bool = False) -> None:
    """Learn from the replay alone: world model, actor and critic, without a step in an environment.

    :param model: the model.
    :param updates: number of gradient updates.
    :param progress_bar: show progress, as in ``learn()``.
    :raises ValueError: if the replay holds no sequence, or for less than one update.
    """
    require_replay(model, "pretrain()")
    updates = as_whole("updates", updates, least=1)
    model.check_settings()
    prepare_training(model)
    with progress(updates, "pretrain", progress_bar) as advance:
        train_until(model, model._n_updates + updates, advance)


def require_replay(model: Dreamer, who: str) -> None:
    """Refuse a model whose replay has no sequence to learn from.

    :param who: the caller's name, for the message.
    :raises ValueError: with what is missing; also if the model has learned with a VecNormalize that it does not have.
    :raises TypeError: if the model is not a Dreamer.
    """
    require_dreamer(model, who)
    if model.env is None:
        require_statistics(model, who, rewards=True)
    replay = model.replay_buffer
    if not replay.can_sample():
        raise ValueError(
            f"{who} needs experience, and the replay holds {replay.size()} entries, too few for a sequence of "
            f"{replay.sequence_length}: call learn(), warm_start(), add_experience() or load_replay_buffer() first"
        )


def prepare_training(model: Any) -> None:
    """Give a model what ``learn()`` sets up before training: a logger, and a learning rate schedule at its start.

    :param model: any SB3 algorithm.
    :raises ValueError: if its VecNormalize has statistics that are not finite, as in ``learn()``.
    """
    check_statistics(model, stacklevel=5)  # the caller of a method of Dreamer
    if not hasattr(model, "_logger"):
        model._logger = configure_logger(model.verbose)
    model._current_progress_remaining = 1.0  # a schedule that has run out would stop all learning


def begin_log(model: Any) -> None:
    """Make the TensorBoard folder of a new agent whose steps are already counted, if it logs to TensorBoard.

    Such an agent continues with ``learn(reset_num_timesteps=False)``, which logs to the newest folder of that name:
    without one of its own, that of another run.

    :param model: any SB3 algorithm that has not logged yet.
    """
    if model.tensorboard_log is not None:
        name = inspect.signature(model.learn).parameters["tb_log_name"].default
        newest = get_latest_run_id(model.tensorboard_log, name)
        Path(model.tensorboard_log, f"{name}_{newest + 1}").mkdir(parents=True, exist_ok=True)


def train_until(model: Dreamer, n_updates: int, advance: Advance) -> None:
    """Train until the model has made ``n_updates`` updates in total."""
    while (left := n_updates - model._n_updates) > 0:
        updates = min(UPDATES_PER_TICK, left)
        model.train(updates, model.batch_size)
        advance(updates)
