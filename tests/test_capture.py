"""One update as a graph. Without a GPU a recorder that runs the work again stands in for CUDA's."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_dreamer import Dreamer
from sb3_dreamer.capture import CapturedUpdate
from sb3_dreamer.dreamer import NOT_READ_BY_UPDATE
from sb3_dreamer.knobs import KNOBS
from sb3_dreamer.nets import optim
from sb3_dreamer.nets.optim import LaProp
from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.replay.latents import PendingLatents
from sb3_dreamer.types import Batch


class AnyEnv(gym.Env[Any, Any]):
    """Random observations of a space, episodes of five steps."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space) -> None:
        self.observation_space, self.action_space, self.t = observation_space, action_space, 0
        observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observation_space.sample(), 1.0, self.t == 5, False, {}


VECTOR = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8)
SPACES = {
    "vector": ("MlpPolicy", VECTOR, gym.spaces.Box(-1.0, 1.0, (2,), np.float32)),
    "image": ("CnnPolicy", IMAGE, gym.spaces.Discrete(3)),
    "dict": (
        "MultiInputPolicy",
        gym.spaces.Dict(a=VECTOR, b=gym.spaces.Discrete(4), c=gym.spaces.MultiBinary(2)),
        gym.spaces.MultiBinary(2),
    ),
}


def filled(kind: str = "vector", **knobs: Any) -> Dreamer:
    """A small agent with some experience and no updates yet."""
    policy, observations, actions = SPACES[kind]
    settings = dict(model_size="debug", batch_size=2, batch_length=8, buffer_size=500, seed=0, device="cpu")
    settings |= dict(learning_starts=1000, imagination_horizon=3, imagination_starts=4, warmup_updates=2)
    return Dreamer(policy, AnyEnv(observations, actions), **{**settings, **knobs}).learn(60)


def stand_in(recorded: list[Any]) -> Callable[[Callable[[], Any]], Callable[[], None]]:
    """A recorder that keeps what it was given; as with CUDA, recording does not run it."""

    def record(work: Callable[[], Any]) -> Callable[[], None]:
        recorded.append(work)
        return work

    return record


def batches(model: Dreamer, number: int) -> Iterator[Batch]:
    for _ in range(number):
        yield model.replay_buffer.sample(model.batch_size)


@pytest.mark.parametrize("kind", list(SPACES))
def test_a_replayed_update_learns_the_same_from_each_batch(kind: str) -> None:
    results = []
    for record in (None, stand_in(recorded := [])):
        model = filled(kind)
        update = CapturedUpdate(model.update, record)
        th.manual_seed(1)
        losses = [float(update(batch)[1]["reconstruction_loss"]) for batch in batches(model, 7)]
        results.append((losses, model.policy.state_dict()))
    (losses, parameters), (replayed_losses, replayed) = results
    assert len(recorded) == 1
    assert losses == replayed_losses
    assert len(set(losses)) == 7  # other batches, other losses
    for name, value in parameters.items():
        assert th.equal(value, replayed[name]), name


def test_a_batch_of_another_shape_is_run_as_it_is_three_times_and_then_recorded_anew() -> None:
    model = filled()
    update = CapturedUpdate(model.update, stand_in(recorded := []))
    recordings = []
    for size in (2, 2, 2, 2, 3, 3, 3, 3, 3):
        latents, _ = update(model.replay_buffer.sample(size))
        assert len(latents) == size
        recordings.append(len(recorded))
    assert recordings == [0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("sizes", [(2,) * 6, (2,) * 4 + (3,) * 6], ids=["the first", "another shape"])
def test_a_recording_that_fails_is_made_anew_by_the_next_call(sizes: tuple[int, ...]) -> None:
    model, failing = filled(), len(sizes) - 2
    calls = 0

    def record(work: Callable[[], Any]) -> Callable[[], None]:
        if calls == failing:
            raise th.OutOfMemoryError("while recording")
        return work

    update = CapturedUpdate(lambda batch: (batch.reward.sum(), {}), record)
    for calls, size in enumerate(sizes, 1):
        batch = model.replay_buffer.sample(size)
        if calls == failing:
            with pytest.raises(th.OutOfMemoryError, match="while recording"):
                update(batch)
        else:
            assert update(batch)[0] == batch.reward.sum()


def test_the_graph_keeps_a_batch_of_its_own() -> None:
    model = filled()
    update, given = CapturedUpdate(model.update, stand_in([])), list(batches(model, 5))
    before = copy.deepcopy(given[3])  # the one that is recorded
    for batch in given:
        update(batch)
    assert th.equal(given[3].obs["obs"], before.obs["obs"])
    assert not th.equal(given[3].obs["obs"], given[4].obs["obs"])


def test_observations_are_copied_by_their_keys_in_whatever_order_they_come() -> None:
    batch = filled().replay_buffer.sample(2)
    x, y = th.zeros(2, 8, 3), th.ones(2, 8, 3)
    update = CapturedUpdate(lambda batch: (batch.obs["x"] - batch.obs["y"], {}), stand_in([]))
    for _ in range(4):
        update(dataclasses.replace(batch, obs={"x": x, "y": y}))
    assert th.equal(update(dataclasses.replace(batch, obs={"y": y, "x": x}))[0], x - y)
    assert update.calls == 5


class NothingForTheHost(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: reading a number, sizes that depend on data, constants from the host."""

    forbidden = ("_local_scalar_dense", "nonzero", "lift_fresh", "randperm", "unique", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.forbidden), f"{func} cannot be captured"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rssm_type", ["gru", "transformer"])
@pytest.mark.parametrize("kind", list(SPACES))
def test_nothing_in_an_update_waits_for_the_host(kind: str, rssm_type: str) -> None:
    model = filled(kind, rssm_type=rssm_type)
    first, second = batches(model, 2)
    model.update(first)  # the optimizer makes its moments
    with NothingForTheHost():
        model.update(second)
        with pytest.raises(AssertionError, match="cannot be captured"):
            th.zeros(1).item()
        with pytest.raises(AssertionError, match="cannot be captured"):
            th.zeros(1).new_tensor([1.0])


def test_a_recorded_step_follows_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = th.nn.Parameter(th.ones(2))
    optimizer = LaProp([weight], lr=0.25, warmup_steps=0, clip=1e9)
    weight.grad = th.ones(2)
    optimizer.step()
    monkeypatch.setattr(optim, "is_capturing", lambda: True)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.put_rates_on_device()
    before = weight.detach().clone()
    optimizer.step()
    assert th.equal(weight, before)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.put_rates_on_device()
    optimizer.step()
    assert th.allclose(weight, before - 0.5)


OTHER_VALUES = {
    "center_advantage": False,
    "gamma": 0.9,
    "gae_lambda": 0.9,
    "critic_ema_decay": 0.5,
    "imagination_starts": 7,
    "imagination_horizon": 7,
    "warmup_updates": 7,
}


@pytest.mark.parametrize(("knob", "value"), OTHER_VALUES.items())
def test_an_update_is_recorded_again_after_a_knob_that_it_reads_has_changed(knob: str, value: Any) -> None:
    model = filled()
    model.pretrain(2)
    setattr(model, knob, value)
    model.pretrain(1)
    assert model._captured is not None
    assert model._captured[1].calls == 1


@pytest.mark.parametrize("knob", sorted(NOT_READ_BY_UPDATE))
def test_a_knob_that_no_update_reads_may_change_without_a_new_recording(knob: str) -> None:
    model = filled()
    model.pretrain(2)
    setattr(model, knob, 0.5)
    model.pretrain(1)
    assert model._captured is not None
    assert model._captured[1].calls == 3


def test_a_recorded_update_reads_the_weight_of_the_entropy_where_a_schedule_writes_it() -> None:
    model = filled()
    weight = model._ent_coef
    model.ent_coef = lambda progress_remaining: 0.5 * progress_remaining
    for progress in (1.0, 0.25, 0.0):
        model._current_progress_remaining = progress
        model.train(1, model.batch_size)
        assert weight.item() == 0.5 * progress
    assert model._ent_coef is weight


def test_no_knob_that_an_update_reads_is_taken_for_one_that_it_does_not_read() -> None:
    read = set(re.findall(r"self\.(\w+)", inspect.getsource(Dreamer.update)))
    assert {"gamma", "gae_lambda"} <= read
    assert not read & NOT_READ_BY_UPDATE
    assert KNOBS.keys() >= NOT_READ_BY_UPDATE


def test_new_settings_and_new_parameters_are_recorded_anew() -> None:
    model = filled(learning_starts=10, train_ratio=16)
    used = model._captured
    assert used is not None
    assert used[1].calls > 0
    model.learn(20, reset_num_timesteps=False)
    assert model._captured is used
    model.gae_lambda /= 2
    model.pretrain(1)
    assert model._captured[1].calls == 1
    model.set_parameters(model.get_parameters())
    assert model._captured is None


def test_a_copy_of_an_agent_records_an_update_of_its_own() -> None:
    model = filled()
    model._captured_update().record = stand_in([])
    model.pretrain(5)
    before = parameters_to_vector(model.policy.parameters()).clone()
    other = copy.deepcopy(model)
    other.pretrain(5)
    assert th.equal(parameters_to_vector(model.policy.parameters()), before)
    assert not th.equal(parameters_to_vector(other.policy.parameters()), before)
    assert other._captured[1].calls == 5


class TestLatentsOnTheWay:
    """From a GPU they are written at the next call, or when the replay is saved."""

    @pytest.fixture
    def buffer(self, monkeypatch: pytest.MonkeyPatch) -> SequenceReplayBuffer:
        monkeypatch.setattr(PendingLatents, "arriving", property(lambda self: True))
        buffer = SequenceReplayBuffer(50, VECTOR, VECTOR, "cpu", sequence_length=2, latent_size=1)
        done, infos = np.zeros(1, bool), [{}]
        for _ in range(10):
            buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros(1), done, infos)
        return buffer

    def stored(self, buffer: SequenceReplayBuffer) -> list[float]:
        batch = buffer.peek(200)
        found = dict(zip(batch.index[:, 1].tolist(), batch.start.flatten().tolist(), strict=True))
        return [found[number + 1] for number in range(4)]

    def test_they_are_written_at_the_next_call(self, buffer: SequenceReplayBuffer) -> None:
        buffer.update_latents(np.array([[0, 0]]), th.tensor([[[1.0], [2.0]]]))
        assert self.stored(buffer) == [0.0, 0.0, 0.0, 0.0]
        buffer.update_latents(np.array([[0, 2]]), th.tensor([[[3.0], [4.0]]]))
        assert self.stored(buffer) == [1.0, 2.0, 0.0, 0.0]

    def test_they_are_in_what_is_saved(self, buffer: SequenceReplayBuffer) -> None:
        buffer.update_latents(np.array([[0, 0]]), th.tensor([[[1.0], [2.0]]]))
        buffer.__getstate__()
        assert self.stored(buffer) == [1.0, 2.0, 0.0, 0.0]
