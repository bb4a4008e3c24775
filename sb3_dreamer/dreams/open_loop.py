"""Open-loop prediction: after a context of real steps the model dreams on, with the actions that were really taken.

Time, for a context of c entries::

    entry    0     1    ...   c-1      c       c+1   ...   T-1
    truth    o_0   o_1        o_{c-1}  o_c     o_{c+1}
    dream    reconstructed             dreamed, not observed:   s_{c-1}, a_{c-1} -> s_c,  s_c, a_c -> s_{c+1}
    ahead                     0        1       2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_dreamer.behavior.imagination import imagine_actions
from sb3_dreamer.policies import DreamerPolicy
from sb3_dreamer.types import Batch, Spec
from sb3_dreamer.world_model.codes import flat, one_hot


class Pair(NamedTuple):
    """One quantity, real and dreamed.

    :param truth: (B, T, ...).
    :param dream: (M, B, T, ...), M dreams of each sequence.
    """

    truth: np.ndarray
    dream: np.ndarray


@dataclass(frozen=True)
class OpenLoop:
    """M dreams of each of B sequences of T entries; only the first ``context`` entries were seen.

    :param specs: observation key -> spec.
    :param obs: observation key -> pair, in the units and dtype of the model's input.
    :param reward: pair of (B, T).
    :param cont: the probability that the episode continues; its truth is 0 at a terminal entry, else 1.
    :param value: the critic's value in the dream; its truth is the critic's value when every observation is seen.
    :param valid: (B, T) bool, false from the first entry after the context that starts another episode.
    :param context: entries seen.
    """

    specs: dict[str, Spec]
    obs: dict[str, Pair]
    reward: Pair
    cont: Pair
    value: Pair
    valid: np.ndarray
    context: int

    @property
    def horizon(self) -> int:
        """Steps dreamed."""
        return self.valid.shape[1] - self.context

    @property
    def best_sequences(self) -> np.ndarray:
        """The sequences, those with the most valid entries first."""
        return np.argsort(-self.valid.sum(1), kind="stable")


@th.no_grad()
def open_loop(policy: DreamerPolicy, batch: Batch, context: int = 10, samples: int = 16) -> OpenLoop:
    """Let the model see the first entries of a batch, and dream the others.

    :param policy: of a Dreamer.
    :param batch: sequences as the replay samples them.
    :param context: entries that the model sees.
    :param samples: dreams M of each sequence; their spread is the uncertainty of the model.
    :raises ValueError: if the batch is too short for this context.
    """
    n, length = batch.reward.shape
    if not 0 < context < length:
        raise ValueError(f"context={context} must be between 1 and {length - 1}: sequences have {length} entries")
    world_model, rssm = policy.world_model, policy.world_model.rssm
    observed, _ = world_model.observe(batch)

    def seen(x: th.Tensor) -> th.Tensor:  # (B, T, .) -> (M * B, context, .)
        return x[:, :context].repeat(samples, *[1] * (x.ndim - 1))

    embed = world_model.embed({key: value[:, :context] for key, value in batch.obs.items()})
    start = rssm.restore(batch.start.repeat(samples, 1))
    states, _ = rssm.observe(seen(embed), seen(batch.prev_action), seen(batch.is_first), start)
    dream = imagine_actions(world_model, states[:, -1], batch.prev_action[:, context:].repeat(samples, 1, 1))
    features = th.cat([states.features[:, :-1], dream.features], 1).unflatten(0, (samples, n))  # (M, B, T, F)

    decoded = [world_model.predict_obs(dreamed) for dreamed in features]  # one dream at a time: images are large
    values = th.stack([policy.critic.value(dreamed) for dreamed in features])
    return OpenLoop(
        specs=dict(world_model.decoder.specs),
        obs={key: pair(value, th.stack([obs[key] for obs in decoded])) for key, value in batch.obs.items()},
        reward=pair(batch.reward, world_model.predict_reward(features)),
        cont=pair((~batch.is_terminal).float(), world_model.predict_continue(features)),
        value=pair(policy.critic.value(observed.features), values),
        valid=valid_entries(batch.is_first, context),
        context=context,
    )


def pair(truth: th.Tensor, dream: th.Tensor) -> Pair:
    """A pair of arrays from tensors."""
    return Pair(truth.cpu().numpy(), dream.cpu().numpy())


def valid_entries(is_first: th.Tensor, context: int) -> np.ndarray:
    """(B, T) bool, false from the first entry after the context that starts another episode."""
    restarts = is_first.cpu().numpy().copy()
    restarts[:, :context] = False
    return restarts.cumsum(1) == 0


def numbers(observed: np.ndarray, spec: Spec) -> np.ndarray:
    """An observation as floats: (..., *shape) -> (..., X). Images in [0, 1], integers as one-hot vectors."""
    code = one_hot if spec.kind == "discrete" else flat
    floats = code(th.from_numpy(observed), spec).numpy()
    return floats / 255 if spec.kind == "image" else floats


def dimension_names(specs: Mapping[str, Spec]) -> dict[str, list[str]]:
    """Key -> names of its dimensions, as in ``obs[3]``; keys of images are left out."""
    widths = {key: spec.width for key, spec in specs.items() if spec.kind != "image"}
    return {key: [f"{key}[{i}]" for i in range(width)] for key, width in widths.items()}
