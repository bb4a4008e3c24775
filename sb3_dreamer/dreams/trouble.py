"""Signs of health of a Dreamer, and warnings that name the trouble and what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch as th

from sb3_dreamer.behavior.imagination import imagine, lambda_returns
from sb3_dreamer.dreamer import Dreamer
from sb3_dreamer.dreams.horizon import HorizonError, reward_name
from sb3_dreamer.types import Batch

DEAD = 0.01  # nats; a latent that tells less than this about the data is dead
STARTS = 256  # dreams that the imagined return is the mean of

Signs = dict[str, float]


@th.no_grad()
def signs_of(
    model: Dreamer, batch: Batch, errors: Mapping[str, HorizonError], real_return: float = float("nan")
) -> Signs:
    """What the warnings look at.

    :param model: the model.
    :param batch: data that it was trained on, or that it met.
    :param errors: of the open-loop dreams.
    :param real_return: mean of :func:`returns_to_go` over real episodes, if known.
    :return: "kl" and "kl_capacity" (the most that the latents can hold) in nats, "dead_latents" (share),
        "rewarded" (share of entries), "imagined_return", "real_return", "return_scale", means over observation
        keys of "too_sure" and "error_ratio" (that of the steps which the actor learns in, of keys that do change), see
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
    ratios = [ratio[key] for key in batch.obs if not np.isnan(ratio[key])]
    return {
        "kl": info["kl"].item(),
        "kl_capacity": stoch * float(np.log(classes)),
        "dead_latents": (information(post) < DEAD).float().mean().item(),
        "rewarded": (batch.reward != 0).float().mean().item(),
        "imagined_return": returns[:, 0].mean().item(),
        "real_return": real_return,
        "return_scale": policy.return_scale.scale.item(),
        "too_sure": float(np.mean([errors[key].too_sure for key in batch.obs])),
        "error_ratio": float(np.mean(ratios)) if ratios else float("nan"),
        "reward_error_ratio": ratio[reward_name(batch.obs)],
    }


def information(post: th.Tensor) -> th.Tensor:
    """Nats that each latent tells about the data: entropy of the mean less mean entropy, (..., K, S) -> (S,)."""
    post = post.flatten(0, -3)
    return entropy(post.mean(0)) - entropy(post).mean(0)


def entropy(probs: th.Tensor) -> th.Tensor:
    """Of each latent in nats: (..., K, S) -> (..., S)."""
    return -(probs * probs.log()).sum(-2)


def returns_to_go(rewards: np.ndarray, terminated: bool, gamma: float) -> np.ndarray:
    """Discounted sum of the rewards that followed each step of an episode: (L,) -> (L,).

    An episode that was cut short is taken to go on with its mean reward, as the model takes it to go on; without a
    discount, that would never end, and what followed is left out.

    :param rewards: (L,) in the order of time.
    :param terminated: the episode ended for good.
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
    """Collects the rewards of n environments and keeps the mean return of their newest episodes.

    :param gamma: discount.
    :param newest: the mean is over this many episodes.
    """

    gamma: float
    newest: int = 20
    _running: dict[int, list[float]] = field(default_factory=dict)
    _means: list[float] = field(default_factory=list)

    def add(
        self, begins: Sequence[bool] | np.ndarray, rewards: np.ndarray, dones: np.ndarray, infos: list[dict]
    ) -> None:
        """One step of all environments, as ``VecEnv.step`` returns it; ``begins``: where an episode began with it."""
        for i, (begin, reward, done, info) in enumerate(zip(begins, rewards, dones, infos)):
            if begin:  # what was under way there has been cut
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
    """One thing that goes wrong in world models.

    :param name: for the log.
    :param found: whether the signs show it. A comparison with NaN is false: what is not known is no trouble.
    :param message: what it means and what to try; the signs are filled in.
    """

    name: str
    found: Callable[[Mapping[str, float]], bool]
    message: str


TROUBLES = (
    Trouble(
        "dreams_too_rosy",
        lambda s: s["imagined_return"] - s["real_return"] > max(0.5 * abs(s["real_return"]), s["return_scale"]),
        "The dreams promise a return of {imagined_return:.3g}, real episodes bring {real_return:.3g}. Early in "
        "training the critic is not there yet; later the actor makes use of errors of the world model. Try a lower "
        "learning_rate, a higher train_ratio or a larger model_size, and look at the reward in the open-loop plot.",
    ),
    Trouble(
        "kl_collapse",
        lambda s: s["kl"] < 0.01,
        "The latents tell nothing that the model did not expect (KL {kl:.2g} nats): it ignores the observations. "
        "Look at their scale (VecNormalize helps if they are below 0.01), and whether they change at all.",
    ),
    Trouble(
        "kl_explosion",
        lambda s: s["kl"] > s["kl_capacity"],
        "Each step surprises the model by {kl:.3g} nats, more than if it guessed ({kl_capacity:.3g}): it has not "
        "learned what comes next. Early in training this passes; later try a lower learning_rate, and look for "
        "observations that jump.",
    ),
    Trouble(
        "dead_latents",
        lambda s: s["dead_latents"] > 0.9,
        "{dead_latents:.0%} of the latents say the same whatever is observed. Early in training this passes; "
        "later look at the scale of the observations, or take a smaller model_size: the task may not need them.",
    ),
    Trouble(
        "no_reward",
        lambda s: s["rewarded"] == 0 and not abs(s["real_return"]) > 0,
        "No reward in the data: there is nothing to learn to want. Try more learning_starts, demonstrations "
        "through warm_start(teacher), or a denser reward.",
    ),
    Trouble(
        "worse_than_nothing_changes",
        lambda s: s["error_ratio"] > 1,
        'The dreams are worse than "nothing changes" (error {error_ratio:.2f} times as large): the model is not '
        "yet good enough to learn in. Give it more updates (train_ratio) or a larger model_size.",
    ),
    Trouble(
        "rewards_unknown",
        lambda s: s["reward_error_ratio"] > 2,
        "The dreamed rewards are {reward_error_ratio:.1f} times as far off as if they never changed: what the actor "
        "learns in dreams means little. Early in training this passes; later give the model more updates "
        "(train_ratio), and look for rewards that depend on what is not observed.",
    ),
)


def find_trouble(signs: Mapping[str, float]) -> dict[str, str]:
    """Name -> readable message of every trouble that the signs show.

    :param signs: of :func:`signs_of`.
    """
    return {trouble.name: trouble.message.format(**signs) for trouble in TROUBLES if trouble.found(signs)}
