"""The world model: what happens next, how much reward it brings, and whether the episode continues."""

from __future__ import annotations

from collections.abc import Mapping

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import symexp_bins, twohot_loss, twohot_mean
from sb3_dreamer.nets.layers import MLP, Linear, to_autocast_dtype
from sb3_dreamer.types import Batch, Size, Spec
from sb3_dreamer.world_model.decoders import Decoder
from sb3_dreamer.world_model.encoders import Encoder
from sb3_dreamer.world_model.normalizer import ObsNormalizer
from sb3_dreamer.world_model.rssm import RSSM, State

Losses = dict[str, th.Tensor]


class TwoHotHead(nn.Module):
    """MLP that predicts a number as a distribution over 255 symexp-spaced bins; predicts exactly 0 at the start.

    :param features: F.
    :param units: width of the layers.
    :param layers: how many.
    """

    bins: th.Tensor

    def __init__(self, features: int, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = MLP(features, units, layers)
        self.register_buffer("bins", symexp_bins(), persistent=False)
        self.out = Linear(units, self.bins.shape[0], scale=0.0)

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Features (..., F) -> logits (..., bins)."""
        return self.out(self.mlp(features)).to(self.bins.dtype)

    def mean(self, logits: th.Tensor) -> th.Tensor:
        """Expected value of the logits: (..., bins) -> (...)."""
        return twohot_mean(logits, self.bins)

    def loss(self, logits: th.Tensor, *targets: th.Tensor) -> th.Tensor:
        """Cross-entropy to the two-hot codes of the targets, summed over them: (..., bins), (...) each -> (...)."""
        return twohot_loss(logits, th.stack(targets, -1), self.bins)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and continue head.

    >>> model = WorldModel({"obs": Spec("vector", (17,))}, Spec("vector", (6,)), SIZES["size1m"])
    >>> losses, states, info = model.loss(batch)      # (B, T) each, states for imagination

    :param obs_specs: key -> spec of the observations.
    :param action_spec: spec of the actions.
    :param size: widths.
    :param rssm_type: "gru" or "transformer".
    :param gamma: discount; the continue head learns (1 - terminal) * gamma.
    :param normalize_obs: follow mean and variance of the vectors in :meth:`loss`; False: symlog alone, as in the paper.
    """

    def __init__(
        self,
        obs_specs: Mapping[str, Spec],
        action_spec: Spec,
        size: Size,
        rssm_type: str = "gru",
        gamma: float = 0.99,
        normalize_obs: bool = True,
    ) -> None:
        super().__init__()
        self.gamma = gamma
        self.normalize_obs = normalize_obs
        self.normalizer = ObsNormalizer(obs_specs)
        self.encoder = Encoder(obs_specs, size)
        self.rssm = RSSM(self.encoder.width, action_spec.width, size, rssm_type)
        self.feature_width = self.rssm.feature_width
        self.decoder = Decoder(obs_specs, self.feature_width, size)
        self.reward_head = TwoHotHead(self.feature_width, size.units, layers=1)
        self.continue_head = nn.Sequential(MLP(self.feature_width, size.units, layers=1), Linear(size.units, 1))

    def embed(self, obs: Mapping[str, th.Tensor]) -> th.Tensor:
        """Raw observations, key -> (..., *shape), to embeddings (..., width)."""
        return self.encoder(self.normalizer(obs))

    def observe(self, batch: Batch) -> tuple[State, th.Tensor]:
        """Filter a batch: states (B, T) and posterior probabilities (B, T, K, S)."""
        start = self.rssm.restore(batch.start)
        return self.rssm.observe(self.embed(batch.obs), batch.prev_action, batch.is_first, start)

    def loss(self, batch: Batch) -> tuple[Losses, State, dict[str, th.Tensor]]:
        """Everything the world model learns from (paper, "World model learning").

        :return: losses "reconstruction", "reward", "continue", "dyn", "rep", each (B, T); states (B, T); info.
        """
        if self.normalize_obs:
            self.normalizer.update(batch.obs)
        states, post = self.observe(batch)
        losses, info = self.rssm.kl_loss(states, post)
        features = to_autocast_dtype(states.features)
        losses["reconstruction"] = self.decoder.loss(features, self.normalizer(batch.obs))
        losses["reward"] = self.reward_head.loss(self.reward_head(features), batch.reward)
        losses["continue"] = self.continue_loss(features, batch.is_terminal)
        return losses, states, info

    def continue_loss(self, features: th.Tensor, is_terminal: th.Tensor) -> th.Tensor:
        """Cross-entropy of the continue head to (1 - terminal) * gamma: (..., F), (...) -> (...)."""
        logits = self.continue_head(features).squeeze(-1).to(self.reward_head.bins.dtype)
        target = (~is_terminal).to(logits.dtype) * self.gamma
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    def predict_obs(self, features: th.Tensor) -> dict[str, th.Tensor]:
        """Features (..., F) to observations by key, in the space's units; images uint8."""
        return self.normalizer.undo(self.decoder.predict(features))

    def predict_reward(self, features: th.Tensor) -> th.Tensor:
        """Expected reward of being in a state: (..., F) -> (...)."""
        return self.reward_head.mean(self.reward_head(features))

    def predict_discount(self, features: th.Tensor) -> th.Tensor:
        """Probability that the episode continues after a state, times gamma: (..., F) -> (...)."""
        logits = self.continue_head(features).squeeze(-1)
        return th.sigmoid(logits.to(self.reward_head.bins.dtype))

    def predict_continue(self, features: th.Tensor) -> th.Tensor:
        """Probability that the episode continues after a state: (..., F) -> (...)."""
        return (self.predict_discount(features) / self.gamma).clamp(max=1.0)  # the head may predict more than gamma
