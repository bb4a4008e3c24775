"""Dreamer and Tianshou: Dreamer in its collectors, its experience and policies in Dreamer, and the way back.

    Collector(TianshouPolicy(model), envs).collect(n_episode=10, reset_before_collect=True)    # Dreamer acts
    fill_buffer(model, buffer)                               # Dreamer's experience, for Tianshou's algorithms
    add_experience(model, buffer, algorithm.policy)          # Tianshou's experience, for Dreamer
    model.warm_start(TianshouTeacher(algorithm.policy, env.observation_space), n_steps=10_000)

Needs Tianshou 2, which takes some seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import maybe_transpose

from sb3_dreamer import Dreamer
from sb3_dreamer.acting import require_statistics
from sb3_dreamer.replay import Episode, read_episodes, split_transitions
from sb3_dreamer.spaces import as_observation, by_key
from sb3_dreamer.types import Observation

try:
    from tianshou.algorithm.algorithm_base import Algorithm, Policy
    from tianshou.data import Batch, CachedReplayBuffer, HERReplayBuffer, ReplayBuffer, ReplayBufferManager
    from tianshou.data.buffer.manager import HERReplayBufferManager
    from tianshou.utils.torch_utils import torch_train_mode
except ImportError as error:
    raise ImportError(
        'sb3_dreamer.tianshou needs Tianshou 2 and Python 3.11: pip install "sb3-dreamer[tianshou]"'
    ) from error


class TianshouPolicy(Policy):
    """A trained Dreamer as a policy for Tianshou's collectors: recurrent, in the units of the environment.

    Its state has an entry ``running``, 1 within an episode: Tianshou marks the start of an episode by zeros. Collectors
    write states into their buffer, at size1m 2.6 kB per step of the GRU and 132 kB of the transformer; avoid this with
    ``on_step_hook=drop_states``.

    :param model: Dreamer; takes observations as its environment returns them, VecNormalize is applied here.
    :param deterministic: act deterministically.
    :raises ValueError: if the model needs the statistics of a VecNormalize, and has none.
    :raises TypeError: for other algorithms.
    """

    def __init__(self, model: Dreamer, deterministic: bool = True) -> None:
        require_statistics(model, "TianshouPolicy")
        super().__init__(model.action_space, model.observation_space, action_bound_method=None)
        self.model, self.deterministic = model, deterministic

    def forward(self, batch: Batch, state: Batch | None = None, **kwargs: Any) -> Batch:
        """Actions (n, *shape) for observations of n environments.

        :param batch: with ``obs``.
        :param state: of the last call; None: all environments start an episode.
        :return: ``act`` and ``state``.
        """
        obs: Any = plain_observations(self.model.observation_space, batch.obs)
        if (normalize := self.model.get_vec_normalize_env()) is not None:
            obs = normalize.normalize_obs(obs)
        last = None if state is None else (np.asarray(state.packed), np.asarray(state.action))
        starts = None if state is None else np.asarray(state.running) == 0
        action, (packed, encoded) = self.model.predict(obs, last, starts, self.deterministic)
        running = np.ones(len(action), np.float32)
        return Batch(act=action, state=Batch(running=running, packed=packed, action=encoded))


def drop_states(action: Batch, rollout: Batch) -> None:
    """For ``Collector(on_step_hook=...)``: do not store the states of a recurrent policy in the buffer."""
    rollout.policy = Batch()


class TianshouTeacher:
    """A Tianshou policy with SB3's ``predict``, as a teacher for :meth:`~sb3_dreamer.Dreamer.warm_start`.

    :param policy: of any Tianshou algorithm, or the algorithm.
    :param observation_space: of one environment; None: that of the policy.
    :raises ValueError: if the policy has no observation space and none is given.
    """

    def __init__(self, policy: Policy | Algorithm, observation_space: spaces.Space | None = None) -> None:
        policy = policy_of(policy)
        space = observation_space or policy.observation_space
        if space is None:
            raise ValueError(f"{type(policy).__name__} has no observation space: pass observation_space=")
        self.policy: Any = policy
        self.observation_space, self.action_space = space, policy.action_space

    @th.no_grad()
    def predict(
        self,
        observation: Observation,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions (n, *shape) in the units of the environment, and the state of a recurrent policy; as SB3's policies.

        :param observation: of n environments.
        :param state: of the last call.
        :param episode_start: (n,) true where an episode starts.
        :param deterministic: for policies that have ``deterministic_eval``; others act as they always do.
        """
        if state is not None and episode_start is not None:
            state = Batch.empty(Batch(of=state), np.asarray(episode_start, bool)).of
        default = getattr(self.policy, "deterministic_eval", None)
        if default is not None:
            self.policy.deterministic_eval = deterministic
        try:
            with torch_train_mode(self.policy, False):
                output = self.policy(Batch(obs=observation, info=Batch()), state)
        finally:
            if default is not None:
                self.policy.deterministic_eval = default
        return self.policy.map_action(output.act), output.get("state", None)


def add_experience(model: Dreamer, buffer: ReplayBuffer, policy: Policy | Algorithm | None = None) -> None:
    """Add the experience of a Tianshou collector to the model's replay, as ``model.add_experience``.

    :param model: owner of the replay.
    :param buffer: a ReplayBuffer or VectorReplayBuffer, prioritised or not, with ``obs_next``.
    :param policy: the policy that acted, or its algorithm, if it maps actions before the environment gets them
        (``action_scaling``); None: the buffer has actions in the units of the environment.
    :raises ValueError: for other spaces, an empty buffer, and one without ``obs_next``; nothing is added then.
    :raises TypeError: for a buffer that does not store transitions in the order of time, and other objects.
    """
    _check_kind(buffer)
    if len(buffer) == 0:
        raise ValueError("the buffer is empty, as that of an on-policy algorithm is after its update: collect first")
    if not hasattr(buffer, "obs_next"):
        raise ValueError("a buffer with ignore_obs_next=True has no final observations: collect with obs_next")
    policy = None if policy is None else policy_of(policy)
    if policy is not None and policy.action_space != model.action_space:
        raise ValueError(f"the policy's actions are {policy.action_space}, the model's {model.action_space}")
    model.add_experience(_episodes(model, buffer, policy))


def _episodes(model: Dreamer, buffer: ReplayBuffer, policy: Policy | None) -> Iterator[Episode]:
    """Episodes of one environment after the other, the oldest transition first."""
    several = isinstance(buffer, ReplayBufferManager)
    parts = zip(buffer.buffers, buffer.subbuffer_edges[:-1], strict=True) if several else [(buffer, 0)]
    for part, offset in parts:
        if len(part) == 0:
            continue
        rows: Any = buffer[part.sample_indices(0) + offset]
        obs, next_obs = (
            by_key(plain_observations(model.observation_space, batch)) for batch in (rows.obs, rows.obs_next)
        )
        action = _checked(model.action_space, rows.act if policy is None else policy.map_action(rows.act))
        for run in split_transitions(obs, next_obs, rows.terminated | rows.truncated):
            yield Episode(
                obs={key: np.concatenate([values[run], next_obs[key][run[-1:]]]) for key, values in obs.items()},
                action=np.asarray(model.policy.actions.to_replay(action[run])),
                reward=np.asarray(rows.rew[run]),
                terminal=bool(rows.terminated[run[-1]]),
            )


def fill_buffer(model: Dreamer, buffer: ReplayBuffer) -> None:
    """Put the model's real transitions into a Tianshou buffer, for its off-policy or offline algorithms.

    As many of the newest transitions as fit; of an episode at most one environment's share. About 0.25 ms each. Actions
    of a Box are scaled to [-1, 1], the form in which policies with ``action_scaling=True`` store them; images are those
    of the model, channels first. Episodes that do not terminate end with ``truncated``, so that their last transition
    is not followed by that of another episode.

    :param model: a Dreamer with its replay.
    :param buffer: a ReplayBuffer or VectorReplayBuffer, prioritised or not; each episode goes to the environment that
        is least full.
    :raises ValueError: if the model's replay has no transition, or the buffer has an episode that has not ended.
    :raises TypeError: for a buffer that does not store transitions in the order of time.
    """
    _check_kind(buffer)
    if len(buffer) > 0 and len(buffer.unfinished_index()) > 0:
        raise ValueError(
            "the buffer has an episode that has not ended, and new transitions would continue it: fill a new buffer, "
            "or collect whole episodes (n_episode=) before"
        )
    episodes = list(read_episodes(model.replay_buffer, buffer.maxsize))
    if not episodes:
        raise ValueError("the model's replay has no transition: call learn() or load_replay_buffer() first")
    several = isinstance(buffer, ReplayBufferManager)
    parts = list(buffer.buffers) if several else [buffer]
    filled, sizes = np.array([len(part) for part in parts]), np.array([part.maxsize for part in parts])
    for episode in episodes:
        env = int((filled / sizes).argmin())
        for row in _rows(episode, model.observation_space):
            buffer.add(Batch([row]), buffer_ids=[env]) if several else buffer.add(row)
        filled[env] += len(episode)


def _check_kind(buffer: ReplayBuffer) -> None:
    """Refuse other objects, and buffers that relabel goals or store episodes elsewhere until they end."""
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(f"{type(buffer).__name__} is no buffer of Tianshou: use a ReplayBuffer or VectorReplayBuffer")
    if isinstance(buffer, CachedReplayBuffer | HERReplayBuffer | HERReplayBufferManager):
        raise TypeError(f"{type(buffer).__name__} is not supported: use a ReplayBuffer or VectorReplayBuffer")


def _checked(space: spaces.Space, action: np.ndarray) -> np.ndarray:
    """Check that actions (n, *shape) fit the space; scaling would broadcast others to its shape.

    :raises ValueError: for another shape, and for floats in discrete spaces.
    """
    if action.shape[1:] != space.shape or (not isinstance(space, spaces.Box) and action.dtype.kind not in "iub"):
        given = f"{action.dtype} of shape {action.shape[1:]}"
        raise ValueError(f"actions are {given}, the model's {space}: use experience of the same environment")
    return action


def policy_of(policy: Policy | Algorithm) -> Any:
    """The policy of an algorithm, or the policy itself: collectors accept both."""
    return policy.policy if isinstance(policy, Algorithm) else policy


def _rows(episode: Episode, space: spaces.Space) -> Iterator[Batch]:
    """The transitions of an episode, in the form that Tianshou's buffers accept."""
    for obs, obs_next, action, reward, last in episode.transitions():
        yield Batch(
            obs=as_observation(space, obs),
            act=action,
            rew=reward,
            terminated=last and episode.terminal,
            truncated=last and not episode.terminal,
            obs_next=as_observation(space, obs_next),
            info={},
        )


def plain_observations(space: spaces.Space, obs: Any) -> Observation:
    """Tianshou's observations (n, *shape), a Batch if the space is a Dict, in SB3's form: images channels first.

    :raises ValueError: for other keys than the space's.
    """
    expected = sorted(space.spaces) if isinstance(space, spaces.Dict) else []
    keys = sorted(obs.get_keys()) if isinstance(obs, Batch) else []
    if keys != expected:
        raise ValueError(f"observations have the keys {keys}, the model's {expected}: use the same environment")
    if isinstance(space, spaces.Dict):
        return {key: maybe_transpose(np.asarray(obs[key]), part) for key, part in space.spaces.items()}
    return maybe_transpose(np.asarray(obs), space)
