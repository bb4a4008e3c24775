"""Starts of episodes for a model that is stepped through them."""

import torch as th

from sb3_dreamer.world_model.rssm import RSSM, State


def reset_where_first(
    model: RSSM, state: State, prev_action: th.Tensor, is_first: th.Tensor
) -> tuple[State, th.Tensor]:
    """State and previous action (n, A), zero where ``is_first`` (n,), as they are before the first observation."""
    packed = model.pack(state).masked_fill(is_first[:, None], 0.0)
    return model.unpack(packed), prev_action.masked_fill(is_first[:, None], 0.0)
