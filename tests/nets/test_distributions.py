"""Symlog, two-hot regression, categorical latents and action distributions, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_dreamer.nets.distributions import (
    Bernoulli,
    BoundedNormal,
    OneHotCategoricals,
    categorical_kl,
    sample_onehot,
    sample_onehot_with,
    straight_through,
    symexp,
    symexp_bins,
    symlog,
    twohot_loss,
    twohot_mean,
    unimix_probs,
)


def test_symlog_has_literal_values_and_symexp_undoes_it() -> None:
    x = th.tensor([-(math.e - 1), 0.0, math.e - 1, 1e6])
    assert th.allclose(symlog(x), th.tensor([-1.0, 0.0, 1.0, math.log(1e6 + 1)]))
    assert th.allclose(symexp(symlog(x)), x, rtol=1e-5)


def test_bins_are_symmetric_and_evenly_spaced_under_symlog() -> None:
    bins = symexp_bins(255)
    assert th.equal(bins, -bins.flip(0))
    assert bins[127] == 0
    assert th.allclose(symlog(bins).diff(), th.full((254,), 40 / 254), atol=1e-5)


def test_uniform_logits_predict_exactly_zero() -> None:
    for level in (0.0, 0.37, -123.4):
        assert th.equal(twohot_mean(th.full((3, 255), level), symexp_bins()), th.zeros(3))


def test_predicted_numbers_are_not_rounded_inside_autocast() -> None:
    bins = symexp_bins()
    logits = th.randn(50, 255, generator=th.Generator().manual_seed(0))
    with th.autocast("cpu", th.bfloat16):
        rounded = twohot_mean(logits, bins)
    assert th.equal(rounded, twohot_mean(logits, bins))


def test_the_two_hot_code_of_a_target_has_the_target_as_its_mean() -> None:
    bins = symexp_bins(11)
    for target in (-20.0, 0.0, 0.3, 7.5, 1000.0):
        logits = th.zeros(11, requires_grad=True)
        twohot_loss(logits, th.tensor([target]), bins).backward()
        code = th.full((11,), 1 / 11) - logits.grad  # gradient of a cross-entropy: softmax - code
        assert float(code @ bins) == pytest.approx(target, rel=1e-3, abs=1e-3)
        assert int((code > 1e-6).sum()) <= 2


def test_the_loss_is_least_at_the_code_and_adds_up_over_targets() -> None:
    bins, targets = symexp_bins(11), th.tensor([0.5, -2.0])
    logits = th.randn(11, generator=th.Generator().manual_seed(0))
    one_by_one = sum(twohot_loss(logits, t.view(1), bins) for t in targets)
    assert float(twohot_loss(logits, targets, bins)) == pytest.approx(float(one_by_one), rel=1e-5)


def test_targets_beyond_the_bins_count_as_the_outermost_bin() -> None:
    bins = symexp_bins(11)
    logits = th.randn(11, generator=th.Generator().manual_seed(0))
    expected = -th.log_softmax(logits, -1)[-1]
    assert th.allclose(twohot_loss(logits, th.tensor([1e30]), bins), expected)


def test_unimix_leaves_every_class_at_least_one_percent_over_k() -> None:
    probs = unimix_probs(th.tensor([1000.0, 0.0, 0.0, 0.0]))
    assert th.allclose(probs, th.tensor([0.9925, 0.0025, 0.0025, 0.0025]))


def test_samples_are_one_hot_with_the_given_frequencies() -> None:
    th.manual_seed(0)
    probs = th.tensor([0.1, 0.6, 0.3])
    samples = sample_onehot(probs.expand(20_000, 3))
    assert th.equal(samples.sum(-1), th.ones(20_000))
    assert th.allclose(samples.mean(0), probs, atol=0.015)


def test_noise_picks_the_class_whose_share_of_the_unit_interval_it_falls_into() -> None:
    probs = th.tensor([[0.25, 0.25, 0.5]]).expand(4, 3)
    noise = th.tensor([[0.0], [0.3], [0.5], [0.999999]])
    assert sample_onehot_with(probs, noise).argmax(-1).tolist() == [0, 1, 2, 2]


def test_noise_just_below_one_picks_a_class_too() -> None:
    th.manual_seed(0)
    probs, noise = th.randn(500, 5, 8).softmax(1), th.full((500, 1, 8), 1 - 2**-24)
    assert th.equal(sample_onehot_with(probs, noise, 1).sum(1), th.ones(500, 8))


def test_straight_through_has_the_value_of_the_sample_and_the_gradient_of_the_probabilities() -> None:
    probs = th.tensor([0.2, 0.8], requires_grad=True)
    value = straight_through(th.tensor([1.0, 0.0]), probs)
    (value * th.tensor([3.0, 5.0])).sum().backward()
    assert value.tolist() == [1.0, 0.0]
    assert probs.grad is not None
    assert probs.grad.tolist() == [3.0, 5.0]


def test_kl_of_two_coins_is_the_closed_form_summed_over_latents() -> None:
    p, q = th.tensor([[0.5], [0.5]]), th.tensor([[0.25], [0.75]])  # (K, S) with one latent
    one = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(categorical_kl(p, q)) == pytest.approx(one, rel=1e-6)
    assert float(categorical_kl(p.expand(2, 3), q.expand(2, 3))) == pytest.approx(3 * one, rel=1e-6)


def test_the_continuous_policy_starts_with_mean_zero_and_a_wide_standard_deviation() -> None:
    policy = BoundedNormal(th.zeros(1, 4))
    std = 0.9 / (1 + math.exp(-2)) + 0.1
    assert policy.mode().tolist() == [[0.0, 0.0]]
    assert th.allclose(policy.std, th.full((1, 2), std))
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))
    assert float(policy.entropy()) == pytest.approx(entropy, rel=1e-5)
    density = -0.5 * (0.5 / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
    assert float(policy.log_prob(th.tensor([[0.5, 0.0]]))) == pytest.approx(
        density - math.log(std * math.sqrt(2 * math.pi)), rel=1e-5
    )


def test_the_standard_deviation_stays_between_a_tenth_and_one() -> None:
    raw = th.tensor([[0.0, 0.0, -100.0, 100.0]])
    assert th.allclose(BoundedNormal(raw).std, th.tensor([[0.1, 1.0]]))


def test_several_choices_are_concatenated_one_hot_vectors() -> None:
    policy = OneHotCategoricals(th.tensor([[9.0, 0.0, 0.0, 0.0, 9.0]]), classes=(2, 3))
    assert policy.mode().tolist() == [[1.0, 0.0, 0.0, 0.0, 1.0]]
    first, second = (unimix_probs(x).log() for x in (th.tensor([9.0, 0.0]), th.tensor([0.0, 0.0, 9.0])))
    assert float(policy.log_prob(policy.mode())) == pytest.approx(float(first[0] + second[2]), rel=1e-5)
    assert policy.sample().view(5).split([2, 3])[1].sum() == 1


def test_bits_are_independent_coins() -> None:
    policy = Bernoulli(th.tensor([[0.0, 100.0]]))
    assert policy.mode().tolist() == [[0.0, 1.0]]
    expected = math.log(0.5) + math.log(0.995)
    assert float(policy.log_prob(th.tensor([[1.0, 1.0]]))) == pytest.approx(expected, rel=1e-4)
    coin = -(0.995 * math.log(0.995) + 0.005 * math.log(0.005))
    assert float(policy.entropy()) == pytest.approx(math.log(2) + coin, rel=1e-4)


def test_several_choices_have_the_entropy_of_all() -> None:
    assert OneHotCategoricals(th.zeros(1, 5), (2, 3)).entropy().tolist() == pytest.approx([math.log(2) + math.log(3)])


def test_policies_sample_with_their_probabilities_mean_and_deviation() -> None:
    th.manual_seed(0)
    bits = Bernoulli(th.tensor([2.0, -1.0]).expand(20_000, 2))
    assert th.allclose(bits.sample().mean(0), bits.prob[0], atol=0.015)
    choices = OneHotCategoricals(th.tensor([0.0, 1.0, 2.0, 0.0, -1.0]).expand(20_000, 5), (2, 3))
    assert th.allclose(choices.sample().mean(0), th.cat([p[0] for p in choices.probs]), atol=0.015)
    normal = BoundedNormal(th.tensor([0.5, -0.5, -3.0, 1.0]).expand(20_000, 4))
    sample = normal.sample()
    assert th.allclose(sample.mean(0), normal.mean[0], atol=0.03)
    assert th.allclose(sample.std(0), normal.std[0], rtol=0.03)
