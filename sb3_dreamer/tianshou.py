"""The door to Tianshou: Dreamer in its collectors, its experience and its policies in Dreamer, and the way back.

    Collector(TianshouPolicy(model), envs).collect(n_episode=10, reset_before_collect=True)    # Dreamer acts
    fill_buffer(model, buffer)                               # for their algorithms: what Dreamer has seen
    add_experience(model, buffer, algorithm.policy)          # for Dreamer: what theirs has collected, and its policy
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

    The state that it carries says by ``running`` whether an episode is under way, since Tianshou marks a new one by
    zeros. Collectors write states into their buffer, at size1m 2.6 kB a step of the GRU and 132 kB of the transformer;
    give them ``on_step_hook=drop_states``.

    :param model: Dreamer; observations come as its environment gives them, a VecNormalize is applied here.
    :param deterministic: act without chance.
    :raises ValueError: where the model needs the statistics of a VecNormalize, and has none.
    :raises TypeError: for a model that is no Dreamer.
    """

    def __init__(self, model: Dreamer, deterministic: bool = True) -> None:
        require_statistics(model, "TianshouPolicy")
        super().__init__(model.action_space, model.observation_space, action_bound_method=None)
        self.model, self.deterministic = model, deterministic

    def forward(self, batch: Batch, state: Batch | None = None, **kwargs: Any) -> Batch:
        """Actions (n, *shape) for observations of n environments.

        :param batch: with ``obs``.
        :param state: what the last call returned; None: all environments begin an episode.
        :return: ``act`` and ``state``.
        """
        obs: Any = plain_observations(self.model.observation_space, batch.obs)
        if (normalize := self.model.get_vec_normalize_env()) is not None:
            obs = normalize.normalize_obs(obs)
        before = None if state is None else (np.asarray(state.packed), np.asarray(state.action))
        starts = None if state is None else np.asarray(state.running) == 0
        action, after = self.model.predict(obs, before, starts, self.deterministic)
        running = np.ones(len(action), np.float32)
        return Batch(act=action, state=Batch(running=running, packed=after[0], action=after[1]))


def drop_states(action: Batch, rollout: Batch) -> None:
    """For ``Collector(on_step_hook=...)``: keep the states of a recurrent policy out of the buffer."""
    rollout.policy = Batch()


class TianshouTeacher:
    """A Tianshou policy with SB3's ``predict``, as a teacher for :meth:`~sb3_dreamer.Dreamer.warm_start`.

    :param policy: of any Tianshou algorithm, or the algorithm.
    :param observation_space: of one environment; None: what the policy says.
    :raises ValueError: if neither says what it sees.
    """

    def __init__(self, policy: Policy | Algorithm, observation_space: spaces.Space | None = None) -> None:
        policy = policy_of(policy)
        seen = observation_space or policy.observation_space
        if seen is None:
            raise ValueError(f"{type(policy).__name__} does not say what it observes: give observation_space=")
        self.policy: Any = policy
        self.observation_space, self.action_space = seen, policy.action_space

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
        :param state: what the last call returned.
        :param episode_start: (n,) true where an episode begins.
        :param deterministic: for policies that have ``deterministic_eval``; others act as they always do.
        """
        if state is not None and episode_start is not None:
            state = Batch.empty(Batch(of=state), np.asarray(episode_start, bool)).of
        usual = getattr(self.policy, "deterministic_eval", None)
        if usual is not None:
            self.policy.deterministic_eval = deterministic
        try:
            with torch_train_mode(self.policy, False):
                answer = self.policy(Batch(obs=observation, info=Batch()), state)
        finally:
            if usual is not None:
                self.policy.deterministic_eval = usual
        return self.policy.map_action(answer.act), answer.get("state", None)


def add_experience(model: Dreamer, buffer: ReplayBuffer, policy: Policy | Algorithm | None = None) -> None:
    """Put what a Tianshou collector has collected into the model's replay; as ``model.add_experience``.

    :param model: whose replay.
    :param buffer: a ReplayBuffer or VectorReplayBuffer, prioritised or not, with ``obs_next``.
    :param policy: whose actions these are, if it maps them on their way to the environment (``action_scaling``), or its
        algorithm; None: the buffer holds them in the units of the environment.
    :raises ValueError: for other spaces, an empty buffer, and one without ``obs_next``; nothing is added then.
    :raises TypeError: for a buffer that does not hold what happened in the order of time, and what is no buffer.
    """
    _check_kind(buffer)
    if len(buffer) == 0:
        raise ValueError("the buffer is empty, as that of an on-policy algorithm is after its update: collect first")
    if not hasattr(buffer, "obs_next"):
        raise ValueError("a buffer with ignore_obs_next=True has lost how its episodes end: collect with obs_next")
    policy = None if policy is None else policy_of(policy)
    if policy is not None and policy.action_space != model.action_space:
        raise ValueError(f"the policy's actions are {policy.action_space}, the model's {model.action_space}")
    model.add_experience(_episodes(model, buffer, policy))


def _episodes(model: Dreamer, buffer: ReplayBuffer, policy: Policy | None) -> Iterator[Episode]:
    """One environment after the other, the oldest transition first."""
    several = isinstance(buffer, ReplayBufferManager)
    parts = zip(buffer.buffers, buffer.subbuffer_edges[:-1]) if several else [(buffer, 0)]
    for part, offset in parts:
        if len(part) == 0:
            continue
        rows: Any = buffer[part.sample_indices(0) + offset]
        seen = (rows.obs, rows.obs_next)
        obs, next_obs = (by_key(plain_observations(model.observation_space, part)) for part in seen)
        action = _checked(model.action_space, rows.act if policy is None else policy.map_action(rows.act))
        for run in split_transitions(obs, next_obs, rows.terminated | rows.truncated):
            yield Episode(
                obs={key: np.concatenate([values[run], next_obs[key][run[-1:]]]) for key, values in obs.items()},
                action=np.asarray(model.policy.replay_action(action[run])),
                reward=np.asarray(rows.rew[run]),
                terminal=bool(rows.terminated[run[-1]]),
            )


def fill_buffer(model: Dreamer, buffer: ReplayBuffer) -> None:
    """Put the model's real transitions into a Tianshou buffer, for its off-policy or offline algorithms.

    The newest that it has room for, of each episode as much as one environment's part of it; a quarter of a millisecond
    each. Actions of a Box are scaled to [-1, 1], as policies with ``action_scaling=True`` hand them in; images come as
    the model sees them, channels first. What is not the end of a task ends with ``truncated``, so that no transition
    follows what it does not belong to.

    :param model: a Dreamer with its replay.
    :param buffer: a ReplayBuffer or VectorReplayBuffer, prioritised or not; each episode goes to the environment that
        is least full.
    :raises ValueError: if the model's replay holds no transition, or the buffer an episode that has not ended.
    :raises TypeError: for a buffer that does not hold what happened in the order of time.
    """
    _check_kind(buffer)
    if len(buffer) > 0 and len(buffer.unfinished_index()) > 0:
        raise ValueError(
            "the buffer holds an episode that has not ended, and what is added would follow it: fill a new buffer, or "
            "collect whole episodes (n_episode=) before"
        )
    episodes = list(read_episodes(model.replay_buffer, buffer.maxsize))
    if not episodes:
        raise ValueError("the model's replay holds no transition: call learn() or load_replay_buffer() first")
    several = isinstance(buffer, ReplayBufferManager)
    parts = list(buffer.buffers) if several else [buffer]
    filled, sizes = np.array([len(part) for part in parts]), np.array([part.maxsize for part in parts])
    for episode in episodes:
        env = int((filled / sizes).argmin())
        for row in _rows(episode, model.observation_space):
            buffer.add(Batch([row]), buffer_ids=[env]) if several else buffer.add(row)
        filled[env] += len(episode)


def _check_kind(buffer: ReplayBuffer) -> None:
    """Refuse what is no buffer, and buffers that invent goals or keep episodes elsewhere until they have ended."""
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(f"{type(buffer).__name__} is no buffer of Tianshou: use a ReplayBuffer or VectorReplayBuffer")
    if isinstance(buffer, CachedReplayBuffer | HERReplayBuffer | HERReplayBufferManager):
        raise TypeError(f"{type(buffer).__name__} is not understood: use a ReplayBuffer or VectorReplayBuffer")


def _checked(space: spaces.Space, action: np.ndarray) -> np.ndarray:
    """Actions (n, *shape) of the space; scaling would stretch others to its shape.

    :raises ValueError: for another shape, and for fractions in place of choices.
    """
    if action.shape[1:] != space.shape or (not isinstance(space, spaces.Box) and action.dtype.kind not in "iub"):
        given = f"{action.dtype} of shape {action.shape[1:]}"
        raise ValueError(f"actions are {given}, the model's {space}: use experience of the same environment")
    return action


def policy_of(policy: Policy | Algorithm) -> Any:
    """The policy itself, where its algorithm was given, as collectors take both."""
    return policy.policy if isinstance(policy, Algorithm) else policy


def _rows(episode: Episode, space: spaces.Space) -> Iterator[Batch]:
    """One transition after the other, as Tianshou's buffers take them."""
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
    """Tianshou's observations (n, *shape), a Batch where the space is a Dict, as SB3 knows them: images channels first.

    :raises ValueError: for other keys than the space's.
    """
    wanted = list(space.spaces) if isinstance(space, spaces.Dict) else []
    given = sorted(obs.get_keys()) if isinstance(obs, Batch) else []
    if given != sorted(wanted):
        raise ValueError(f"observations have the keys {given}, the model's {wanted}: use the same environment")
    if isinstance(space, spaces.Dict):
        return {key: maybe_transpose(np.asarray(obs[key]), part) for key, part in space.spaces.items()}
    return maybe_transpose(np.asarray(obs), space)
