"""Fresh data: a trained model, or random actions, in an environment, stored in a replay of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped, unwrap_vec_normalize

from sb3_dreamer.acting import require_same_units
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.trouble import RealReturns
from sb3_dreamer.replay import SequenceReplayBuffer


def collect(
    model: Dreamer, env: GymEnv, n_steps: int, sequence_length: int = 64, random_actions: bool = False
) -> tuple[SequenceReplayBuffer, float]:
    """Let the model act, and store all steps.

    :param model: acts as in training, with sampled actions; the model itself does not change.
    :param env: one environment or a VecEnv with the model's spaces; it is reset first.
    :param n_steps: steps of each environment.
    :param sequence_length: entries of the sequences that the replay samples.
    :param random_actions: draw actions from the action space instead.
    :raises ValueError: if ``env`` normalizes observations and the model was trained without, or the reverse.
    :return: the replay, which holds the model's input (normalized if ``env`` normalizes); the mean real return.
    """
    env = model._wrap_env(env)
    require_same_units(model, env)
    buffer = SequenceReplayBuffer(
        max((n_steps * 2 + 1) * env.num_envs, env.num_envs * (sequence_length + 1)),  # an episode has an entry more
        input_space(model.observation_space, env),
        model.action_space,
        device=model.device,
        n_envs=env.num_envs,
        sequence_length=sequence_length,
        latent_size=model.policy.world_model.rssm.latent_width,
    )
    returns = RealReturns(model.gamma, newest=10**6)
    with statistics_kept(env):
        _act(model, env, n_steps, random_actions, buffer, returns)
    return buffer, returns.mean


def _act(
    model: Dreamer,
    env: VecEnv,
    n_steps: int,
    random_actions: bool,
    buffer: SequenceReplayBuffer,
    returns: RealReturns,
) -> None:
    obs, state, start = env.reset(), None, np.ones(env.num_envs, bool)
    for _ in range(n_steps):
        actions, state = model.predict(obs, state, start)  # type: ignore[arg-type]
        if random_actions:
            actions = np.array([model.action_space.sample() for _ in range(env.num_envs)])
            state = (state[0], model.policy.actions.encode(actions))
        next_obs, rewards, dones, infos = env.step(actions)
        stored, latent = model.policy.actions.to_replay(actions), model.policy.latents(state)
        buffer.add(obs, next_obs, stored, rewards, dones, infos, latent=latent)  # type: ignore[arg-type]
        returns.add(start, rewards, dones, infos)
        obs, start = next_obs, dones
    if env is model.env:
        model._last_obs = None  # the next learn() resets it first


@contextmanager
def statistics_kept(env: VecEnv) -> Iterator[None]:
    """Within this context, VecNormalize does not update its statistics."""
    normalize = unwrap_vec_normalize(env)
    if normalize is None:
        yield
        return
    training, normalize.training = normalize.training, False
    try:
        yield
    finally:
        normalize.training = training


def input_space(space: spaces.Space, env: VecEnv) -> spaces.Space:
    """Space of the model's observations: VecNormalize turns whole numbers into fractions."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: input_space(part, env) for key, part in space.spaces.items()})
    if not is_vecenv_wrapped(env, VecNormalize) or not isinstance(space, spaces.Box) or is_image_space(space):
        return space
    return spaces.Box(-np.inf, np.inf, space.shape, np.float32)


def original_units(env: VecEnv | None, obs: np.ndarray) -> np.ndarray:
    """Undo VecNormalize, if there is one."""
    normalize = None if env is None else unwrap_vec_normalize(env)
    return obs if normalize is None else normalize.unnormalize_obs(obs)  # type: ignore[return-value]
