"""Vectors reach the networks with zero mean and unit variance, whatever their units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch as th

from sb3_dreamer import Dreamer
from sb3_dreamer.types import SIZES, Batch, Spec
from sb3_dreamer.world_model import WorldModel
from sb3_dreamer.world_model.normalizer import ObsNormalizer

SPECS = {"body": Spec("vector", (2, 2)), "mode": Spec("discrete", (1,), (3,), (0,)), "goal": Spec("vector", (1,))}


def observations(n: int = 50) -> dict[str, th.Tensor]:
    """Five sequences; dimensions of very different means and widths."""
    body = th.randn(5, n, 2, 2) * th.tensor([[1.0, 0.01], [300.0, 5.0]]) + th.tensor([[0.0, 7.0], [-50.0, 0.0]])
    return {"body": body, "mode": th.randint(0, 3, (5, n, 1)), "goal": 4 + th.randn(5, n, 1)}


def test_nothing_changes_before_the_first_update() -> None:
    obs = observations()
    assert th.allclose(ObsNormalizer(SPECS)(obs)["body"], obs["body"], rtol=1e-6)


def test_each_dimension_of_what_was_noted_has_zero_mean_and_unit_variance() -> None:
    normalizer, obs = ObsNormalizer(SPECS), observations()
    normalizer.update(obs)
    seen = normalizer(obs)
    for key in ("body", "goal"):
        assert seen[key].shape == obs[key].shape
        assert th.allclose(seen[key].mean((0, 1)), th.zeros(()), atol=1e-3)
        assert th.allclose(seen[key].std((0, 1)), th.ones(()), atol=0.01)
    assert seen["mode"] is obs["mode"]


def test_moments_of_several_batches_are_those_of_all_the_data() -> None:
    normalizer, batches = ObsNormalizer(SPECS), [observations() for _ in range(4)]
    for batch in batches:
        normalizer.update(batch)
    goal = th.cat([batch["goal"].flatten() for batch in batches])
    assert normalizer.mean[-1].item() == pytest.approx(goal.mean().item(), rel=1e-5)
    assert normalizer.std[-1].item() == pytest.approx(goal.std(correction=0).item(), rel=1e-5)


def test_numbers_whose_square_overflows_leave_the_moments_finite() -> None:
    normalizer, obs = ObsNormalizer(SPECS), observations()
    obs["goal"][0, 0] = 3e38
    normalizer.update(obs)
    assert normalizer.std.isfinite().all()
    assert all(part.isfinite().all() for part in normalizer.undo(normalizer(obs)).values())


def test_after_many_batches_the_moments_move_on_with_the_data() -> None:
    normalizer = ObsNormalizer({"obs": Spec("vector", (1,))}, rate=0.1)
    for value in [0.0] * 50 + [1.0] * 100:
        normalizer.update({"obs": th.full((1, 2, 1), value)})
    assert normalizer.mean.item() == pytest.approx(1 - 0.9**100, abs=1e-4)  # of plain averages: 2/3
    assert normalizer.std.item() == pytest.approx((0.9**100) ** 0.5, abs=1e-3)


def test_undo_gives_the_observations_back() -> None:
    normalizer, obs = ObsNormalizer(SPECS), observations()
    normalizer.update(obs)
    back = normalizer.undo(normalizer(obs))
    assert th.allclose(back["body"], obs["body"], rtol=1e-4, atol=1e-3)
    assert th.equal(back["mode"], obs["mode"])


def test_a_dimension_that_never_moves_stays_finite_when_it_does() -> None:
    normalizer = ObsNormalizer({"obs": Spec("vector", (1,))})
    normalizer.update({"obs": th.full((1, 9, 1), 3.0)})
    assert normalizer({"obs": th.tensor([3.0])})["obs"].item() == 0.0
    assert normalizer({"obs": th.tensor([4.0])})["obs"].item() == pytest.approx(1000, rel=1e-3)


def batch(obs: th.Tensor) -> Batch:
    """Sequences with these observations, all else zero."""
    shape, zeros = obs.shape[:2], th.zeros(*obs.shape[:2], dtype=th.bool)
    flags = dict(is_first=zeros, is_terminal=zeros, is_last=zeros)
    rest = dict(prev_action=th.zeros(*shape, 1), reward=th.zeros(shape))
    start = th.zeros(shape[0], SIZES["debug"].stoch + SIZES["debug"].deter)
    return Batch(obs={"obs": obs}, **rest, **flags, start=start, index=np.zeros((5, 2)))


def world_model(normalize_obs: bool) -> WorldModel:
    """The same weights at every call."""
    th.manual_seed(0)
    size = replace(SIZES["debug"], units=8)
    return WorldModel({"obs": Spec("vector", (3,))}, Spec("vector", (1,)), size, normalize_obs=normalize_obs)


@pytest.mark.parametrize("normalize_obs", [True, False])
def test_losses_do_not_depend_on_the_units_unless_symlog_is_alone(normalize_obs: bool) -> None:
    obs, units = th.randn(5, 6, 3, generator=th.Generator().manual_seed(0)), th.tensor([1.0, 30.0, 0.2])
    losses = []
    for data in (obs, obs * units + 5):
        model = world_model(normalize_obs)
        th.manual_seed(1)
        losses.append(model.loss(batch(data))[0]["reconstruction"])
    assert th.allclose(*losses, rtol=1e-3) == normalize_obs
    assert (model.normalizer.updates.item() > 0) == normalize_obs


def test_predicted_observations_are_in_the_units_of_the_space() -> None:
    model = world_model(True)
    model.loss(batch(th.randn(5, 60, 3) + th.tensor([100.0, 0.0, -7.0])))
    th.nn.init.zeros_(model.decoder.out.weight)
    th.nn.init.zeros_(model.decoder.out.bias)
    assert th.allclose(model.predict_obs(th.zeros(model.feature_width))["obs"], model.normalizer.mean)


def test_the_moments_are_saved_and_loaded_with_the_agent(tmp_path) -> None:
    settings = dict(model_size="debug", batch_size=2, batch_length=8, learning_starts=20, imagination_horizon=3)
    model = Dreamer("MlpPolicy", "Pendulum-v1", train_ratio=4, imagination_starts=4, seed=0, device="cpu", **settings)
    model.learn(60).save(tmp_path / "agent")
    moments = model.policy.world_model.normalizer.state_dict()
    assert moments["updates"] > 0
    loaded = Dreamer.load(tmp_path / "agent").policy.world_model.normalizer.state_dict()
    assert all(th.equal(loaded[name], value) for name, value in moments.items())


def test_normalize_obs_is_a_bool() -> None:
    with pytest.raises(ValueError, match="normalize_obs='yes' in policy_kwargs must be True or False"):
        Dreamer("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(normalize_obs="yes"))


def test_what_was_never_updated_is_kept_on_any_device() -> None:
    normalizer = ObsNormalizer(SPECS).to("meta")  # the next best thing to a GPU
    normalizer.rollback_unless(th.ones((), dtype=th.bool, device="meta"))
    assert normalizer.mean.device.type == "meta"
