"""Shielding by imagination: where too many of the policy's dreams end badly, a fallback controller takes over."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.acting import ActsWithDreamer, require_statistics
from sb3_dreamer.behavior.imagination import imagine
from sb3_dreamer.checks import as_whole
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.external_policy import ExternalPolicy
from sb3_dreamer.hybrid.real_states import imagined_observations, unpacked
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.spaces import as_observation, by_key
from sb3_dreamer.types import Observation


class GuardState(NamedTuple):
    """The state that :meth:`Guard.predict` carries from step to step, for n environments.

    :param packed: (n, P) packed model state.
    :param action: (n, A) the action that was taken, encoded.
    :param holds: (n,) steps until the next test.
    :param taken_over: (n,) bool, the fallback acts.
    :param memory: of a recurrent fallback.
    """

    packed: np.ndarray
    action: np.ndarray
    holds: np.ndarray
    taken_over: np.ndarray
    memory: Any


class Guard(ActsWithDreamer):
    """Dreamer acts as long as its own dreams end well; otherwise a fallback controller acts until the episode ends::

        every `every` steps        the policy is dreamed `horizon` steps ahead, `n_dreams` times
        risk <= max_risk           Dreamer acts
        risk >  max_risk           the fallback acts, until `episode_start` says that a new episode begins

    The risk is the share of dreams that end (continue probability below 0.5 in some state) or reach an ``unsafe``
    state. Dreams sample the policy's actions, even if ``predict`` is deterministic: the cautious way. This is shielding
    by prediction, as in Li and Bastani 2020 ("Robust model predictive shielding for safe reinforcement learning"), with
    a learned model and so without their guarantee: a dream is as good as the model, which knows only what it has seen.
    The horizon must be long enough to detect a fall while the fallback can still prevent it. A guard is for robots that
    fall often: a takeover in the middle of a gait has its own risk, and one that hardly falls may fall more with it.

    Use it in place of a policy, for example in ``evaluate_policy``. Its ``decisions`` counts the actions that it has
    returned, ``taken_over`` those of the fallback.

    :param model: a trained Dreamer with an environment.
    :param fallback: a model of SB3 or sb3-contrib, the path of a saved one, or anything with their ``predict``; it acts
        deterministically, and its spaces, if it has any, must be those of the environment.
    :param vec_normalize: the statistics of the fallback, as in :func:`~sb3_dreamer.hybrid.warm_start.warm_start`.
    :param horizon: steps to dream ahead.
    :param n_dreams: dreams for each environment.
    :param max_risk: the largest risk at which Dreamer acts, from 0 to 1.
    :param every: steps between tests.
    :param unsafe: dreamed observations (N, .) in the environment's units -> (N,) bool, for states that do not end an
        episode and must not be reached.
    :raises ValueError: for a fallback that cannot act there, and invalid values.
    :raises TypeError: if the model is not a Dreamer, or the fallback has no ``predict`` as in SB3.
    """

    def __init__(
        self,
        model: Dreamer,
        fallback: Any,
        vec_normalize: VecNormalize | str | pathlib.Path | Literal[False] | None = None,
        horizon: int = 80,
        n_dreams: int = 16,
        max_risk: float = 0.1,
        every: int = 10,
        unsafe: Callable[[Any], np.ndarray] | None = None,
    ) -> None:
        require_statistics(model, "Guard")
        if model.env is None:
            raise ValueError("Guard needs a model with an environment: give one to load() or to set_env()")
        if not 0 <= max_risk <= 1:
            raise ValueError(f"max_risk={max_risk} must be from 0 to 1")
        self.model = model
        self.fallback = ExternalPolicy(model, fallback, vec_normalize, deterministic=True, role="fallback")
        self.max_risk, self.unsafe = max_risk, unsafe
        self.horizon = as_whole("horizon", horizon, least=1)
        self.n_dreams = as_whole("n_dreams", n_dreams, least=1)
        self.every = as_whole("every", every, least=1)
        self.decisions = self.taken_over = 0  # actions in total, and those of the fallback

    def predict(
        self,
        observation: Observation,
        state: GuardState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, GuardState]:
        """As :meth:`sb3_dreamer.policies.DreamerPolicy.predict`; the fallback's actions where it has taken over."""
        if not (state is None or isinstance(state, GuardState)):
            raise ValueError("Guard.predict() got a state of another policy: pass what its last call returned, or None")
        policy, normalize = self.model.policy, self.model.get_vec_normalize_env()
        model_state = None if state is None else state[:2]
        actions, (packed, encoded) = policy.predict(observation, model_state, episode_start, deterministic)
        n = len(packed)
        starts = np.full(n, state is None) if episode_start is None else np.array(episode_start, bool).flatten()
        holds, taken_over = (np.zeros(n, int), np.zeros(n, bool)) if state is None else (state.holds, state.taken_over)

        taken_over = taken_over & ~starts
        due = ~taken_over & (starts | (holds == 0))
        if due.any():
            taken_over[due] = self.risk(packed[due]) > self.max_risk
        original = observation if normalize is None else normalize.unnormalize_obs(observation)
        if actions.shape == self.model.action_space.shape:  # a single observation
            parts = {key: np.asarray(part)[None] for key, part in by_key(original).items()}
            original = as_observation(self.model.observation_space, parts)
        fallback, memory = self.fallback.predict(original, None if state is None else state.memory, starts)
        own = actions.reshape(fallback.shape)
        taken = np.where(taken_over.reshape(-1, *[1] * (own.ndim - 1)), fallback, own).astype(own.dtype)
        if taken_over.any():
            encoded = policy.actions.encode(taken)
        memory = self.fallback.with_action(memory, taken)
        self.decisions += n
        self.taken_over += int(taken_over.sum())
        holds = np.where(due, self.every, holds) - 1
        return taken.reshape(actions.shape), GuardState(packed, encoded, holds, taken_over, memory)

    def with_action(self, memory: GuardState, taken: np.ndarray) -> GuardState:
        """As :meth:`~sb3_dreamer.acting.ActsWithDreamer.with_action`."""
        of_fallback = self.fallback.with_action(memory.memory, taken)
        return memory._replace(action=self.model.policy.actions.encode(taken), memory=of_fallback)

    @th.inference_mode()
    def risk(self, packed: np.ndarray) -> np.ndarray:
        """Share of Dreamer's dreams that end or become unsafe within the horizon: packed states (n, P) -> (n,)."""
        model, policy = self.model, self.model.policy
        start = th.as_tensor(packed, device=model.device).repeat_interleave(self.n_dreams, 0)
        with mixed_precision(model.device):
            dream = imagine(policy.world_model, policy.actor, unpacked(model, start), self.horizon)
        ends_well = (dream.discount[:, 1:].float() >= 0.5 * policy.world_model.gamma).all(1).cpu().numpy()
        if self.unsafe is not None:
            ends_well &= ~self._unsafe(dream.features[:, 1:].float())
        return 1.0 - ends_well.reshape(-1, self.n_dreams).mean(1)

    def _unsafe(self, features: th.Tensor) -> np.ndarray:
        """Which dreams (N, H, F) reach an unsafe state: (N,)."""
        assert self.unsafe is not None
        parts = imagined_observations(self.model, features.flatten(0, 1))
        observation = as_observation(self.model.observation_space, parts)
        if (normalize := self.model.get_vec_normalize_env()) is not None:
            observation = normalize.unnormalize_obs(observation)
        unsafe = np.asarray(self.unsafe(observation))
        n_states = features.shape[0] * features.shape[1]
        if unsafe.shape != (n_states,) or unsafe.dtype != bool:
            raise ValueError(
                f"unsafe() returned {unsafe.dtype} of shape {unsafe.shape} for {n_states} observations: "
                "it must return one bool for each of them"
            )
        return np.any(unsafe.reshape(features.shape[:2]), axis=1, keepdims=False)
