"""Every kind of space that SB3's algorithms are pointed at: it trains, acts inside its space, saves, and reads back."""

import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, RescaleAction, TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_dreamer import Dreamer
from sb3_dreamer.replay import SequenceReplayBuffer
from sb3_dreamer.replay.columns import StoredActions
from sb3_dreamer.spaces import (
    action_spec_of,
    decoded_observations,
    into_space,
    observation_specs,
    one_hot,
    policy_for,
    spec_of,
)
from sb3_dreamer.types import SIZES, Spec
from sb3_dreamer.world_model.codes import CODES
from sb3_dreamer.world_model.decoders import Decoder
from sb3_dreamer.world_model.encoders import Encoder

DEBUG = dict(
    model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=200, train_ratio=8,
    imagination_horizon=3, imagination_starts=4, seed=0, device="cpu",
)  # fmt: skip


class Random(gym.Env):
    """Observations drawn from the space, episodes of seven steps; refuses actions outside of its space."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space | None = None) -> None:
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.seen: list = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.left = 7
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.left -= 1
        return self.observe(), 1.0, self.left == 0, False, {}

    def observe(self):
        self.seen.append(self.observation_space.sample())
        return self.seen[-1]


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def trained(env, **settings) -> Dreamer:
    """An agent after some updates on the environment."""
    space = env.observation_space
    return Dreamer(policy_for(space), env, **{**DEBUG, **settings}).learn(30)


def assert_sound(model: Dreamer) -> None:
    """Updates were made, all numbers are finite, and actions are in their space."""
    assert model._n_updates >= 5
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    env = model.get_env()
    assert env is not None
    obs, state = env.reset(), None
    for deterministic in (True, False):
        actions, state = model.predict(obs, state, deterministic=deterministic)
        assert actions.dtype == env.action_space.dtype
        assert all(env.action_space.contains(a) for a in actions)


OBSERVATIONS = {
    "scalar": spaces.Box(-1, 1, (), np.float32),
    "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float64),
    "cube of floats": spaces.Box(0, 1, (2, 3, 4), np.float32),
    "half": spaces.Box(-1, 1, (3,), np.float16),
    "bytes": spaces.Box(0, 255, (5,), np.uint8),
    "gray picture without channels": spaces.Box(0, 255, (6, 5), np.uint8),
    "short": spaces.Box(-300, 300, (2,), np.int16),
    "unsigned": spaces.Box(0, 60_000, (2,), np.uint16),
    "long": spaces.Box(-(10**9), 10**9, (2,), np.int64),
    "bool": spaces.Box(0, 1, (4,), bool),
    "discrete": spaces.Discrete(5),
    "discrete from 3": spaces.Discrete(5, start=3),
    "multidiscrete": spaces.MultiDiscrete([2, 3, 4]),
    "multidiscrete from -1": spaces.MultiDiscrete([2, 3], start=[-1, 5]),
    "multibinary": spaces.MultiBinary(4),
    "multibinary matrix": spaces.MultiBinary((2, 3)),
    "image channels first": image(3, 36, 36),
    "image channels last": image(48, 40, 3),
    "dict": spaces.Dict(
        {
            "camera.front": image(36, 40, 1),  # names that nn.ModuleDict would refuse
            "items": image(37, 36, 3),
            "speed": spaces.Box(-9, 9, (2,), np.float64),
            "gear": spaces.Discrete(6, start=-1),
            "doors": spaces.MultiBinary(4),
            "lamps": spaces.MultiDiscrete([3, 2]),
        }
    ),
}

ACTIONS = {
    "symmetric": spaces.Box(-1, 1, (2,), np.float32),
    "one-sided": spaces.Box(0, 100, (1,), np.float32),
    "each its own": spaces.Box(np.array([-1.0, 5.0]), np.array([0.0, 7.0]), dtype=np.float64),
    "matrix": spaces.Box(-2, 2, (2, 2), np.float32),
    "half": spaces.Box(-1, 1, (2,), np.float16),
    "no choice in one": spaces.Box(np.array([-1, 3], np.float32), np.array([1, 3], np.float32)),
    "small integers": spaces.Box(-128, 127, (2,), np.int8),
    "integers": spaces.Box(0, 10, (2,), np.int64),
    "discrete": spaces.Discrete(3),
    "discrete from 2": spaces.Discrete(3, start=2),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multidiscrete from 1": spaces.MultiDiscrete([2, 3], start=[1, -1]),
    "multibinary": spaces.MultiBinary(3),
    "multibinary matrix": spaces.MultiBinary((2, 2)),
}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_every_kind_of_observation_trains(name: str) -> None:
    assert_sound(trained(Random(OBSERVATIONS[name])))


@pytest.mark.parametrize("name", ACTIONS)
def test_every_kind_of_action_trains(name: str) -> None:
    assert_sound(trained(Random(spaces.Box(-1, 1, (2,)), ACTIONS[name])))


@pytest.mark.parametrize("name", ["discrete from 3", "bool", "dict", "image channels last"])
def test_several_environments_train(name: str) -> None:
    assert_sound(trained(DummyVecEnv([lambda: Random(OBSERVATIONS[name])] * 3), buffer_size=600))


@pytest.mark.parametrize("name", ["multidiscrete from -1", "dict", "image channels last", "long"])
def test_a_loaded_agent_acts_as_the_saved_one(name: str, tmp_path) -> None:
    model = trained(Random(OBSERVATIONS[name]))
    model.save(tmp_path / "model")
    obs = model.get_env().reset()
    loaded = Dreamer.load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(*(m.predict(obs, deterministic=True)[0] for m in (model, loaded)))


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_survive_their_code(name: str) -> None:
    space = ACTIONS[name]
    model = Dreamer("MlpPolicy", Random(spaces.Box(-1, 1, (2,)), space), **DEBUG)
    space.seed(1)
    actions = np.stack([space.sample() for _ in range(50)])
    decoded = model.policy.actions.decode(model.policy.actions.encode(actions))
    assert decoded.dtype == space.dtype
    np.testing.assert_allclose(decoded, actions, atol=2e-3 if space.dtype == np.float16 else 1e-5)


def test_both_ends_of_a_box_can_be_reached() -> None:
    model = Dreamer("MlpPolicy", Random(spaces.Box(-1, 1, (2,)), ACTIONS["small integers"]), **DEBUG)
    ends = model.policy.actions.decode(np.array([[-1, 1], [0, 2]], np.float32))
    np.testing.assert_array_equal(ends, [[-128, 127], [0, 127]])


def raw(space: spaces.Space, n: int = 5) -> th.Tensor:
    return th.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(n)]))


CERTAIN = {"vector": lambda x: x, "discrete": lambda x: 50 * x, "binary": lambda x: 100 * x - 50}


@pytest.mark.parametrize("name", [n for n in OBSERVATIONS if n not in ("dict", "long") and not n.startswith("image")])
def test_the_table_reads_back_what_it_flattened_and_has_no_loss_there(name: str) -> None:
    space = OBSERVATIONS[name]
    space.seed(0)
    spec, observed = spec_of(space), raw(space)
    code = CODES[spec.kind]
    assert code.flatten is not None
    flattened = code.flatten(observed, spec)
    assert flattened.shape == (5, spec.width)
    out = CERTAIN[spec.kind](flattened)
    assert code.read(out, spec).shape == observed.shape
    th.testing.assert_close(code.read(out, spec).double(), observed.double(), rtol=1e-4, atol=1e-4)
    th.testing.assert_close(code.loss(out, observed, spec), th.zeros(5), rtol=0, atol=1e-6)


def test_decoded_numbers_of_integer_boxes_are_rounded_and_clipped() -> None:
    space = spaces.Box(0, 255, (4,), np.uint8)
    assert into_space(space, np.array([-1.7, 2.97, 254.6, 300.0])).tolist() == [0, 3, 255, 255]
    assert into_space(spaces.Box(-1, 1, (2,), np.float32), np.array([0.25, 3.0])).tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3, start=2**24 + 1), spaces.MultiDiscrete([3, 3], start=[2**40 + 1, -(2**24) - 3])]
)
def test_decoded_integers_that_no_float_can_hold_are_exact(space: spaces.Space) -> None:
    spec = spec_of(space)
    places = th.arange(3).repeat(len(spec.classes), 1).T.reshape(3, *space.shape)
    observed = places + th.tensor(spec.start).reshape(space.shape)
    code = CODES["discrete"]
    decoded = decoded_observations(space, {"obs": code.read(code.flatten(observed, spec), spec)})["obs"]
    assert decoded.dtype == space.dtype
    assert decoded.tolist() == observed.tolist()
    assert all(space.contains(row) for row in decoded)


def test_decoded_floats_and_images_keep_their_values() -> None:
    space = spaces.Dict({"image": image(3, 36, 36), "half": spaces.Box(-9, 9, (2,), np.float16)})
    picture = th.arange(3 * 36 * 36).remainder(256).to(th.uint8).reshape(1, 3, 36, 36)
    decoded = decoded_observations(space, {"image": picture, "half": th.tensor([[0.5, 70.0]], dtype=th.bfloat16)})
    np.testing.assert_array_equal(decoded["image"], picture)
    assert decoded["image"].dtype == np.uint8
    assert (decoded["half"].dtype, decoded["half"].tolist()) == (np.float16, [[0.5, 9.0]])


@pytest.mark.parametrize("space", [spaces.Discrete(200, start=-100), spaces.MultiDiscrete([200, 3], start=[-100, 7])])
def test_actions_that_begin_below_zero_are_served_as_the_code_of_their_place(space: spaces.Space) -> None:
    actions = StoredActions(space)
    first, sizes = np.atleast_1d(space.start), np.atleast_1d(space.n if hasattr(space, "n") else space.nvec)
    for place in (0, 150, 199):
        places = np.minimum(place, sizes - 1)
        stored = actions.to_rows((first + places).reshape(1, *space.shape), np.zeros(1, int))
        wanted = np.concatenate([np.eye(n)[p] for n, p in zip(sizes, places, strict=True)])
        np.testing.assert_array_equal(actions.to_model(stored)[0], wanted)
        np.testing.assert_array_equal(actions.from_rows(stored)[0], first + places)


def test_one_hot_vectors_of_several_choices_follow_each_other_and_no_choice_is_zeros() -> None:
    codes = one_hot(np.array([[[1, 0], [-1, -1]], [[0, 2], [1, 1]]]), (2, 3))
    assert codes.dtype == np.float32
    assert codes.tolist() == [[[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], [[1, 0, 0, 0, 1], [0, 1, 0, 1, 0]]]
    with pytest.raises(ValueError, match="zip"):
        one_hot(np.zeros((4, 1), int), (2, 3))


def test_integers_that_begin_elsewhere_have_the_code_of_their_place() -> None:
    spec = spec_of(spaces.MultiDiscrete([2, 3], start=[-1, 5]))
    assert spec == Spec("discrete", (2,), (2, 3), (-1, 5))
    code = CODES["discrete"].flatten
    assert code(th.tensor([[-1, 7], [0, 5]]), spec).tolist() == [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(3, 36, 36), (1, 37, 64), (3, 64, 64), (4, 84, 84), (3, 100, 75), (3, 96, 128), (9, 128, 128)]
)
def test_images_of_any_size_go_in_and_come_out(shape: tuple[int, ...]) -> None:
    specs, size = observation_specs(image(*shape)), SIZES["debug"]
    encoder, features = Encoder(specs, size), size.deter + size.stoch * size.classes
    decoder = Decoder(specs, features, size)
    images = th.randint(0, 256, (2, 3, *shape), dtype=th.uint8)
    assert encoder({"obs": images}).shape == (2, 3, encoder.width)
    out = decoder.predict(th.randn(2, 3, features))["obs"]
    assert (out.shape, out.dtype) == (images.shape, th.uint8)


def test_an_image_gives_the_same_action_channels_first_and_last() -> None:
    model = trained(Random(image(36, 40, 3)))
    last = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    both = [model.predict(x, deterministic=True) for x in (last, last.transpose(2, 0, 1))]
    np.testing.assert_array_equal(both[0][1][0], both[1][1][0])


def test_the_decoder_learns_a_picture_that_is_not_square() -> None:
    th.manual_seed(0)
    specs, size = observation_specs(image(3, 36, 44)), SIZES["debug"]
    decoder = Decoder(specs, 48, size)
    features, picture = th.randn(1, 48), th.zeros(1, 3, 36, 44, dtype=th.uint8)
    picture[:, 0, 5:20, 30:40] = 255
    optimizer = th.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        losses.append(decoder.loss(features, {"obs": picture}).sum())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
    assert decoder.predict(features)["obs"][0, 0, 12, 35] > 200
    assert decoder.predict(features)["obs"][0, 0, 30, 10] < 50


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Still(Random):
    """A picture, an action in [-3, 3], no end: for wrappers to change."""

    def __init__(self, space: spaces.Space | None = None) -> None:
        super().__init__(space or image(36, 36, 1), spaces.Box(-3, 3, (2,), np.float32))

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, False, info


def pendulum(n_envs: int = 2) -> DummyVecEnv:
    return make_vec_env("Pendulum-v1", n_envs, seed=0)


WRAPPED = {
    "Monitor": lambda: Monitor(Random(spaces.Discrete(4))),
    "TimeLimit": lambda: TimeLimit(Still(), 9),
    "RescaleAction": lambda: TimeLimit(RescaleAction(Still(), np.float32(0), np.float32(1)), 9),
    "FlattenObservation": lambda: FlattenObservation(Random(OBSERVATIONS["dict"])),
    "VecTransposeImage": lambda: VecTransposeImage(DummyVecEnv([lambda: TimeLimit(Still(), 9)])),
    "VecFrameStack": lambda: VecFrameStack(DummyVecEnv([lambda: TimeLimit(Still(), 9)] * 2), 3),
    "VecFrameStack of a vector": lambda: VecFrameStack(pendulum(), 2),
    "VecNormalize": lambda: VecNormalize(pendulum()),
    "VecNormalize of a Dict": lambda: VecNormalize(
        VecTransposeImage(DummyVecEnv([lambda: Random(OBSERVATIONS["dict"])])), norm_obs_keys=["speed"]
    ),
    "VecNormalize of rewards, integers seen": lambda: VecNormalize(
        DummyVecEnv([lambda: Random(spaces.Discrete(4))]), norm_obs=False
    ),
    "goals": lambda: BitFlippingEnv(n_bits=4, max_steps=5),
    "goals as integers": lambda: BitFlippingEnv(n_bits=4, max_steps=5, discrete_obs_space=True),
    "goals and continuous actions": lambda: BitFlippingEnv(n_bits=4, max_steps=5, continuous=True),
    "goals as images": lambda: BitFlippingEnv(n_bits=4, max_steps=5, image_obs_space=True),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_environments_just_work(name: str) -> None:
    assert_sound(trained(WRAPPED[name](), buffer_size=400))


def test_time_limits_are_no_ends_for_the_model() -> None:
    model = trained(TimeLimit(Still(), 5))
    batch = model.replay_buffer.sample(8)
    assert batch.is_last.any()
    assert not batch.is_terminal.any()


def test_original_observations_are_kept_and_normalised_when_served() -> None:
    env = VecNormalize(pendulum(1), clip_obs=5)
    model = trained(env)
    before = model.replay_buffer.sample(4, env=env).obs["obs"].abs().max()
    env.obs_rms.var = env.obs_rms.var * 1e-6  # as if the statistics had changed since
    assert model.replay_buffer.sample(4, env=env).obs["obs"].abs().max() == 5 > before


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "space", "right"),
    [
        ("MlpPolicy", image(36, 36, 3), "CnnPolicy"),
        ("CnnPolicy", spaces.Box(-1, 1, (3,)), "MlpPolicy"),
        ("CnnPolicy", spaces.Box(0, 1, (3, 36, 36), np.float32), "MlpPolicy"),
        ("CnnPolicy", spaces.Discrete(3), "MlpPolicy"),
        ("MlpPolicy", OBSERVATIONS["dict"], "MultiInputPolicy"),
        ("CnnPolicy", OBSERVATIONS["dict"], "MultiInputPolicy"),
        ("MultiInputPolicy", spaces.Box(-1, 1, (3,)), "MlpPolicy"),
        ("MultiInputPolicy", image(3, 36, 36), "CnnPolicy"),
    ],
)
def test_the_wrong_policy_names_the_right_one(policy: str, space: spaces.Space, right: str) -> None:
    with pytest.raises(ValueError, match=right):
        Dreamer(policy, Random(space), **DEBUG)


@pytest.mark.parametrize("high", [np.inf, 3e38])
def test_bounds_that_cannot_be_scaled_are_refused_with_advice(high: float) -> None:
    space = spaces.Box(np.array([-1, -high], np.float32), np.array([1, high], np.float32))
    with pytest.raises(ValueError, match=r"dimension \(1,\) has \[-.*\].*RescaleAction"):
        Dreamer("MlpPolicy", Random(spaces.Box(-1, 1, (2,)), space), **DEBUG)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.Text(5),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Graph(spaces.Discrete(2), None),
        spaces.Dict({"inner": spaces.Dict({"x": spaces.Discrete(2)})}),
    ],
)
def test_spaces_without_a_code_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="not supported"):
        Dreamer(policy_for(space), Random(space), **DEBUG)


def test_tuples_of_actions_are_refused() -> None:
    env = Random(spaces.Discrete(2), spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]))
    with pytest.raises(ValueError, match=r"actions of Tuple.* are not supported"):
        Dreamer("MlpPolicy", env, **DEBUG)


def test_what_changes_observations_belongs_inside_of_vecnormalize() -> None:
    env = VecNormalize(DummyVecEnv([lambda: Random(OBSERVATIONS["dict"])]), norm_obs_keys=["speed"])
    with pytest.raises(ValueError, match="wrap it last"):  # SB3 itself adds VecTransposeImage on top of it
        Dreamer("MultiInputPolicy", env, **DEBUG)


@pytest.mark.parametrize("policy", ["MultiInputPolicy", "CnnPolicy"])
def test_images_are_not_normalised_as_if_they_were_vectors(policy: str) -> None:
    space = image(48, 40, 3)
    space = spaces.Dict(camera=space) if policy == "MultiInputPolicy" else space
    env = VecTransposeImage(DummyVecEnv([lambda: Random(space)]))
    with pytest.raises(ValueError, match=r"VecNormalize turns \['(camera|obs)'\] into vectors of floats"):
        Dreamer(policy, VecNormalize(env), **DEBUG)


def test_a_grid_of_numbers_is_no_image_that_was_normalised() -> None:
    grid = spaces.Box(-10, 10, (3, 4, 4), np.float32)
    env = VecNormalize(DummyVecEnv([lambda: Random(grid)]), clip_obs=10)
    Dreamer("MlpPolicy", env, **DEBUG).learn(20)


def test_many_choices_cost_no_more_than_their_number() -> None:
    buffer = SequenceReplayBuffer(20, spaces.Discrete(2), spaces.Discrete(5000), "cpu", sequence_length=3)
    assert len(pickle.dumps(buffer)) < 20_000


def test_a_box_of_actions_is_a_vector_even_where_it_might_be_an_image():
    space = spaces.Box(0, 255, (1, 2, 2), np.uint8)
    assert spec_of(space).kind == "image"
    assert action_spec_of(space) == Spec("vector", (1, 2, 2))
    assert action_spec_of(spaces.Discrete(3)) == spec_of(spaces.Discrete(3))
