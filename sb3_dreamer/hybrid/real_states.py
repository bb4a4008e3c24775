"""Model states of real episodes, filtered from the replay, and their returns in dreams."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_dreamer.behavior.imagination import imagine, lambda_returns
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.environments import normalizes_obs
from sb3_dreamer.replay import Episode, read_episodes
from sb3_dreamer.spaces import decoded_observations, parts_of
from sb3_dreamer.types import Dream
from sb3_dreamer.world_model.rssm import State

EPISODES_PER_BATCH = 64  # filtered together
STATES_PER_CHUNK = 2048  # dreamed from together
STATES_PER_DECODING = 512  # decoded together; they may be images
MAX_BYTES = 2**31  # of states and observations: a transformer's state holds 64 entries of context, images are large too
COPIES = 5  # of each observation, while episodes are concatenated and made into targets
MIN_ENTRIES = 1_000  # however large they are


@dataclass
class RealStates:
    """M entries of real episodes, one episode after the other; arrangement in time as in ``sb3_dreamer.types``.

    :param obs: key -> (M, *shape) the policy's input: normalized where the environment normalizes.
    :param action: (M, A) encoded, taken after seeing the entry; zero at the last entry of an episode.
    :param reward: (M,) that came with the entry, normalized where the environment normalizes.
    :param is_last: (M,) bool, the last known entry of an episode.
    :param is_terminal: (M,) bool.
    :param packed: (M, P) packed model state after seeing the entry, with its expected latents.
    """

    obs: dict[str, np.ndarray]
    action: th.Tensor
    reward: th.Tensor
    is_last: np.ndarray
    is_terminal: np.ndarray
    packed: th.Tensor

    def __len__(self) -> int:
        return len(self.is_last)


def real_states(model: Dreamer, newest: int) -> RealStates:
    """Filter the newest part of the replay with the present model, as ``predict(deterministic=True)`` does.

    :param model: the model.
    :param newest: maximum number of entries; fewer if states and observations would take more than 2 GiB.
    """
    width, parts = model.policy.world_model.rssm.packed_width, parts_of(model.observation_space).values()
    observed = sum(math.prod(part.shape or ()) * np.dtype(part.dtype).itemsize for part in parts)
    newest = min(newest, max(MAX_BYTES // (4 * width + COPIES * observed), MIN_ENTRIES))
    episodes = sorted(read_episodes(model.replay_buffer, newest), key=len, reverse=True)
    begins = np.cumsum([0, *(len(e) + 1 for e in episodes)])
    packed = th.zeros(int(begins[-1]), width, device=model.device)
    for i in range(0, len(episodes), EPISODES_PER_BATCH):
        _filter(model, episodes[i : i + EPISODES_PER_BATCH], packed, begins[i:])
    last = np.concatenate([np.arange(len(e) + 1) == len(e) for e in episodes])
    normalize = model.get_vec_normalize_env()
    reward = np.concatenate([np.append(np.float32(0.0), e.reward) for e in episodes])
    is_first = np.roll(last, 1)
    if normalize is not None:
        reward = np.where(is_first, 0.0, normalize.normalize_reward(reward)).astype(np.float32)
    actions = [th.cat([_encoded(model, e), th.zeros(1, model.policy.actions.spec.width)]) for e in episodes]
    return RealStates(
        obs={key: np.concatenate([_as_policy_input(model, e)[key] for e in episodes]) for key in episodes[0].obs},
        action=th.cat(actions).to(model.device),
        reward=th.as_tensor(reward, device=model.device),
        is_last=last,
        is_terminal=np.concatenate([(np.arange(len(e) + 1) == len(e)) & e.terminal for e in episodes]),
        packed=packed,
    )


@th.no_grad()
def _filter(model: Dreamer, episodes: list[Episode], packed: th.Tensor, begins: np.ndarray) -> None:
    """Write the states of some episodes, the longest first, to the rows of ``packed`` from ``begins`` on."""
    world_model, rssm = model.policy.world_model, model.policy.world_model.rssm
    obs, actions = [_as_policy_input(model, e) for e in episodes], [_encoded(model, e) for e in episodes]
    lengths = np.array([len(e) + 1 for e in episodes])
    state = rssm.initial(len(episodes))
    for t in range(lengths[0]):
        n = int((lengths > t).sum())
        now = {key: th.as_tensor(np.stack([o[key][t] for o in obs[:n]]), device=model.device) for key in obs[0]}
        before = th.stack([a[t - 1] if t else th.zeros_like(a[0]) for a in actions[:n]]).to(model.device)
        state = rssm.observe_step(state[:n], world_model.embed(now), before, sample=False)
        packed[th.as_tensor(begins[:n] + t, device=model.device)] = rssm.pack(state)


def _as_policy_input(model: Dreamer, episode: Episode) -> dict[str, np.ndarray]:
    """The observations as the policy sees them."""
    normalize = model.get_vec_normalize_env()
    return episode.obs if normalize is None else model.replay_buffer.normalize_obs(episode.obs, normalize)


def _encoded(model: Dreamer, episode: Episode) -> th.Tensor:
    """The actions (L, A) as the model sees them."""
    if isinstance(model.action_space, spaces.Box):  # scaled already
        return th.as_tensor(episode.action.reshape(len(episode), -1), dtype=th.float32)
    return th.as_tensor(model.policy.actions.encode(episode.action))


def unpacked(model: Dreamer, packed: th.Tensor) -> State:
    """States of the model from rows of ``RealStates.packed``."""
    return model.policy.world_model.rssm.unpack(packed)


@th.no_grad()
def imagined_observations(model: Dreamer, features: th.Tensor) -> dict[str, np.ndarray]:
    """Features (n, F) -> what the policy would see there, (n, *shape) by key.

    Where the environment normalizes, values are clipped as VecNormalize does: the space bounds the original values.
    """
    parts = [_imagined_observations(model, part) for part in features.split(STATES_PER_DECODING)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _imagined_observations(model: Dreamer, features: th.Tensor) -> dict[str, np.ndarray]:
    decoded = model.policy.world_model.predict_obs(features)
    obs, normalize = decoded_observations(model.observation_space, decoded), model.get_vec_normalize_env()
    if normalizes_obs(normalize):
        for key in normalize.norm_obs_keys or obs:
            obs[key] = decoded[key].float().clamp(-normalize.clip_obs, normalize.clip_obs).cpu().numpy()
    return obs


@th.no_grad()
def dream_returns(
    model: Dreamer, start: State, gamma: float, first_action: th.Tensor | None = None, sample: bool = True
) -> tuple[Dream, th.Tensor]:
    """Let Dreamer act in its dream, and compute the return of each of its actions under another discount.

    At the horizon the values of Dreamer's critic are used, scaled from its discount to ``gamma``.

    :param model: the model.
    :param start: N states.
    :param gamma: discount of the algorithm that takes over.
    :param first_action: (N, A) actions to take at the start instead of Dreamer's.
    :param sample: sample latents and actions; otherwise the dream is deterministic.
    :return: the dream; returns (N, H).
    """
    policy = model.policy
    dream = imagine(policy.world_model, policy.actor, start, model.imagination_horizon, first_action, sample)
    own_gamma = policy.world_model.gamma  # of the last update; model.gamma is that of the next one
    scale = (1 - own_gamma) / (1 - gamma) if max(gamma, own_gamma) < 1 else 1.0
    values = policy.critic.value(dream.features) * scale
    discount = dream.discount / own_gamma * gamma
    return dream, lambda_returns(dream.reward, discount, values, model.gae_lambda)
