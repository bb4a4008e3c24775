"""From Dreamer to a plain SB3 algorithm that continues where Dreamer stopped."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.distillation import AnyTargets, action_values, distillation_targets, latent_observations
from sb3_dreamer.hybrid.experience import update_statistics
from sb3_dreamer.hybrid.latent_env import LatentVecEnv
from sb3_dreamer.hybrid.offline_training import begin_log, require_replay
from sb3_dreamer.hybrid.progress import progress
from sb3_dreamer.hybrid.real_states import RealStates, real_states
from sb3_dreamer.hybrid.students import NORMALIZED_RELU, family_of, start_slowly, teach, teach_critics
from sb3_dreamer.knobs import at_progress
from sb3_dreamer.replay import Episode, Transition, read_episodes
from sb3_dreamer.spaces import as_observation, check_actions_of_sb3, check_counted_from_zero, policy_for

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

LEAST_ENT_COEF = 3e-5  # a temperature near zero, which a schedule may end at, would take SAC very long to raise
MAX_ENTRIES = 50_000  # of the replay, the newest, from which the policy is learned


def to_model_free(
    model: Dreamer,
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
    """A plain SB3 algorithm with Dreamer's policy, Dreamer's values, and Dreamer's newest experience.

    PPO stays near the policy that it was given. SAC, TD3, DDPG and TQC follow the slope of their critics: they start
    slowly, and their networks have layer normalization, which bounds the errors of the critics;
    ``policy_kwargs=dict(activation_fn=torch.nn.ReLU)`` is SB3's own.

    :param model: a trained Dreamer with its replay.
    :param algorithm: SAC, TD3, DDPG, TQC, CrossQ, PPO, A2C, TRPO, or a class derived from one of them.
    :param env: environment to continue in or its id; None: Dreamer's own, which Dreamer resets whenever it learns after
        that. If both are to learn in turns, give another one here: other algorithms do not reset. A VecNormalize around
        it receives Dreamer's statistics; if Dreamer has none it learns from the replay, if it is training.
    :param on: what the new policy observes. "latents" are the features of Dreamer's model state, for tasks that need
        memory: the algorithm's environment then is a :class:`~sb3_dreamer.hybrid.LatentVecEnv`.
    :param updates: minibatches for the policy.
    :param critic_updates: minibatches for off-policy critics, on Dreamer's action values.
    :param transitions: the newest entries of Dreamer's replay that an off-policy algorithm receives, as far as it has
        room. Older ones are of other policies, and critics that learn from them forget the values of this one.
    :param progress_bar: show progress, as in ``learn()``: minibatches of both together.
    :param kwargs: constructor arguments of the algorithm; they override those chosen here.
    :raises ValueError: for other spaces, an algorithm that cannot take over, an empty replay, and a Dreamer that has
        not learned yet; before any work.
    :raises TypeError: if ``algorithm`` is not an algorithm class.
    """
    require_replay(model, "to_model_free()")
    if model._n_updates == 0:
        raise ValueError("this Dreamer has not learned anything to hand over yet: call learn() or pretrain() first")
    updates, critic_updates = as_whole("updates", updates, least=0), as_whole("critic_updates", critic_updates, least=0)
    student: Any = _new_student(model, algorithm, env, on, kwargs)
    target_entropy = getattr(student, "target_entropy", None)
    off_policy = isinstance(student, OffPolicyAlgorithm)
    if off_policy:  # two entries of each environment
        transitions = as_whole("transitions", transitions, least=2 * max(model.n_envs, student.n_envs))
    begin_log(student)
    total = updates + (critic_updates if off_policy else 0)
    with progress(total, algorithm.__name__, progress_bar) as advance:
        real = real_states(model, MAX_ENTRIES)
        policy_targets = distillation_targets(model, real, student.gamma, on == "latents")
        teach(student, _as_seen(model, student, policy_targets), updates, advance)
        if "target_entropy" in kwargs:
            student.target_entropy = target_entropy
        if off_policy:
            buffer = student.replay_buffer
            entries = min(transitions, buffer.buffer_size * buffer.n_envs)
            newest = list(read_episodes(model.replay_buffer, entries))
            if on == "latents" and newest:
                newest = list(_latent_episodes(model, real_states(model, entries)))
            fill_replay(buffer, newest)
            values = action_values(model, real, student.gamma, on == "latents")
            teach_critics(student, _as_seen(model, student, values), critic_updates, advance)
            if buffer.size() > 0:
                start_slowly(student)
    student.num_timesteps = model.num_timesteps
    if env is None or _shared(env, model.env):
        model.lent_env = model.env
    return student


def _shared(one: GymEnv | str, other: VecEnv | None) -> bool:
    """Whether both contain the same environment, whatever is wrapped around it."""
    vectors = [getattr(env, "unwrapped", env) for env in (one, other)]
    mine, theirs = ({id(env), *(id(sub.unwrapped) for sub in getattr(env, "envs", ()))} for env in vectors)
    return not mine.isdisjoint(theirs)


def _new_student(
    model: Dreamer, algorithm: type[Algorithm], env: GymEnv | str | None, on: str, kwargs: dict[str, Any]
) -> Algorithm:
    """An untrained algorithm with settings that suit one that receives a trained policy.

    :raises ValueError: if it cannot take over from this model.
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm)):
        raise TypeError(f"algorithm must be an algorithm class of SB3, not {algorithm!r}")
    if on not in ("observations", "latents"):
        raise ValueError(f'on="{on}" is unknown; use "observations" or "latents"')
    if env is None and model.env is None:
        raise ValueError("this model was loaded without an environment: give env=, or load it with one")
    known = _arguments(algorithm)
    settings: dict[str, Any] = {"device": model.device}
    if "learning_starts" in known:
        settings["learning_starts"] = 0  # otherwise it would start with random actions
    if "target_entropy" in known:
        ent_coef = at_progress("ent_coef", model.ent_coef, model._current_progress_remaining)
        temperature = max(ent_coef, LEAST_ENT_COEF) * model.policy.return_scale.scale.item()
        settings["ent_coef"] = f"auto_{temperature:.6g}"
    settings.update(copy.deepcopy(kwargs))
    if "tau" in known:  # not CrossQ, which has norms of its own
        settings["policy_kwargs"] = {"activation_fn": NORMALIZED_RELU, **(settings.get("policy_kwargs") or {})}
    if settings.get("use_sde") or settings.get("optimize_memory_usage"):
        raise ValueError("to_model_free() supports neither use_sde nor optimize_memory_usage: leave them False")
    wrapped = model._wrap_env(env, model.verbose) if env is not None else model.env
    assert wrapped is not None
    _check_env(model, wrapped, on)
    student_env = LatentVecEnv(model, wrapped) if on == "latents" else wrapped
    policy = settings.pop("policy", policy_for(student_env.observation_space))
    if isinstance(policy, str) and policy not in algorithm.policy_aliases:
        raise ValueError(
            f"{algorithm.__name__} has no {policy}, only {', '.join(algorithm.policy_aliases)}: use another algorithm, "
            'or on="latents", which needs MlpPolicy'
        )
    try:
        student = algorithm(policy, student_env, **settings)
    except (AssertionError, RuntimeError) as error:  # such as images too small for SB3's own network
        raise ValueError(f"{algorithm.__name__} cannot take over here: {error}") from error
    family_of(student)
    _share_statistics(model, wrapped)
    return student


def _arguments(algorithm: type[BaseAlgorithm]) -> set[str]:
    """Names of its constructor's arguments, including those that it passes on to its base classes."""
    known: set[str] = set()
    for base in algorithm.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            known |= parameters.keys()
            if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
                break
    return known


def _check_env(model: Dreamer, env: Any, on: str) -> None:
    if env.observation_space != model.observation_space or env.action_space != model.action_space:
        raise ValueError(
            f"env has {env.observation_space} and {env.action_space}, the model {model.observation_space} and "
            f"{model.action_space}: use an environment with the same spaces and wrappers"
        )
    check_actions_of_sb3(env.action_space)
    if on == "observations":
        check_counted_from_zero(env.observation_space)
    own, other = model.get_vec_normalize_env(), unwrap_vec_normalize(env)
    if own is None and (other is None or (on == "observations" and not other.norm_reward)):
        return
    if own is None or other is None:
        raise ValueError(
            "only one of env and Dreamer's environment has a VecNormalize: wrap env as Dreamer's is. Around env "
            'alone it may normalize what on="observations" sees, but not the rewards: norm_reward=False'
        )
    for name in ("norm_obs", "norm_obs_keys", "norm_reward", "clip_obs", "clip_reward", "epsilon", "gamma"):
        if (here := getattr(own, name, None)) != (there := getattr(other, name, None)):
            raise ValueError(
                f"VecNormalize has {name}={there} around env and {here} around Dreamer's environment: what the new "
                "algorithm learns from is normalized as for Dreamer, so give both the same settings"
            )


def _share_statistics(model: Dreamer, env: VecEnv) -> None:
    """Give env Dreamer's statistics: what the student learns from is normalized with them, so its input must be too."""
    own, other = model.get_vec_normalize_env(), unwrap_vec_normalize(env)
    if own is None and other is not None and other.norm_obs and other.training:
        for episode in read_episodes(model.replay_buffer, MAX_ENTRIES):
            update_statistics(other, episode)
    for name in ("obs_rms", "ret_rms"):
        if other is not own and hasattr(own, name):
            setattr(other, name, copy.deepcopy(getattr(own, name)))


def _as_seen(model: Dreamer, student: Any, targets: AnyTargets) -> AnyTargets:
    """Targets on the student's device, with observations as it sees them: normalized if only its environment does."""
    normalize = unwrap_vec_normalize(student.env)
    if normalize is not None and model.get_vec_normalize_env() is None:
        targets.obs = model.replay_buffer.normalize_obs(targets.obs, normalize)
    return targets.to(student.device)


# -- real transitions --------------------------------------------------------------------------------------------------


def fill_replay(buffer: ReplayBuffer, episodes: list[Episode]) -> None:
    """Write episodes to an SB3 replay in the order of time, to the column of one environment after the other.

    An episode that is not terminal ends with a time limit, so that the next transition does not appear to follow it.
    Columns are equally long: an episode that does not fit into one continues in the next, and less than a row is left
    out.
    """
    rows = zip(*map(_transitions, _columns(episodes, buffer.n_envs)), strict=True)
    space = buffer.observation_space
    for row in rows:
        transitions, infos = zip(*row, strict=True)
        obs, next_obs, action, reward, done = zip(*transitions, strict=True)
        arrays = np.stack(action), np.array(reward), np.array(done)
        buffer.add(_stacked(space, obs), _stacked(space, next_obs), *arrays, list(infos))


def _columns(episodes: list[Episode], number: int) -> list[list[Episode]]:
    """Episodes by column, cut where a column is full."""
    length = sum(map(len, episodes)) // number
    columns: list[list[Episode]] = [[] for _ in range(number)]
    step = 0
    for episode in episodes:
        begin = 0
        while begin < len(episode) and step < length * number:
            end = min(len(episode), begin + length - step % length)
            columns[step // length].append(episode.part(begin, end))
            step, begin = step + end - begin, end
    return columns


def _transitions(episodes: list[Episode]) -> Iterator[tuple[Transition, dict[str, Any]]]:
    """The transitions of one column, with their infos."""
    for episode in episodes:
        for transition in episode.transitions():
            yield transition, {"TimeLimit.truncated": transition.done and not episode.terminal}


def _stacked(space: spaces.Space, rows: tuple[dict[str, np.ndarray], ...]) -> Any:
    return as_observation(space, {key: np.stack([row[key] for row in rows]) for key in rows[0]})


def _latent_episodes(model: Dreamer, real: RealStates) -> Iterator[Episode]:
    """The filtered episodes, with features as observations."""
    reward, action = real.reward.cpu().numpy(), real.action.cpu().numpy()
    for rows in np.split(np.arange(len(real)), np.flatnonzero(real.is_last)[:-1] + 1):
        obs = latent_observations(model, real.packed[rows])
        actions = action[rows[:-1]].reshape(len(rows) - 1, *(model.action_space.shape or ()))
        yield Episode(obs, actions, reward[rows[1:]], bool(real.is_terminal[rows[-1]]))
