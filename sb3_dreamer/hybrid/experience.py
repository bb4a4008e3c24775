"""Experience from other sources: SB3 replays, Minari data sets, episodes."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
from gymnasium import spaces, wrappers
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first, maybe_transpose
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.files import unpickled
from sb3_dreamer.replay import (
    Episode,
    SequenceReplayBuffer,
    encoded_episode,
    read_episodes,
    split_transitions,
    write_episode,
)
from sb3_dreamer.spaces import by_key, parts_of

REPEATING = (MaxAndSkipEnv, getattr(wrappers, "RepeatAction", MaxAndSkipEnv))  # RepeatAction: since Gymnasium 1.3


def add_experience(model: Dreamer, source: Any, *, time_limit: int | None = None) -> None:
    """Add recorded experience to the model's replay; the environments are reset before the next step.

    A VecNormalize around them learns from it too, unless its ``training`` is off.

    :param model: the model.
    :param source: a SequenceReplayBuffer, an SB3 ReplayBuffer or DictReplayBuffer, the .pkl that ``save_replay_buffer``
        wrote, a Minari data set or its id, or :class:`~sb3_dreamer.replay.Episode` objects.
    :param time_limit: for SB3 replays without time-limit flags, such as the memory-saving ones: episodes of this many
        steps of the agent were cut by a time limit. None: the limit of the model's environment, if it has one.
    :raises ValueError: for other spaces, values outside of the space, a source without a transition, and if
        ``time_limit`` is required, since the environment repeats actions. Nothing is added then.
    :raises TypeError: for an unknown kind of source. Nothing is added then either.
    """
    replay = model.replay_buffer
    if isinstance(source, str | pathlib.Path):
        source = _opened(source)
    if source is replay:
        raise ValueError("this replay is the model's own: its experience is there already")
    if isinstance(source, Iterator):
        source = list(source)  # it is read twice: checked, then written
    count = 0
    for count, episode in enumerate(episodes_of(model, source, time_limit), 1):
        try:
            encoded_episode(replay, episode)
        except ValueError as error:
            raise ValueError(f"episode {count - 1} of {type(source).__name__}: {error}. Nothing was added") from None
    if count == 0:
        raise ValueError(f"{type(source).__name__} holds no transition: collect something first")
    model._last_obs = None
    replay.cut()
    normalize = model.get_vec_normalize_env()
    for episode in episodes_of(model, source, time_limit):
        write_episode(replay, episode)
        if normalize is not None and normalize.training:
            update_statistics(normalize, episode)


def update_statistics(normalize: VecNormalize, episode: Episode) -> None:
    """Update the statistics as if the episode had been lived in the environment that they belong to."""
    if normalize.norm_obs:
        for key, moments in by_key(normalize.obs_rms).items():
            moments.update(episode.obs[key])
    returns = accumulate(episode.reward, lambda before, reward: before * normalize.gamma + reward)
    normalize.ret_rms.update(np.array(list(returns)))


def episodes_of(model: Dreamer, source: Any, time_limit: int | None = None) -> Iterator[Episode]:
    """Episodes of any kind of source, whose spaces must be the model's.

    :raises ValueError: for other spaces.
    :raises TypeError: for an unknown kind of source.
    """
    if isinstance(source, SequenceReplayBuffer):
        check_same_spaces(model, source.observation_space, source.action_space, "the replay")
        return read_episodes(source)
    if isinstance(source, ReplayBuffer):
        check_same_spaces(model, source.observation_space, source.action_space, "the replay")
        if time_limit is None and not source.handle_timeout_termination:
            time_limit = _time_limit(model)
        return _replay_episodes(source, time_limit)
    if hasattr(source, "iterate_episodes"):
        check_same_spaces(model, _as_wrapped(source.observation_space), source.action_space, "the data set")
        return (_minari_episode(model, recorded) for recorded in source.iterate_episodes())
    if isinstance(source, Iterable):
        return iter(source)
    raise TypeError(
        f"experience of type {type(source).__name__} is not understood: give an SB3 ReplayBuffer, a "
        "SequenceReplayBuffer, a Minari data set or its id, or sb3_dreamer.replay.Episode objects; for a buffer of "
        "Tianshou call sb3_dreamer.tianshou.add_experience(model, buffer)"
    )


def _opened(path: str | pathlib.Path) -> Any:
    """A saved replay by its path, or a Minari data set by its id."""
    files = path, f"{path}.pkl"
    is_replay = str(path).endswith(".pkl") or any(pathlib.Path(file).is_file() for file in files)
    return unpickled(path, "saved replay") if is_replay else _load_minari(str(path))


def check_same_spaces(model: Dreamer, observation_space: spaces.Space, action_space: spaces.Space, what: str) -> None:
    """Refuse experience with other observations or actions; bounds of observations may differ.

    :raises ValueError: naming both.
    """
    own = _comparable(model.observation_space), model.action_space
    theirs = _comparable(observation_space), action_space
    if own != theirs:
        raise ValueError(
            f"{what} has observations {theirs[0]} and actions {theirs[1]}, this model {own[0]} and {own[1]}: "
            "use experience of the same environment with the same wrappers"
        )


def _comparable(space: spaces.Space) -> Any:
    """What must be equal, in words: of a Box its shape and whether it holds integers."""
    if isinstance(space, spaces.Dict):
        return {key: _comparable(sub) for key, sub in space.spaces.items()}
    if isinstance(space, spaces.Box):
        return f"{space.shape} of {'integers' if np.issubdtype(space.dtype, np.integer) else 'numbers'}"
    return str(space)


# -- SB3's replay ------------------------------------------------------------------------------------------------------


def _time_limit(model: Dreamer) -> int | None:
    """The time limit of the model's environment, if it is known.

    :raises ValueError: if actions are repeated: the limit counts the simulator's steps, the replay the agent's.
    """
    if model.env is None:
        return None
    try:
        limit = getattr(model.env.get_attr("spec", 0)[0], "max_episode_steps", None)
    except AttributeError:  # not every vector of environments has one
        return None
    if limit is not None and any(model.env.env_is_wrapped(wrapper, 0)[0] for wrapper in REPEATING):
        raise ValueError(
            f"the time limit of this environment is {limit} steps of the simulator, its wrapper repeats actions, and "
            "this replay does not distinguish time limits from terminations: give time_limit= in steps of the agent"
        )
    return limit


def _replay_episodes(buffer: ReplayBuffer, time_limit: int | None) -> Iterator[Episode]:
    """Columns of transitions, one per environment, cut where an episode is done or the next row does not follow."""
    rows = np.arange(buffer.pos)
    if buffer.full:
        rows = np.roll(np.arange(buffer.buffer_size), -buffer.pos)
    if buffer.optimize_memory_usage:
        rows = rows[1:] if buffer.full else rows  # the oldest row holds the newest next observation
    for env in range(buffer.n_envs if len(rows) > 0 else 0):
        obs, next_obs = _observations(buffer, rows, env)
        for part in split_transitions(obs, next_obs, buffer.dones[rows, env] > 0):
            start_overwritten = buffer.full and part[0] == 0  # its true length is unknown
            yield from _one_episode(buffer, rows[part], env, time_limit, start_overwritten)


def _observations(buffer: ReplayBuffer, rows: np.ndarray, env: int) -> tuple[dict[str, np.ndarray], ...]:
    """Observations and next observations of one column, (n, *shape) by key."""
    if isinstance(buffer, DictReplayBuffer):
        obs, next_obs = buffer.observations, buffer.next_observations
        return {k: v[rows, env] for k, v in obs.items()}, {k: v[rows, env] for k, v in next_obs.items()}
    if buffer.optimize_memory_usage:
        following = buffer.observations[(rows + 1) % buffer.buffer_size, env]
        return {"obs": buffer.observations[rows, env]}, {"obs": following}
    return {"obs": buffer.observations[rows, env]}, {"obs": buffer.next_observations[rows, env]}


def _one_episode(
    buffer: ReplayBuffer, rows: np.ndarray, env: int, time_limit: int | None, start_overwritten: bool
) -> Iterator[Episode]:
    """One episode of one environment; none if it has no transition left.

    If the replay has no time-limit flags, the length decides whether a time limit cut the episode; if its start has
    been overwritten and there is a time limit, it counts as cut.

    The memory-saving replay has lost the last observation of an episode, the next reset is in its place. Where the
    episode terminated, the observation before is repeated, since the termination matters more; a cut episode ends a
    step early.
    """
    obs, next_obs = _observations(buffer, rows, env)
    done = bool(buffer.dones[rows[-1], env])
    time_out = bool(buffer.timeouts[rows[-1], env])
    if not buffer.handle_timeout_termination and time_limit is not None:
        time_out = len(rows) == time_limit or start_overwritten
    if buffer.optimize_memory_usage and done:
        if time_out:
            rows, obs, next_obs = rows[:-1], {"obs": obs["obs"][:-1]}, obs
        else:
            next_obs = obs
    if len(rows) > 0:
        action = buffer.actions[rows, env].reshape(len(rows), *(buffer.action_space.shape or ()))
        whole = {key: np.concatenate([part, next_obs[key][-1:]]) for key, part in obs.items()}
        parts = parts_of(buffer.observation_space)
        whole = {key: part.reshape(len(part), *(parts[key].shape or ())) for key, part in whole.items()}
        yield Episode(whole, action, buffer.rewards[rows, env], terminal=done and not time_out)


# -- Minari ------------------------------------------------------------------------------------------------------------


def _load_minari(name: str) -> Any:
    """A data set by its id.

    :raises ImportError: naming the pip command.
    """
    try:
        import minari  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            f'there is no file {name} or {name}.pkl, so it must be a Minari data set: pip install "minari[hdf5]"'
        ) from error
    return minari.load_dataset(name)


def _as_wrapped(space: spaces.Space) -> spaces.Space:
    """The space of observations as SB3 wraps it: images have their channels first."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _as_wrapped(part) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return VecTransposeImage.transpose_space(space)
    return space


def _minari_episode(model: Dreamer, recorded: Any) -> Episode:
    seen, parts = by_key(recorded.observations), parts_of(model.observation_space)
    return Episode(
        obs={key: maybe_transpose(np.asarray(part), parts[key]) for key, part in seen.items()},
        action=np.asarray(model.policy.actions.to_replay(recorded.actions)),
        reward=np.asarray(recorded.rewards),
        terminal=bool(recorded.terminations[-1]),
    )
