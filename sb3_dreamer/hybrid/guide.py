"""A teacher from SB3: loaded, checked to fit, shown what it is used to, and asked what it would do."""

from __future__ import annotations

import inspect
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_dreamer.acting import ActsWithDreamer
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.files import unpickled
from sb3_dreamer.policies import DreamerPolicy
from sb3_dreamer.spaces import by_key, check_counted_from_zero, parts_of


class Guide:
    """A teacher and what it is to be shown.

    :param model: whose environments it is asked about.
    :param teacher: this and the others as in :func:`~sb3_dreamer.hybrid.warm_start.warm_start`.
    :param vec_normalize: its statistics.
    :param deterministic: whether it acts without exploring.
    :param role: what messages call it.
    :raises ValueError: if it cannot act there.
    :raises TypeError: if it is nothing that acts.
    """

    def __init__(
        self,
        model: Dreamer,
        teacher: Any,
        vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None,
        deterministic: bool,
        role: str = "teacher",
    ) -> None:
        env = raw_env(model)
        normalised = getattr(teacher, "trained_on_normalized_obs", False)
        if isinstance(teacher, BaseAlgorithm):
            normalised |= saw_normalised(vars(teacher))
        if isinstance(teacher, str | pathlib.Path):
            teacher, normalised = load_policy(teacher, model.device)
        _check_predict(teacher, role)
        if vec_normalize is None and hasattr(teacher, "get_vec_normalize_env"):
            vec_normalize = teacher.get_vec_normalize_env()
        if vec_normalize is None and normalised:
            raise ValueError(
                f"the {role} was trained with VecNormalize and cannot act without its statistics: "
                "give vec_normalize=, the VecNormalize or the path that its save() wrote to; False, if this is wrong"
            )
        self.normalize = _statistics(vec_normalize, env, role) if vec_normalize else None
        policy = getattr(teacher, "policy", teacher)
        if isinstance(policy, BasePolicy) and not isinstance(policy, DreamerPolicy):
            check_counted_from_zero(env.action_space)
        self.teacher, self.deterministic, self.role = teacher, deterministic, role
        self.action_space = env.action_space
        self.memory: Any = None  # of a recurrent teacher
        for name in ("observation", "action"):
            given = getattr(env, f"{name}_space")
            own = getattr(teacher, f"{name}_space", given)
            if own not in (given, getattr(self.normalize, f"{name}_space", given)):
                raise ValueError(
                    f"the {role}'s {name}s are {own}, here they are {given}: "
                    "use the environment and the wrappers that it was trained with"
                )

    def answer(self, model: Dreamer) -> np.ndarray:
        """What the teacher would do now, in each of the model's environments: (n_envs, *shape) actions."""
        actions, self.memory = self.act(model.original_obs, self.memory, model._last_episode_starts)
        return actions

    def act(self, obs: Any, memory: Any, starts: np.ndarray | None) -> tuple[np.ndarray, Any]:
        """What the teacher would do: original observations (n, .) -> actions (n, *shape), its memory of them.

        Actions of a Box are clipped to its bounds, as SB3 clips them.

        :raises ValueError: if it gives something else than that.
        """
        shown = obs if self.normalize is None else self.normalize.normalize_obs(obs)
        given = self.teacher.predict(shown, memory, starts, self.deterministic)
        space, n = self.action_space, len(next(iter(by_key(obs).values())))
        shape = n, *(space.shape or ())
        pair = isinstance(given, tuple | list) and len(given) == 2
        if not pair or np.size(given[0]) != math.prod(shape):
            raise ValueError(
                f"the {self.role}'s predict() gave {given!r} for {n} observations: as SB3's it has to give a pair, "
                f"actions {shape} and what it remembers or None"
            )
        actions = np.reshape(given[0], shape)
        if isinstance(space, spaces.Box):
            actions = np.clip(actions, space.low, space.high).astype(space.dtype, copy=False)
        return actions, given[1]

    def with_action(self, memory: Any, taken: np.ndarray) -> Any:
        """Its memory once these actions (n, *shape) were taken: a Dreamer's holds them, others see what they did."""
        policy = getattr(self.teacher, "policy", self.teacher)
        if isinstance(policy, DreamerPolicy):
            return memory[0], policy.encode_action(taken)
        return self.teacher.with_action(memory, taken) if isinstance(self.teacher, ActsWithDreamer) else memory


def _check_predict(teacher: Any, role: str) -> None:
    if isinstance(teacher, type):
        raise TypeError(f"the {role} is the class {teacher.__name__}: give a model of it that has learned")
    predict = getattr(teacher, "predict", None)
    if not callable(predict):
        raise TypeError(
            f"the {role} is a {type(teacher).__name__}, which has no predict(): give a model of SB3 or the path of "
            "one, for a policy of Tianshou sb3_dreamer.tianshou.TianshouTeacher(policy)"
        )
    signature = inspect.signature(predict)
    try:
        signature.bind("observation", "state", "episode_start", "deterministic")
    except TypeError as error:
        raise TypeError(
            f"the {role} has predict{signature}: it is called as SB3's is, predict(observation, state, episode_start, "
            "deterministic), and gives (actions, state)"
        ) from error
    if "action_masks" in signature.parameters:
        raise ValueError(
            f"the {role} chooses among the actions that masks leave it, and Dreamer knows no masks: it would take "
            "forbidden ones. Use one whose environment understands every action"
        )


def _statistics(given: VecNormalize | str | pathlib.Path, env: VecEnv, role: str) -> VecNormalize:
    """A VecNormalize or what its save() wrote; without its load(), which asks for the same wrappers inside of it.

    :raises ValueError: if it normalises other observations than there are in these environments.
    """
    if isinstance(given, str | pathlib.Path):
        given = unpickled(given, "statistics of VecNormalize")
    if not isinstance(given, VecNormalize):
        raise ValueError(f"the {role}'s statistics are a {type(given).__name__}: give a VecNormalize")
    shapes = {key: part.shape for key, part in parts_of(env.observation_space).items()}
    for key, one in by_key(given.obs_rms).items() if given.norm_obs else ():
        if one.mean.shape != shapes.get(key):
            raise ValueError(f"the {role}'s statistics are of other observations than {env.observation_space}")
    return given


def raw_env(model: Dreamer) -> VecEnv:
    """The model's environments without normalisation."""
    normalize = model.get_vec_normalize_env()
    assert model.env is not None
    return model.env if normalize is None else normalize.venv


def saw_normalised(attributes: Mapping[str, Any]) -> bool:
    """Whether an SB3 algorithm, by what it keeps of its last step, was given normalised observations.

    On-policy ones keep an original observation only if their environment normalises, be it rewards alone. Off-policy
    ones always do; normalised ones are float32 and know no bounds, so that those of float64 environments, as MuJoCo's,
    and those beyond the bounds are told.

    :param attributes: of the algorithm, or out of its file.
    """
    seen, original = attributes.get("_last_obs"), attributes.get("_last_original_obs")
    if "train_freq" not in attributes:
        return original is not None
    if seen is None or original is None:
        return False
    space = attributes["observation_space"]
    if not isinstance(seen, dict):
        seen, original, space = ({"obs": part} for part in (seen, original, space))
    return any(
        part.dtype != original[key].dtype
        or (isinstance(space[key], spaces.Box) and bool(np.any((part < space[key].low) | (part > space[key].high))))
        for key, part in seen.items()
    )


def load_policy(path: str | pathlib.Path, device: th.device) -> tuple[BasePolicy | Dreamer, bool]:
    """What can act out of the file of any SB3 algorithm, and whether the file tells of a VecNormalize.

    :raises ValueError: if the file holds no algorithm of SB3.
    """
    data, params, _ = load_from_zip_file(path, device=device)
    if data is None or "policy" not in params:
        raise ValueError(f"{path} holds no algorithm of SB3: give the file that its save() wrote")
    if "described" in data:  # it brings neither its seed nor the folder of its replay
        teacher = Dreamer.load(path, device=device, seed=None, replay_buffer_kwargs={})
        return teacher, teacher.trained_on_normalized_obs
    kwargs = dict(data["policy_kwargs"])
    if data.get("use_sde"):
        kwargs["use_sde"] = True
    make = data["policy_class"]
    schedule = [lambda _: 0.0] if _takes_schedule(make) else []
    policy = make(data["observation_space"], data["action_space"], *schedule, **kwargs).to(device)
    policy.load_state_dict(params["policy"])
    return policy, saw_normalised(data)


def _takes_schedule(policy_class: type[BasePolicy]) -> bool:
    """Those of ARS have no gradient, and take no learning rate."""
    parameters = inspect.signature(policy_class).parameters
    return "lr_schedule" in parameters or any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
