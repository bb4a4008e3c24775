"""Dreams in the training log: numbers in every format, figures and videos in TensorBoard, each warning once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.logger import Figure, TensorBoardOutputFormat

from sb3_dreamer.acting import require_dreamer
from sb3_dreamer.callbacks import IntervalCallback
from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.collect import original_units
from sb3_dreamer.dreams.extras import MissingExtra, need
from sb3_dreamer.dreams.figures import check_dims, horizon_figure, open_loop_figure
from sb3_dreamer.dreams.horizon import HorizonError, horizon_errors
from sb3_dreamer.dreams.open_loop import OpenLoop, open_loop
from sb3_dreamer.dreams.trouble import RealReturns, find_trouble, signs_of
from sb3_dreamer.dreams.videos import Body, body_video, encode, image_video
from sb3_dreamer.types import Batch

NOT_FOR_PICTURES = ("stdout", "log", "json", "csv")
LONG_NAMES = ("stdout", "log")  # SB3 truncates names to 36 characters there, and refuses names that are equal then


class DreamCallback(IntervalCallback):
    """Logs dreams at regular intervals. It does not change the training, not even its random numbers.

    The sequences come from the replay, which the model may have memorized; ``python -m sb3_dreamer.dreams`` measures on
    new episodes, the harder test.

    >>> model.learn(100_000, callback=DreamCallback(every=10_000))

    :param every: environment steps from one evaluation of dreams to the next.
    :param context: entries that the model sees before it dreams on to the end of a sequence.
    :param sequences: replayed sequences to evaluate on.
    :param samples: dreams of each.
    :param dims: names of the dimensions to plot, such as ``obs[3]``; None: those with the largest error.
    :param body_env: environment of a MuJoCo task, not the one trained in: adds a video of the dreamed body.
    :raises ValueError: for counts below 1; when training starts, if arguments do not fit the model, or if it is inside
        of an ``EventCallback``.
    :raises TypeError: when training starts, for another algorithm.
    """

    model: Dreamer
    consequence = "would miss most rewards"

    def __init__(
        self,
        every: int = 10_000,
        context: int = 10,
        sequences: int = 16,
        samples: int = 16,
        dims: Sequence[str] | None = None,
        body_env: gym.Env | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.every = as_whole("every", every, least=1)
        self.context = as_whole("context", context, least=1)
        self.sequences = as_whole("sequences", sequences, least=1)
        self.samples = as_whole("samples", samples, least=1)
        self.dims = dims
        self.body = None if body_env is None else Body(body_env)
        self._real_returns: RealReturns | None = None
        self._last_evaluation = 0
        self._last_step = 0
        self._warned: set[str] = set()

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._check()
        continued = self._real_returns is not None and self.num_timesteps >= self._last_step
        if not continued:
            self._real_returns, self._last_evaluation = RealReturns(self.model.gamma), self.num_timesteps

    def _on_step(self) -> bool:
        assert self._real_returns is not None
        self._last_step = self.num_timesteps
        step = (self.locals[name] for name in ("rewards", "dones", "infos"))
        starts: Any = self.model._last_episode_starts
        self._real_returns.add(starts, *step)
        due = self.num_timesteps - self._last_evaluation >= self.every
        if due and self.model._n_updates > 0 and self.model.replay_buffer.can_sample():
            self._last_evaluation = self.num_timesteps
            self._evaluate(self._real_returns.mean)
        return True

    def _check(self) -> None:
        """Fail at the start rather than at the first evaluation."""
        model = self.model
        require_dreamer(model, "DreamCallback")
        if self.context >= model.batch_length:
            raise ValueError(f"context={self.context} must be below batch_length={model.batch_length}")
        check_dims(model.policy.world_model.decoder.specs, self.dims)
        if self.body is not None and self.body.env.observation_space != model.observation_space:
            raise ValueError("body_env has another observation space than the environment: pass one of the same task")

    def _evaluate(self, real_return: float) -> None:
        model = self.model
        on_cuda = [model.device] if model.device.type == "cuda" else []
        with th.random.fork_rng(on_cuda):
            th.manual_seed(0)  # the same noise each time
            batch = model.replay_buffer.peek(self.sequences, env=model.get_vec_normalize_env())
            rollout = open_loop(model.policy, batch, self.context, self.samples)
            errors = horizon_errors(rollout)
            self._record_numbers(batch, errors, real_return)
            self._record_pictures(rollout, errors)

    def _record_numbers(self, batch: Batch, errors: dict[str, HorizonError], real_return: float) -> None:
        for name, error in errors.items():
            for k in error.steps:
                for kind, row in (("error", error.dream), ("persistence", error.persistence), ("mean", error.mean)):
                    self.logger.record(f"dreams/{name}_{kind}_{k}", float(row[k - 1]), exclude=LONG_NAMES)
        signs = signs_of(self.model, batch, errors, real_return)
        for name, sign in signs.items():
            self.logger.record(f"dreams/{name}", sign)
        for name, message in find_trouble(signs).items():
            self._warn(name, f"{message} (at {self.num_timesteps} steps; shown once)")

    def _record_pictures(self, rollout: OpenLoop, errors: dict[str, HorizonError]) -> None:
        writers = [out.writer for out in self.logger.output_formats if isinstance(out, TensorBoardOutputFormat)]
        if not writers:
            return
        first = int(rollout.best_sequences[0])
        figures: dict[str, Callable[[], Any]] = {
            "open_loop": partial(open_loop_figure, rollout, first, self.dims),
            "horizon_error": partial(horizon_figure, errors),
        }
        for name, draw in figures.items():
            try:
                self.logger.record(f"dreams/{name}", Figure(draw(), close=True), exclude=NOT_FOR_PICTURES)
            except MissingExtra as error:
                self._warn("matplotlib", str(error))
        images = [key for key, spec in rollout.specs.items() if spec.kind == "image"]
        films: dict[str, Callable[[], np.ndarray]] = {key: partial(image_video, rollout, first, key) for key in images}
        if self.body is not None:
            films["body"] = partial(body_video, rollout, first, self.body, self._in_units)
        for name, film in films.items():
            try:
                add_gif(writers, f"dreams/{name}_video", film(), self.num_timesteps)
            except MissingExtra as error:
                self._warn(f"{name}_video", str(error))

    def _in_units(self, obs: np.ndarray) -> np.ndarray:
        return original_units(self.model.get_env(), obs)

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(message, stacklevel=2)


def add_gif(writers: list[Any], tag: str, frames: np.ndarray, step: int) -> None:
    """Write a video to TensorBoard as an animated image.

    SB3's own ``Video`` goes through torch's ``add_video``, which writes nothing with moviepy 2 or newer.

    :param writers: TensorBoard's summary writers.
    :param tag: name of the video.
    :param frames: (T, height, width, 3) uint8.
    :param step: environment steps so far.
    :raises MissingExtra: without moviepy.
    """
    summary = need("tensorboard.compat.proto.summary_pb2", "dreams").Summary
    _, height, width, _ = frames.shape
    gif = encode(frames, ".gif")
    image = summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    for writer in writers:
        writer.file_writer.add_summary(summary(value=[summary.Value(tag=tag, image=image)]), step)
