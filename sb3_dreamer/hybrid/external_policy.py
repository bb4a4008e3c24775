"""A policy from outside, such as one of SB3: loaded, checked, given the observations that it knows, and queried."""

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
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_dreamer.acting import ActsWithDreamer
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.files import unpickled
from sb3_dreamer.policies import DreamerPolicy
from sb3_dreamer.spaces import by_key, check_counted_from_zero, parts_of


class ExternalPolicy:
    """A policy that acts in a model's environments, with the statistics of its own VecNormalize.

    :meth:`predict` is pure. :meth:`act` and :meth:`observe_action` keep its memory between the steps of a model.

    :param model: the model in whose environments it acts.
    :param policy: like ``teacher`` of :func:`~sb3_dreamer.hybrid.warm_start.warm_start`.
    :param vec_normalize: as there.
    :param deterministic: whether it acts without exploration.
    :param role: its name in messages.
    :raises ValueError: if it cannot act there.
    :raises TypeError: if it has no ``predict`` as in SB3.
    """

    def __init__(
        self,
        model: Dreamer,
        policy: Any,
        vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None,
        deterministic: bool,
        role: str = "teacher",
    ) -> None:
        env = raw_env(model)
        normalized = getattr(policy, "trained_on_normalized_obs", False)
        if isinstance(policy, BaseAlgorithm):
            normalized |= saw_normalized(vars(policy))
        if isinstance(policy, str | pathlib.Path):
            policy, normalized = load_policy(policy, model.device)
        _check_predict(policy, role)
        if vec_normalize is None and hasattr(policy, "get_vec_normalize_env"):
            vec_normalize = policy.get_vec_normalize_env()
        if vec_normalize is None and normalized:
            raise ValueError(
                f"the {role} seems to be trained with VecNormalize and cannot act without its statistics: give "
                "vec_normalize=, the VecNormalize or the path that its save() wrote to; False if it was trained without"
            )
        self.normalize = _statistics(vec_normalize, env, role) if vec_normalize else None
        network = getattr(policy, "policy", policy)
        if isinstance(network, BasePolicy) and not isinstance(network, DreamerPolicy):
            check_counted_from_zero(env.action_space)
        self.policy, self.deterministic, self.role = policy, deterministic, role
        self.action_space = env.action_space
        self.memory: Any = None  # of a recurrent policy
        for name in ("observation", "action"):
            given = getattr(env, f"{name}_space")
            own = getattr(policy, f"{name}_space", given)
            if own not in (given, getattr(self.normalize, f"{name}_space", given)):
                raise ValueError(
                    f"the {role}'s {name}s are {own}, here they are {given}: "
                    "use the environment and the wrappers that it was trained with"
                )

    def act(self, model: Dreamer) -> np.ndarray:
        """Its actions at the present observations of the model's environments, (n_envs, *shape)."""
        actions, self.memory = self.predict(model.original_obs, self.memory, model._last_episode_starts)
        return actions

    def observe_action(self, taken: np.ndarray) -> None:
        """Remember which actions (n_envs, *shape) were taken after :meth:`act`, see :meth:`with_action`."""
        self.memory = self.with_action(self.memory, taken)

    def predict(self, obs: Any, memory: Any, starts: np.ndarray | None) -> tuple[np.ndarray, Any]:
        """Original observations (n, .) -> actions (n, *shape) and its new memory.

        Actions of a Box are clipped to its bounds, as in SB3, and rounded if they must be integers.

        :raises ValueError: if the policy returns anything but actions of the space.
        """
        seen = obs if self.normalize is None else self.normalize.normalize_obs(obs)
        result = self.policy.predict(seen, memory, starts, self.deterministic)
        space, n = self.action_space, len(next(iter(by_key(obs).values())))
        shape = n, *(space.shape or ())
        pair = isinstance(result, tuple | list) and len(result) == 2
        if not pair or np.size(result[0]) != math.prod(shape):
            raise ValueError(
                f"the {self.role}'s predict() returned {_form(result)} for {n} observations: it must return a pair "
                f"as in SB3, actions {shape} and its state or None"
            )
        return self._into_space(np.reshape(result[0], shape)), result[1]

    def _into_space(self, actions: np.ndarray) -> np.ndarray:
        space = self.action_space
        if np.isnan(actions).any():
            raise ValueError(f"the {self.role}'s predict() returned NaN for {len(actions)} observations")
        if isinstance(space, spaces.Box):
            clipped = np.clip(actions, space.low, space.high)
            whole = np.issubdtype(space.dtype, np.integer)
            return (np.rint(clipped) if whole else clipped).astype(space.dtype, copy=False)
        with np.errstate(invalid="ignore"):  # infinity
            choices = actions.astype(space.dtype)
        if (choices != actions).any() or not all(map(space.contains, choices)):
            raise ValueError(f"the {self.role}'s predict() returned {actions.tolist()}: not all are in {space}")
        return choices

    def with_action(self, memory: Any, taken: np.ndarray) -> Any:
        """Its memory after these actions (n, *shape): a Dreamer's includes them, others observe their consequences."""
        network = getattr(self.policy, "policy", self.policy)
        if isinstance(network, DreamerPolicy):
            return memory[0], network.actions.encode(taken)
        return self.policy.with_action(memory, taken) if isinstance(self.policy, ActsWithDreamer) else memory


def _form(result: Any) -> str:
    """Type and shapes of what predict() returned, for a message."""
    if isinstance(result, np.ndarray):
        return f"an array {result.shape}"
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {', '.join(map(_form, result)) or 'nothing'}"
    return f"a {type(result).__name__}"


def _check_predict(policy: Any, role: str) -> None:
    if isinstance(policy, type):
        raise TypeError(f"the {role} is the class {policy.__name__}: give a trained model of it")
    predict = getattr(policy, "predict", None)
    if not callable(predict):
        raise TypeError(
            f"the {role} is a {type(policy).__name__}, which has no predict(): give a model of SB3 or the path of "
            "one, for a policy of Tianshou sb3_dreamer.tianshou.TianshouTeacher(policy)"
        )
    signature = inspect.signature(predict)
    try:
        signature.bind("observation", "state", "episode_start", "deterministic")
    except TypeError as error:
        raise TypeError(
            f"the {role} has predict{signature}: it is called as in SB3, predict(observation, state, episode_start, "
            "deterministic), and returns (actions, state)"
        ) from error
    if "action_masks" in signature.parameters:
        raise ValueError(
            f"the {role} chooses among the actions that a mask allows, and Dreamer has no masks: it would take "
            "forbidden actions. Use one whose environment accepts every action"
        )


def _statistics(given: VecNormalize | str | pathlib.Path, env: VecEnv, role: str) -> VecNormalize:
    """A VecNormalize, or the one that its save() wrote; not by its load(), which requires the same inner wrappers.

    :raises ValueError: if it normalizes other observations than those of these environments.
    """
    if isinstance(given, str | pathlib.Path):
        given = unpickled(given, "statistics of VecNormalize")
    if not isinstance(given, VecNormalize):
        raise ValueError(f"the {role}'s statistics are a {type(given).__name__}: give a VecNormalize")
    shapes = {key: part.shape for key, part in parts_of(env.observation_space).items()}
    if given.norm_obs:
        for key, moments in by_key(given.obs_rms).items():
            if moments.mean.shape != shapes.get(key):
                raise ValueError(f"the {role}'s statistics are of other observations than {env.observation_space}")
    return given


def raw_env(model: Dreamer) -> VecEnv:
    """The model's environments without normalization."""
    normalize = model.get_vec_normalize_env()
    assert model.env is not None
    return model.env if normalize is None else normalize.venv


def saw_normalized(attributes: Mapping[str, Any]) -> bool:
    """Whether an SB3 algorithm saw normalized observations, judging by what it keeps of its last step.

    On-policy algorithms keep an original observation only if their environment normalizes, be it only the rewards.
    Off-policy ones always keep one. If they have an environment, their observations came from it, and it shows whether
    it normalizes. Otherwise this is a guess: normalized observations are float32 and unbounded, so they are recognized
    if the original ones are float64, as in MuJoCo, or if they exceed the bounds of the space.

    :param attributes: of the algorithm, or from its file.
    """
    seen, original, env = (attributes.get(name) for name in ("_last_obs", "_last_original_obs", "env"))
    if "train_freq" not in attributes:
        return original is not None
    if env is not None:
        return unwrap_vec_normalize(env) is not None
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
    """The policy in the file of any SB3 algorithm, and whether it saw normalized observations.

    :raises ValueError: if the file holds no algorithm of SB3.
    """
    data, params, _ = load_from_zip_file(path, device=device)
    if data is None or "policy" not in params:
        raise ValueError(f"{path} holds no algorithm of SB3: give the file that its save() wrote")
    if "described" in data:  # without its seed, and without the folder of its replay
        teacher = Dreamer.load(path, device=device, seed=None, replay_buffer_kwargs={})
        return teacher, teacher.trained_on_normalized_obs
    kwargs = dict(data["policy_kwargs"])
    if data.get("use_sde"):
        kwargs["use_sde"] = True
    make = data["policy_class"]
    schedule = [lambda _: 0.0] if _takes_schedule(make) else []
    policy = make(data["observation_space"], data["action_space"], *schedule, **kwargs).to(device)
    policy.load_state_dict(params["policy"])
    return policy, saw_normalized(data)


def _takes_schedule(policy_class: type[BasePolicy]) -> bool:
    """Policies of ARS have no gradient, and take no learning rate."""
    parameters = inspect.signature(policy_class).parameters
    return "lr_schedule" in parameters or any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
