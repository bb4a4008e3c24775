"""Diagnostic numbers of a Dreamer, and warnings that say what is wrong and what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th

from sb3_dreamer.behavior.imagination import imagine, lambda_returns
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.horizon import HorizonError, reward_name
from sb3_dreamer.nets.distributions import categorical_entropy
from sb3_dreamer.types import Batch

DEAD = 0.01  # nats; a latent with less information about the data is dead
STARTS = 256  # number of dreams for the mean imagined return

Signs = dict[str, float]


@th.no_grad()
def signs_of(
    model: Dreamer, batch: Batch, errors: Mapping[str, HorizonError], real_return: float = float("nan")
) -> Signs:
    """The numbers that the warnings depend on.

    :param model: the model.
    :param batch: training data, or new data.
    :param errors: of the open-loop dreams.
    :param real_return: mean of :func:`returns_to_go` over real episodes, if known.
    :return: "kl" and "kl_capacity" (the maximum for these latents) in nats, "dead_latents" (share), "rewarded" (share
        of entries), "imagined_return", "real_return", "return_scale", means over observation keys of "overconfidence"
        (without images) and "error_ratio" (within the imagination horizon, without keys that do not change), see
        :class:`~sb3_dreamer.dreams.horizon.HorizonError`, and "reward_error_ratio".
    """
    policy = model.policy
    world_model = policy.world_model
    states, post = world_model.observe(batch)
    _, info = world_model.rssm.kl_loss(states, post)
    classes, stoch = post.shape[-2:]
    alive = (~batch.is_terminal.flatten()).nonzero().squeeze(-1)
    starts = alive[th.randperm(len(alive), device=alive.device)[:STARTS]]
    dream = imagine(world_model, policy.actor, states.flatten()[starts], model.imagination_horizon)
    returns = lambda_returns(dream.reward, dream.discount, policy.critic.value(dream.features), model.gae_lambda)
    ratio = {key: error.ratio(model.imagination_horizon) for key, error in errors.items()}
    return {
        "kl": info["kl"].item(),
        "kl_capacity": stoch * float(np.log(classes)),
        "dead_latents": (information(post) < DEAD).float().mean().item(),
        "rewarded": (batch.reward != 0).float().mean().item(),
        "imagined_return": returns[:, 0].mean().item(),
        "real_return": real_return,
        "return_scale": policy.return_scale.scale.item(),
        "overconfidence": mean_of_known([errors[key].overconfidence for key in batch.obs]),
        "error_ratio": mean_of_known([ratio[key] for key in batch.obs]),
        "reward_error_ratio": ratio[reward_name(batch.obs)],
    }


def mean_of_known(numbers: list[float]) -> float:
    """Mean of those that are not NaN; NaN if none is."""
    known = [number for number in numbers if not np.isnan(number)]
    return float(np.mean(known)) if known else float("nan")


def information(post: th.Tensor) -> th.Tensor:
    """Nats of information in each latent about the data: entropy of mean minus mean entropy, (..., K, S) -> (S,)."""
    post = post.flatten(0, -3)
    return categorical_entropy(post.mean(0)) - categorical_entropy(post).mean(0)


def returns_to_go(rewards: np.ndarray, terminated: bool, gamma: float) -> np.ndarray:
    """Discounted sum of the rewards from each step of an episode on: (L,) -> (L,).

    A truncated episode is assumed to continue with its mean reward, since the model expects it to continue; without a
    discount this sum would be infinite, and later rewards are left out.

    :param rewards: (L,) in the order of time.
    :param terminated: false if the episode was truncated.
    :param gamma: discount.
    """
    future = 0.0 if terminated or gamma == 1 else float(rewards.mean()) / (1 - gamma)
    returns = np.empty(len(rewards))
    for t in reversed(range(len(rewards))):
        future = rewards[t] + gamma * future
        returns[t] = future
    return returns


@dataclass
class RealReturns:
    """Collects the rewards of n environments and averages the returns of their newest episodes.

    :param gamma: discount.
    :param newest: number of episodes in the mean.
    """

    gamma: float
    newest: int = 20
    _running: dict[int, list[float]] = field(default_factory=dict)
    _means: list[float] = field(default_factory=list)

    def add(
        self, starts: Sequence[bool] | np.ndarray, rewards: np.ndarray, dones: np.ndarray, infos: list[dict]
    ) -> None:
        """Add one step of all environments, as ``VecEnv.step`` returns it; ``starts``: the first of an episode."""
        for i, (start, reward, done, info) in enumerate(zip(starts, rewards, dones, infos, strict=True)):
            if start:  # an episode that has not ended is dropped
                self._running[i] = []
            self._running.setdefault(i, []).append(float(reward))
            if done:
                terminated = not info.get("TimeLimit.truncated", False)
                returns = returns_to_go(np.array(self._running.pop(i)), terminated, self.gamma)
                self._means = [*self._means, float(returns.mean())][-self.newest :]

    @property
    def mean(self) -> float:
        """NaN until an episode has ended."""
        return float(np.mean(self._means)) if self._means else float("nan")


@dataclass(frozen=True)
class Trouble:
    """One known problem of world models.

    :param name: identifies it.
    :param found: whether the signs show it. Comparisons with NaN are false: an unknown sign is no trouble.
    :param message: what it means and what to try; a format string for the signs.
    """

    name: str
    found: Callable[[Mapping[str, float]], bool]
    message: str


TROUBLES = (
    Trouble(
        "dreams_too_optimistic",
        lambda s: s["imagined_return"] - s["real_return"] > max(0.5 * abs(s["real_return"]), s["return_scale"]),
        "The dreams predict a return of {imagined_return:.3g}, real episodes have {real_return:.3g}. Early in "
        "training the critic has not converged; later the actor exploits errors of the world model. Try a lower "
        "learning_rate, a higher train_ratio or a larger model_size, and look at the reward in the open-loop plot.",
    ),
    Trouble(
        "kl_collapse",
        lambda s: s["kl"] < 0.01,
        "The latents contain nothing that the model did not predict (KL {kl:.2g} nats): it ignores the observations. "
        "Look at their scale (VecNormalize helps if they are below 0.01), and whether they change at all.",
    ),
    Trouble(
        "kl_explosion",
        lambda s: s["kl"] > s["kl_capacity"],
        "Each step surprises the model by {kl:.3g} nats, more than a uniform guess ({kl_capacity:.3g}): it has not "
        "learned the dynamics. Early in training this is normal; later try a lower learning_rate, and look for "
        "discontinuous observations.",
    ),
    Trouble(
        "dead_latents",
        lambda s: s["dead_latents"] > 0.9,
        "{dead_latents:.0%} of the latents hardly depend on the observations. Early in training this is normal; "
        "later look at the scale of the observations, or take a smaller model_size: the task may not need them.",
    ),
    Trouble(
        "no_reward",
        lambda s: s["rewarded"] == 0 and not abs(s["real_return"]) > 0,
        "No reward in the data, so the actor has nothing to learn from. Try more learning_starts, demonstrations "
        "through warm_start(teacher), or a denser reward.",
    ),
    Trouble(
        "worse_than_persistence",
        lambda s: s["error_ratio"] > 1,
        "The dreams are worse than the forecast that nothing changes (error {error_ratio:.2f} times as large): the "
        "model is not good enough to learn in yet. Give it more updates (train_ratio) or a larger model_size.",
    ),
    Trouble(
        "rewards_unknown",
        lambda s: s["reward_error_ratio"] > 2,
        "The error of dreamed rewards is {reward_error_ratio:.1f} times that of the forecast that they do not change: "
        "dreams teach the actor little. Early in training this is normal; later give the model more updates "
        "(train_ratio), and look for rewards that depend on something that is not observed.",
    ),
)


def find_trouble(signs: Mapping[str, float]) -> dict[str, str]:
    """Name -> message of every trouble that the signs show.

    :param signs: of :func:`signs_of`.
    """
    return {trouble.name: trouble.message.format(**signs) for trouble in TROUBLES if trouble.found(signs)}
