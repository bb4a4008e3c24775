"""The recurrent state-space model: h_t from the sequence model, z_t from the observation or from the prior."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_dreamer.nets.distributions import categorical_entropy, categorical_kl, sample_onehot, unimix_probs
from sb3_dreamer.nets.layers import Dense, Linear, to_autocast_dtype
from sb3_dreamer.types import Size
from sb3_dreamer.world_model.context import Context
from sb3_dreamer.world_model.sequence import SEQUENCE_MODELS, SequenceModel

FREE_NATS = 1.0


@dataclass
class State:
    """The model's state at one step. Opaque outside this file: flatten, detach, index, read ``features``.

    :param features: (..., F) what the heads read: the deterministic state h, then the latents z, one-hot or as
        probabilities, class by class (the S latents lie side by side for each class: a softmax over few classes is fast
        across latents and slow within one).
    :param deter_width: D, how many of the features are h.
    :param context: what the sequence model remembers besides h and z.
    """

    features: th.Tensor
    deter_width: int
    context: Context = field(default_factory=Context)

    @classmethod
    def from_parts(cls, deter: th.Tensor, stoch: th.Tensor, context: Context | None = None) -> State:
        """h (..., D) and z (..., K * S)."""
        return cls(th.cat([deter, stoch], -1), deter.shape[-1], context or Context())

    @property
    def deter(self) -> th.Tensor:
        """(..., D) deterministic state h."""
        return self.features[..., : self.deter_width]

    @property
    def stoch(self) -> th.Tensor:
        """(..., K * S) latents z."""
        return self.features[..., self.deter_width :]

    def __getitem__(self, index: th.Tensor | slice | tuple) -> State:
        return State(self.features[index], self.deter_width, self.context[index])

    def flatten(self) -> State:
        """(B, T, .) -> (B * T, .)."""
        return State(self.features.flatten(0, 1), self.deter_width, self.context.flatten())

    def to_autocast_dtype(self) -> State:
        """Cast once to the type of autocast, so that imagination does not cast at every step."""
        return State(to_autocast_dtype(self.features), self.deter_width, self.context)

    def detach(self) -> State:
        """The same values without gradient."""
        return State(self.features.detach(), self.deter_width, self.context.detach())


class RSSM(nn.Module):
    """Sequence model, posterior and prior over S categorical latents (paper, "World model learning").

    :param embed_width: width of the encoder's output.
    :param action_width: A.
    :param size: widths.
    :param rssm_type: key of ``SEQUENCE_MODELS``.
    """

    class_numbers: th.Tensor

    def __init__(self, embed_width: int, action_width: int, size: Size, rssm_type: str = "gru") -> None:
        super().__init__()
        if rssm_type not in SEQUENCE_MODELS:
            raise ValueError(f'rssm_type="{rssm_type}" is unknown; use one of {sorted(SEQUENCE_MODELS)}')
        self.stoch, self.classes, self.deter = size.stoch, size.classes, size.deter
        z_width = size.stoch * size.classes
        self.sequence: SequenceModel = SEQUENCE_MODELS[rssm_type](z_width, action_width, size)
        # How much of h the posterior and the next step need: a parallel model computes h last.
        self.carried = 0 if self.sequence.parallel else size.deter
        self.posterior = Dense(self.carried + embed_width, size.hidden)
        self.posterior_logits = Linear(size.hidden, z_width)
        self.prior = nn.Sequential(Dense(size.deter, size.hidden), Dense(size.hidden, size.hidden))
        self.prior_logits = Linear(size.hidden, z_width)
        self.register_buffer("class_numbers", th.arange(1.0, size.classes + 1)[:, None], persistent=False)
        self.feature_width = size.deter + z_width
        self.latent_width = size.stoch + self.carried
        self.packed_width = self.feature_width + self.sequence.context_width

    # -- states --------------------------------------------------------------------------------------------------------

    def initial(self, n: int) -> State:
        """The state before an episode, for ``n`` members."""
        return self.restore(self.prior_logits.weight.new_zeros(n, self.latent_width))

    def latents(self, state: State) -> th.Tensor:
        """What the replay keeps of each state with one-hot latents: (..., latent_width). Of the initial one, zeros."""
        onehot = state.stoch.unflatten(-1, (self.classes, self.stoch))
        return th.cat([(onehot * self.class_numbers).sum(-2), state.deter[..., : self.carried]], -1)

    def restore(self, latents: th.Tensor) -> State:
        """Inverse of :meth:`latents`, (n, latent_width); what they do not contain starts from zero: the context, and h
        of a parallel model."""
        number, deter = latents.tensor_split([self.stoch], -1)
        onehot = number.unsqueeze(-2) == self.class_numbers  # (n, K, S)
        deter = F.pad(deter, (0, self.deter - self.carried))
        return State.from_parts(deter, onehot.flatten(-2).to(deter.dtype), self.sequence.unpack(latents[..., :0]))

    def pack(self, state: State) -> th.Tensor:
        """One float vector for each of n states, for ``predict``: (n, packed_width). Zeros are the initial state."""
        return th.cat([state.features, self.sequence.pack(state.context, state.deter)], -1)

    def unpack(self, packed: th.Tensor) -> State:
        """Inverse of :meth:`pack`: (n, packed_width)."""
        features, context = packed.tensor_split([self.feature_width], -1)
        return State(features, self.deter, self.sequence.unpack(context))

    # -- one step ------------------------------------------------------------------------------------------------------

    def observe_step(self, state: State, embed: th.Tensor, prev_action: th.Tensor, sample: bool = True) -> State:
        """The next state, having seen an observation.

        Without sampling, z is the class probabilities: the most likely classes taken together are not a typical sample,
        and an agent that is fed with them acts worse (``benchmarks/STUDIES.md``, "Acting deterministically").

        :param state: n states.
        :param embed: (n, E).
        :param prev_action: (n, A).
        :param sample: sample the latents, else take their probabilities.
        """
        deter, context = self.sequence(state.deter, state.stoch, prev_action, state.context)
        logits = self.posterior_logits(self.posterior(th.cat([deter[:, : self.carried], embed], -1)))
        return State.from_parts(deter, _latents(self._probs(logits), sample), context)

    def imagine_step(self, state: State, action: th.Tensor, sample: bool = True) -> State:
        """The next state by the prior, as the model expects it: n states, actions (n, A) -> n states.

        Without sampling the latents are their expectation.
        """
        deter, context = self.sequence(state.deter, state.stoch, action, state.context)
        stoch = _latents(self.prior_probs(deter), sample)
        kind = state.features.dtype
        return State.from_parts(deter.to(kind), stoch.to(kind), context)

    # -- a whole sequence ----------------------------------------------------------------------------------------------

    def observe(
        self, embed: th.Tensor, prev_action: th.Tensor, is_first: th.Tensor, start: State
    ) -> tuple[State, th.Tensor]:
        """Filter sequences of observations; the gradient reaches back through time and through the samples.

        :param embed: (B, T, E).
        :param prev_action: (B, T, A), zero where ``is_first``.
        :param is_first: (B, T) bool.
        :param start: B states before the first entry.
        :return: states (B, T), posterior probabilities (B, T, K, S).
        """
        entries = embed, prev_action, is_first
        features, logits, context = self.sequence.filter(self.posterior, self.posterior_logits, *entries, start)
        return State(features, self.deter, context), self._probs(logits)

    def prior_probs(self, deter: th.Tensor) -> th.Tensor:
        """What the model expects before it sees the observation: h (..., D) -> (..., K, S)."""
        return self._probs(self.prior_logits(self.prior(deter)))

    def kl_loss(self, states: State, post: th.Tensor) -> tuple[dict[str, th.Tensor], dict[str, th.Tensor]]:
        """KL balancing with free nats (paper, "World model learning"): the prior follows fast, the posterior slowly.

        :param states: (B, T) states.
        :param post: (B, T, K, S) posterior probabilities.
        :return: losses "dyn" and "rep", (B, T) each; info.
        """
        prior = self.prior_probs(states.deter)
        dyn = categorical_kl(post.detach(), prior)
        rep = categorical_kl(post, prior.detach())
        losses = {"dyn": dyn.clamp(min=FREE_NATS), "rep": rep.clamp(min=FREE_NATS)}
        entropies = {"prior_entropy": prior, "posterior_entropy": post}
        info = {name: categorical_entropy(probs.detach()).sum(-1).mean() for name, probs in entropies.items()}
        return losses, {"kl": dyn.detach().mean(), **info}

    def _probs(self, logits: th.Tensor) -> th.Tensor:
        return unimix_probs(logits.to(self.class_numbers.dtype).unflatten(-1, (self.classes, self.stoch)), -2)


def _latents(probs: th.Tensor, sample: bool) -> th.Tensor:
    """Probabilities (n, K, S) -> z (n, K * S), a sample or the expectation."""
    return (sample_onehot(probs, -2) if sample else probs).flatten(-2)
