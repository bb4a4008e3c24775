"""The scan written out by hand computes what plain autograd over single steps computes, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F

from sb3_dreamer.nets.distributions import sample_onehot_with, straight_through
from sb3_dreamer.types import SIZES
from sb3_dreamer.world_model import scan
from sb3_dreamer.world_model.rssm import RSSM, State
from tests.episode_starts import reset_where_first

B, T, EMBED, ACTION = 3, 7, 5, 2
SIZE = SIZES["debug"]


@pytest.fixture
def rssm() -> RSSM:
    """A small RSSM in float64, no parameter at its initial value."""
    th.manual_seed(0)
    model = RSSM(EMBED, ACTION, SIZE).double()
    for param in model.parameters():
        param.data.add_(0.3 * th.randn_like(param))
    return model


def inputs() -> tuple[th.Tensor, th.Tensor, th.Tensor, State]:
    """Embeddings that take gradients, actions, episode starts inside and at the edge, and a start in mid-episode."""
    embed = th.randn(B, T, EMBED, dtype=th.float64, requires_grad=True)
    action = th.randn(B, T, ACTION, dtype=th.float64)
    first = th.zeros(B, T, dtype=th.bool)
    first[1, 3] = first[2, 0] = True
    onehot = F.one_hot(th.randint(0, SIZE.classes, (B, SIZE.stoch)), SIZE.classes).transpose(1, 2).flatten(1)
    return embed, action * ~first[..., None], first, State.from_parts(th.randn(B, SIZE.deter).double(), onehot.double())


def observe_step_by_step(
    rssm: RSSM, embed: th.Tensor, action: th.Tensor, first: th.Tensor, start: State, noise: th.Tensor
) -> tuple[State, th.Tensor]:
    """The definition: one step after the other, through autograd."""
    state, states, posts = start, [], []
    for t in range(T):
        keep = (~first[:, t]).double()[:, None]
        drive = rssm.sequence.drive(action[:, t])
        deter = rssm.sequence.step(state.deter * keep, state.stoch * keep, drive)
        logits = rssm.posterior_logits(rssm.posterior(th.cat([deter, embed[:, t]], -1)))
        probs = rssm._probs(logits)
        state = State.from_parts(deter, straight_through(sample_onehot_with(probs, noise[t], -2), probs).flatten(-2))
        states.append(state)
        posts.append(probs)
    deter, stoch = th.stack([s.deter for s in states], 1), th.stack([s.stoch for s in states], 1)
    return State.from_parts(deter, stoch), th.stack(posts, 1)


def test_scan_and_single_steps_agree_in_values_and_in_all_gradients(rssm: RSSM) -> None:
    embed, action, first, start = inputs()
    th.manual_seed(1)
    noise = th.rand(T, B, 1, SIZE.stoch, dtype=th.float64)
    weight = [th.randn(B, T, n, dtype=th.float64) for n in (SIZE.deter, SIZE.stoch * SIZE.classes)]
    results = []
    for by_hand in (False, True):
        rssm.zero_grad()
        embed.grad = None
        th.manual_seed(1)  # observe draws the same noise
        if by_hand:
            states, post = rssm.observe(embed, action, first, start)
        else:
            states, post = observe_step_by_step(rssm, embed, action, first, start, noise)
        loss = (states.deter * weight[0]).sum() + (states.stoch * weight[1]).sum() + (post.log() ** 2).sum()
        loss.backward()
        assert embed.grad is not None
        grads = {name: p.grad.clone() for name, p in rssm.named_parameters() if p.grad is not None}
        results.append((states.features.detach(), post.detach(), {"embed": embed.grad.clone(), **grads}))
    (features, post, grads), (features_scan, post_scan, grads_scan) = results
    assert th.allclose(features, features_scan, atol=1e-12)
    assert th.allclose(post, post_scan, atol=1e-12)
    assert grads.keys() == grads_scan.keys()
    for name, grad in grads.items():
        assert float((grad - grads_scan[name]).abs().max()) < 1e-10 * float(grad.abs().max() + 1), name


def test_compiled_as_on_a_gpu_each_step_is_one_graph_and_computes_the_same(
    rssm: RSSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, action, first, start = inputs()
    results, graphs = [], []

    def count(graph: th.fx.GraphModule, _: list[th.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = partial(th.compile, dynamic=False, fullgraph=True, backend=count)
    for fused in (lambda function: function, compiled):
        monkeypatch.setattr(scan, "compile_on_cuda", lambda device, fused=fused: fused)
        rssm.zero_grad()
        th.manual_seed(1)
        states, post = rssm.observe(embed, action, first, start)
        (states.features.square().sum() + (post.log() ** 2).sum()).backward()
        results.append([states.features, post, *(p.grad.clone() for p in rssm.parameters() if p.grad is not None)])
    assert len(graphs) == 2  # forward and backward, whatever T is
    for one, other in zip(*results, strict=True):
        assert th.allclose(one, other, atol=1e-12)


def test_nothing_before_an_episode_start_reaches_the_states_after_it(rssm: RSSM) -> None:
    embed, action, first, start = inputs()
    changed = th.cat([embed[:, :3] + 1.0, embed[:, 3:]], 1).detach()
    th.manual_seed(2)
    before, _ = rssm.observe(embed, action, first, start)
    th.manual_seed(2)
    after, _ = rssm.observe(changed, action, first, start)
    assert th.equal(before.features[1, 3:], after.features[1, 3:])  # reset at t = 3
    assert not th.equal(before.features[0, 3:], after.features[0, 3:])  # no reset


def test_noise_just_below_one_draws_a_class_too() -> None:
    th.manual_seed(0)
    logits, noise = th.randn(500, 5, 8), th.full((500, 1, 8), 1 - 2**-24)
    drawn = scan.draw(logits, scan.class_limits(noise[None], 5)[0]).view(500, 5, 8)
    assert th.equal(drawn.sum(1), th.ones(500, 8))


def test_a_packed_state_unpacks_to_itself_and_zeros_are_the_state_before_an_episode(rssm: RSSM) -> None:
    *_, start = inputs()
    for again in (rssm.unpack(rssm.pack(start)), rssm.restore(rssm.latents(start))):
        assert th.equal(again.deter, start.deter)
        assert th.equal(again.stoch, start.stoch)
    assert th.equal(rssm.pack(rssm.initial(2)), th.zeros(2, rssm.packed_width))
    assert th.equal(rssm.latents(rssm.initial(2)), th.zeros(2, rssm.latent_width))
    assert th.equal(rssm.unpack(th.zeros(2, rssm.packed_width)).features, rssm.initial(2).features)


def test_acting_step_by_step_filters_as_training_does(rssm: RSSM) -> None:
    embed, action, first, start = inputs()
    with th.no_grad():
        states, _ = rssm.observe(embed, action, first, start)
        state = start
        for t in range(T):
            # the deterministic part at t depends on the sample at t - 1: hand it the one that training drew
            state, before = reset_where_first(rssm, state, action[:, t], first[:, t])
            state = rssm.observe_step(state, embed[:, t], before)
            assert th.allclose(state.deter, states.deter[:, t], atol=1e-12)
            state = states[:, t]


def test_without_sampling_the_latents_are_their_expectation(rssm: RSSM) -> None:
    embed, action, first, start = inputs()
    start, before = reset_where_first(rssm, start, action[:, 0], first[:, 0])
    with th.no_grad():
        expected = rssm.observe_step(start, embed[:, 0], before, sample=False)
        samples = th.stack([rssm.observe_step(start, embed[:, 0], before).stoch for _ in range(2000)])
    assert th.allclose(samples.mean(0), expected.stoch, atol=0.05)
    assert th.equal(samples[0].square(), samples[0])
    assert not th.equal(expected.stoch.square(), expected.stoch)


def test_a_second_backward_pass_gives_the_same_gradients(rssm: RSSM) -> None:
    embed, action, first, start = inputs()
    states, post = rssm.observe(embed, action, first, start)
    loss = states.features.sum() + (post.log() ** 2).sum()
    parameters = list(rssm.sequence.parameters())
    once = th.autograd.grad(loss, parameters, retain_graph=True)
    again = th.autograd.grad(loss, parameters)
    for grad, same in zip(once, again, strict=True):
        assert th.equal(grad, same)
