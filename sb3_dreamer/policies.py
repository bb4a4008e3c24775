"""The SB3 policy: builds the networks from the spaces, and acts with a recurrent state."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import Schedule

from sb3_dreamer.actions import ActionCodec
from sb3_dreamer.behavior.actor_critic import Actor, Critic
from sb3_dreamer.behavior.imagination import ReturnScale
from sb3_dreamer.checks import whole
from sb3_dreamer.nets.optim import LaProp
from sb3_dreamer.spaces import by_key, observation_specs, policy_for
from sb3_dreamer.types import SIZES, Observation
from sb3_dreamer.world_model import WorldModel
from sb3_dreamer.world_model.codes import are_choices
from sb3_dreamer.world_model.rssm import State

PolicyState = tuple[np.ndarray, ...]
CALLS_WITHOUT_STATE = 10  # in a row, before predict() says what is forgotten


class DreamerPolicy(BasePolicy):
    """World model, actor and critic behind SB3's policy interface.

    The state that ``predict`` carries is a tuple of float32 arrays: the packed model state (n, P) and the encoded
    previous action (n, A).

    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary or a flat Dict of these.
    :param action_space: Box with finite bounds, Discrete, MultiDiscrete or MultiBinary.
    :param lr_schedule: learning rate as a function of the remaining progress.
    :param model_size: key of ``sb3_dreamer.types.SIZES``.
    :param rssm_type: sequence model, "gru" or "transformer".
    :param gamma: discount.
    :param normalize_obs: scale vectors by their running mean and variance; False: symlog alone, as in the paper.
    :param widths: single widths in place of those of ``model_size``, e.g. ``units=128``.
    :raises ValueError: for unsupported spaces, for those that another policy reads, and for unknown settings.
    """

    alias: ClassVar[str | None] = None  # of the policies that read one kind of observation
    optimizer: LaProp
    _calls_without_state = 0

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        model_size: str = "size1m",
        rssm_type: str = "gru",
        gamma: float = 0.99,
        normalize_obs: bool = True,
        **widths: int,
    ) -> None:
        super().__init__(observation_space, action_space)
        if model_size not in SIZES:
            raise ValueError(f'model_size="{model_size}" is unknown; use one of {list(SIZES)}')
        known = {field.name for field in dataclasses.fields(SIZES[model_size])}
        if unknown := set(widths) - known:
            raise ValueError(
                f"policy_kwargs {sorted(unknown)} are unknown; it takes normalize_obs and the widths {sorted(known)}"
            )
        if not isinstance(normalize_obs, bool):
            raise ValueError(f"normalize_obs={normalize_obs!r} in policy_kwargs must be True or False")
        width = whole(least=1)
        for name, value in widths.items():
            if not width.passes(value):
                raise ValueError(f"{name}={value!r} in policy_kwargs must be {width.words}")
        model: dict[str, Any] = dict(rssm_type=rssm_type, gamma=gamma, normalize_obs=normalize_obs)
        self._arguments = dict(model_size=model_size, **model, **widths)
        if self.alias not in (None, right := policy_for(observation_space)):
            raise ValueError(
                f'{self.alias} does not read {observation_space}: use "{right}" (MultiInputPolicy is for Dicts, '
                "CnnPolicy for images: Boxes of uint8 with three dimensions, from 0 to 255; MlpPolicy for all else). "
                "To MlpPolicy images of another form are vectors: better turn them into such Boxes"
            )
        size = dataclasses.replace(SIZES[model_size], **widths)
        self.actions = ActionCodec(action_space)
        self.world_model = WorldModel(observation_specs(observation_space), self.actions.spec, size, **model)
        features = self.world_model.feature_width
        self.actor = Actor(features, self.actions.spec, size)
        self.critic = Critic(features, size)
        self.return_scale = ReturnScale()
        groups = [{"params": list(part.parameters())} for part in (self.world_model, self.actor, self.critic.fast)]
        self.optimizer = LaProp(groups, lr=lr_schedule(1.0))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        its_spaces = dict(observation_space=self.observation_space, action_space=self.action_space)
        learned = {**self._arguments, "gamma": self.world_model.gamma}
        return {**its_spaces, "lr_schedule": self._dummy_schedule, **learned}

    def set_rates(self, warmup_updates: int, actor_lr_scale: float, critic_lr_scale: float) -> None:
        """Optimizer settings that a loaded optimizer state must not override; SB3 sets the learning rate itself."""
        scales = 1.0, actor_lr_scale, critic_lr_scale
        for group, scale in zip(self.optimizer.param_groups, scales, strict=True):
            group.update(warmup_steps=warmup_updates, lr_scale=scale)

    @property
    def device(self) -> th.device:
        """Where the parameters are. SB3 looks for the first of them through all modules, at every step."""
        return self.actor.out.bias.device

    def set_training_mode(self, mode: bool) -> None:
        """SB3 calls this at every step; no layer depends on it, so the modules are walked only when it changes."""
        if mode != self.training:
            super().set_training_mode(mode)

    # -- acting --------------------------------------------------------------------------------------------------------

    def initial_state(self, n: int) -> PolicyState:
        """The state before an episode, for n environments."""
        zeros = np.zeros((n, self.world_model.rssm.packed_width), np.float32)
        return zeros, np.zeros((n, self.actions.spec.width), np.float32)

    def predict(
        self,
        observation: Observation,
        state: PolicyState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PolicyState]:
        """Actions for one observation or a batch of n, and the state for the next call.

        :param observation: in the space's units, single or batched.
        :param state: what the last call returned; None starts an episode.
        :param episode_start: (n,) true where a new episode begins; None: nowhere.
        :param deterministic: the expected latents and the most likely action, no random numbers drawn.
        :return: actions in the space's units, clipped to its bounds; the next state.
        :raises ValueError: for observations of another space or with other keys, or that are not finite, a Gym ``(obs,
            info)`` tuple, or a state of other environments or of another agent.
        """
        self._check_form(observation)
        obs, vectorized = self.checked_obs(observation, "predict()")
        n = len(next(iter(obs.values())))
        packed, prev_action = self.initial_state(n) if state is None else self._checked_state(state, n)
        is_first = np.zeros(n, bool) if episode_start is None else np.array(episode_start, bool).flatten()
        if len(is_first) != n:
            raise ValueError(f"episode_start has {len(is_first)} entries for {n} observations")
        self._warn_if_forgetful(forgotten=state is None and not is_first.all())
        with th.inference_mode():
            carried, before = (th.as_tensor(x, dtype=th.float32, device=self.device) for x in (packed, prev_action))
            starts = th.as_tensor(is_first, device=self.device) if is_first.any() else None
            encoded, packed_next = self.act(obs, carried, before, starts, deterministic)
        actions = self.actions.decode(encoded.cpu().numpy())
        new_state = (packed_next.cpu().numpy(), self.actions.encode(actions))  # as the replay has it: integers rounded
        return actions if vectorized else actions[0], new_state

    def checked_obs(self, observation: Any, caller: str) -> tuple[dict[str, th.Tensor], bool]:
        """Observations as tensors by key, (n, *shape) each, and whether they came as a batch.

        :raises ValueError: where one is not finite in float32, or not in its discrete space; names the ``caller``.
        """
        tensors, vectorized = self.obs_to_tensor(observation)
        obs = {key: part.float() if part.is_floating_point() else part for key, part in by_key(tensors).items()}
        if bad := [key for key, part in obs.items() if not part.isfinite().all()]:
            raise ValueError(f"{caller} got {bad[0]} with a number that is NaN or infinite; the state stays as it was")
        for key, spec in self.world_model.decoder.specs.items():
            if spec.kind == "discrete" and not are_choices(obs[key], spec):
                raise ValueError(
                    f"{caller} got {key} {obs[key].tolist()}, expected choices of {self.observation_space}"
                )
        return obs, vectorized

    def _check_form(self, observation: Any) -> None:
        """Refuse what SB3's own checks stumble over: the tuple of a reset, no dict for a Dict space, or other keys."""
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            raise ValueError(
                "predict() got the tuple (observation, info) of Gymnasium's reset(); pass the observation alone"
            )
        if isinstance(self.observation_space, spaces.Dict):
            expected = sorted(self.observation_space.spaces)
            given = sorted(observation) if isinstance(observation, dict) else type(observation).__name__
            if given != expected:
                raise ValueError(f"predict() got {given}, observations of this agent are a dict with {expected}")

    def _warn_if_forgetful(self, forgotten: bool) -> None:
        """SB3's own policies need no state, so code that was written for them passes none."""
        self._calls_without_state = self._calls_without_state + 1 if forgotten else 0
        if self._calls_without_state == CALLS_WITHOUT_STATE:
            warnings.warn(
                f"predict() was called {CALLS_WITHOUT_STATE} times in a row without a state, so the agent forgets "
                "everything at each step and acts far worse: action, state = model.predict(obs, state, episode_start)",
                stacklevel=4,  # the caller of model.predict()
            )

    def _checked_state(self, state: Any, n: int) -> PolicyState:
        """Refuse a state for another number of environments, of another agent, or of no agent at all."""
        expected = [(n, self.world_model.rssm.packed_width), (n, self.actions.spec.width)]
        given = [np.shape(part) for part in state] if isinstance(state, tuple | list) else type(state).__name__
        if given != expected:
            raise ValueError(
                f"predict() got a state of {given}, expected {expected}: pass what the last call returned for the same "
                "environments, or state=None where all of them begin an episode"
            )
        return state

    def act(
        self,
        obs: Mapping[str, th.Tensor],
        packed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor | None,
        deterministic: bool = False,
    ) -> tuple[th.Tensor, th.Tensor]:
        """One step on tensors: (n, .) observations, (n, P) states, (n, A) actions -> encoded actions, packed states."""
        state = self.observe(obs, packed, prev_action, is_first, sample=not deterministic)
        policy = self.actor(state.features)
        action = policy.mode() if deterministic else policy.sample()
        if self.actions.spec.kind == "vector":
            action = action.clamp(-1.0, 1.0)
        return action, self.world_model.rssm.pack(state)

    def observe(
        self,
        obs: Mapping[str, th.Tensor],
        packed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor | None,
        sample: bool = True,
    ) -> State:
        """The n model states after seeing the observations; arguments as in :meth:`act`."""
        return self.observe_embedded(self.world_model.embed(obs), packed, prev_action, is_first, sample)

    def observe_embedded(
        self,
        embed: th.Tensor,
        packed: th.Tensor,
        prev_action: th.Tensor,
        is_first: th.Tensor | None,
        sample: bool = True,
    ) -> State:
        """The same from embeddings of the observations (n, E).

        An episode begins with zeros, the initial state: written, since a state that is not finite times zero stays so.
        """
        rssm = self.world_model.rssm
        if is_first is not None:
            packed, prev_action = (x.masked_fill(is_first.unsqueeze(-1), 0.0) for x in (packed, prev_action))
        return rssm.observe_step(rssm.unpack(packed), embed, prev_action, sample)

    @th.inference_mode()
    def latents(self, state: PolicyState) -> np.ndarray:
        """What the replay keeps of the state that ``predict`` gave: (n, latent_width)."""
        rssm = self.world_model.rssm
        return rssm.latents(rssm.unpack(th.as_tensor(state[0], device=self.device))).cpu().numpy()

    def forward(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        """See :meth:`_predict`."""
        return self._predict(observation, deterministic)

    def _predict(self, observation: Any, deterministic: bool = False) -> th.Tensor:
        """First action of an episode, encoded; SB3's abstract method. Use :meth:`predict`, which keeps the state."""
        obs = by_key(observation)
        n = len(next(iter(obs.values())))
        packed, prev_action = (th.as_tensor(x, device=self.device) for x in self.initial_state(n))
        return self.act(obs, packed, prev_action, th.ones(n, dtype=th.bool, device=self.device), deterministic)[0]

    # -- what SB3 calls ------------------------------------------------------------------------------------------------

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """From the bounds of the Box to [-1, 1], see :class:`~sb3_dreamer.actions.ActionCodec`."""
        return self.actions.scale(action)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the bounds of the Box."""
        return self.actions.unscale(scaled_action)


class MlpPolicy(DreamerPolicy):
    """For vector, discrete and binary observations."""

    alias = "MlpPolicy"


class CnnPolicy(DreamerPolicy):
    """For image observations."""

    alias = "CnnPolicy"


class MultiInputPolicy(DreamerPolicy):
    """For Dict observations."""

    alias = "MultiInputPolicy"
