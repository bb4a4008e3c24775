"""Public methods of Dreamer that live in optional subpackages, which are imported when the methods are called."""

from __future__ import annotations

import pathlib
from typing import Any, Literal, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)
Self = TypeVar("Self", bound="OptionalMethods")


class OptionalMethods:
    """From other agents to Dreamer, from Dreamer to other agents, and on after an interruption. Of Dreamer alone."""

    @classmethod
    def resume(cls: type[Self], folder: str | pathlib.Path, env: GymEnv | str, **kwargs: Any) -> Self:
        """Go on from the newest checkpoint of a ``ResumeCallback``, see :func:`sb3_dreamer.resume.resume`."""
        from sb3_dreamer.resume import resume

        return resume(cls, folder, env, **kwargs)  # type: ignore[type-var]

    def warm_start(
        self: Self,
        teacher: Any,
        n_steps: int,
        *,
        vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
        deterministic: bool = True,
        updates: int | None = None,
        fade_steps: int | None = None,
        student_share: float = 0.5,
        progress_bar: bool = False,
    ) -> Self:
        """Learn from a teacher first, see :func:`sb3_dreamer.hybrid.warm_start.warm_start`."""
        from sb3_dreamer.hybrid.warm_start import warm_start

        warm_start(
            self,  # type: ignore[arg-type]
            teacher,
            n_steps,
            vec_normalize=vec_normalize,
            deterministic=deterministic,
            updates=updates,
            fade_steps=fade_steps,
            student_share=student_share,
            progress_bar=progress_bar,
        )
        return self

    def add_experience(self: Self, source: Any, *, time_limit: int | None = None) -> Self:
        """Add recorded experience to the replay, see :func:`sb3_dreamer.hybrid.experience.add_experience`."""
        from sb3_dreamer.hybrid.experience import add_experience

        add_experience(self, source, time_limit=time_limit)  # type: ignore[arg-type]
        return self

    def pretrain(self: Self, updates: int, *, progress_bar: bool = False) -> Self:
        """Learn from the replay alone, see :func:`sb3_dreamer.hybrid.offline_training.pretrain`."""
        from sb3_dreamer.hybrid.offline_training import pretrain

        pretrain(self, updates, progress_bar=progress_bar)  # type: ignore[arg-type]
        return self

    def to_model_free(
        self,
        algorithm: type[Algorithm],
        env: GymEnv | str | None = None,
        *,
        on: Literal["observations", "latents"] = "observations",
        updates: int = 20_000,
        critic_updates: int = 6_000,
        transitions: int = 5_000,
        progress_bar: bool = False,
        **kwargs: Any,
    ) -> Algorithm:
        """A plain SB3 algorithm that continues from here, see :func:`sb3_dreamer.hybrid.hand_over.to_model_free`."""
        from sb3_dreamer.hybrid.hand_over import to_model_free

        return to_model_free(
            self,  # type: ignore[arg-type]
            algorithm,
            env,
            on=on,
            updates=updates,
            critic_updates=critic_updates,
            transitions=transitions,
            progress_bar=progress_bar,
            **kwargs,
        )
