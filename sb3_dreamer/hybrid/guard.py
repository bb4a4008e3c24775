"""Risky behaviour is tested in imagination first: where the policy's dreams end badly, a fallback takes over."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer.acting import ActsWithDreamer, require_statistics
from sb3_dreamer.behavior.imagination import imagine
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.hybrid.guide import Guide
from sb3_dreamer.hybrid.real_states import imagined_observations, unpacked
from sb3_dreamer.knobs import as_whole
from sb3_dreamer.nets.layers import mixed_precision
from sb3_dreamer.spaces import as_observation, by_key
from sb3_dreamer.types import Observation


class GuardState(NamedTuple):
    """What :meth:`Guard.predict` carries from step to step, for n environments.

    :param packed: (n, P) packed model state.
    :param action: (n, A) the action that was really taken, encoded.
    :param holds: (n,) steps for which the last test still holds.
    :param taken_over: (n,) bool, the fallback acts.
    :param memory: of a recurrent fallback.
    """

    packed: np.ndarray
    action: np.ndarray
    holds: np.ndarray
    taken_over: np.ndarray
    memory: Any


class Guard(ActsWithDreamer):
    """Dreamer acts as long as its own dreams end well; then a fallback controller, until the episode ends::

        every `every` steps        the policy is dreamed `horizon` steps ahead, `n_dreams` times
        risk <= max_risk           Dreamer goes on acting
        risk >  max_risk           the fallback acts, until `episode_start` says that a new episode begins

    The risk is the share of dreams that end (a state where the model calls that the likelier) or come to one that is
    ``unsafe``. Dreams take actions as the policy draws them, ``deterministic`` or not: the cautious way. This is
    shielding by prediction, as in Li and Bastani 2020 ("Robust model predictive shielding for safe reinforcement
    learning"), with a learned model and so without their guarantee: a dream is as good as the model, which knows only
    what it has seen. The horizon has to reach back to where the fallback can still help. It is for robots that fall
    often: to be taken over in the middle of a gait has its own risk, and one that hardly falls may fall more with it.

    Use it where a policy is used, in ``evaluate_policy`` for one. Its ``decisions`` counts the actions that it
    was asked for, ``taken_over`` those of the fallback.

    :param model: a trained Dreamer with an environment.
    :param fallback: a model of SB3 or sb3-contrib, the path of a saved one, or anything with their ``predict``; it acts
        deterministically, and its spaces, if it tells them, have to be those of the environment.
    :param vec_normalize: the statistics of the fallback, as in :func:`~sb3_dreamer.hybrid.warm_start.warm_start`.
    :param horizon: steps to dream ahead.
    :param n_dreams: dreams for each environment.
    :param max_risk: how large a risk Dreamer may take, from 0 to 1.
    :param every: steps between tests.
    :param unsafe: observations (N, .) in the environment's units, as dreamed -> (N,) bool, for what does not end an
        episode and still must not happen.
    :raises ValueError: for a fallback that cannot act there, and senseless numbers.
    :raises TypeError: for a model that is no Dreamer, and a fallback that is nothing that acts.
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
            raise ValueError(f"max_risk={max_risk} has to be from 0 to 1")
        self.model, self.fallback = model, Guide(model, fallback, vec_normalize, deterministic=True, role="fallback")
        self.max_risk, self.unsafe = max_risk, unsafe
        given = {"horizon": horizon, "n_dreams": n_dreams, "every": every}
        self.horizon, self.n_dreams, self.every = (as_whole(*item, least=1) for item in given.items())
        self.decisions = self.taken_over = 0  # how often it was asked, and how often the fallback acted

    def predict(
        self,
        observation: Observation,
        state: GuardState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, GuardState]:
        """As :meth:`sb3_dreamer.policies.DreamerPolicy.predict`; where the fallback has taken over, its actions."""
        if not (state is None or isinstance(state, GuardState)):
            raise ValueError("Guard.predict() got a state of another: pass what its last call returned, or None")
        policy, normalize = self.model.policy, self.model.get_vec_normalize_env()
        actions, carried = policy.predict(observation, state and state[:2], episode_start, deterministic)
        packed, encoded = carried
        n = len(packed)
        starts = np.full(n, state is None) if episode_start is None else np.array(episode_start, bool).flatten()
        holds, taken_over = (np.zeros(n, int), np.zeros(n, bool)) if state is None else (state.holds, state.taken_over)

        taken_over = taken_over & ~starts
        due = ~taken_over & (starts | (holds == 0))
        if due.any():
            taken_over[due] = self.risk(packed[due]) > self.max_risk
        original = observation if normalize is None else normalize.unnormalize_obs(observation)
        if actions.shape == self.model.action_space.shape:  # one observation alone
            parts = {key: np.asarray(part)[None] for key, part in by_key(original).items()}
            original = as_observation(self.model.observation_space, parts)
        instead, memory = self.fallback.act(original, None if state is None else state.memory, starts)
        own = actions.reshape(instead.shape)
        taken = np.where(taken_over.reshape(-1, *[1] * (own.ndim - 1)), instead, own).astype(own.dtype)
        if taken_over.any():
            encoded = policy.encode_action(taken)
        memory = self.fallback.with_action(memory, taken)
        self.decisions += n
        self.taken_over += int(taken_over.sum())
        holds = np.where(due, self.every, holds) - 1
        return taken.reshape(actions.shape), GuardState(packed, encoded, holds, taken_over, memory)

    def with_action(self, memory: GuardState, taken: np.ndarray) -> GuardState:
        """As :meth:`~sb3_dreamer.acting.ActsWithDreamer.with_action`."""
        instead = self.fallback.with_action(memory.memory, taken)
        return memory._replace(action=self.model.policy.encode_action(taken), memory=instead)

    @th.inference_mode()
    def risk(self, packed: np.ndarray) -> np.ndarray:
        """Share of Dreamer's dreams that end badly within the horizon: packed states (n, P) -> (n,)."""
        model, policy = self.model, self.model.policy
        start = th.as_tensor(packed, device=model.device).repeat_interleave(self.n_dreams, 0)
        with mixed_precision(model.device):
            dream = imagine(policy.world_model, policy.actor, unpacked(model, start), self.horizon)
        goes_on = (dream.discount[:, 1:].float() >= 0.5 * policy.world_model.gamma).all(1).cpu().numpy()
        if self.unsafe is not None:
            goes_on &= ~self._unsafe(dream.features[:, 1:].float())
        return 1.0 - goes_on.reshape(-1, self.n_dreams).mean(1)

    def _unsafe(self, features: th.Tensor) -> np.ndarray:
        """Which dreams (N, H, F) come to an unsafe state: (N,)."""
        assert self.unsafe is not None
        parts = imagined_observations(self.model, features.flatten(0, 1))
        observation = as_observation(self.model.observation_space, parts)
        if (normalize := self.model.get_vec_normalize_env()) is not None:
            observation = normalize.unnormalize_obs(observation)
        told = np.asarray(self.unsafe(observation))
        n_states = features.shape[0] * features.shape[1]
        if told.shape != (n_states,) or told.dtype != bool:
            raise ValueError(
                f"unsafe() gave {told.dtype} of shape {told.shape} for {n_states} observations: "
                "it has to give one bool for each of them"
            )
        return np.any(told.reshape(features.shape[:2]), axis=1, keepdims=False)
