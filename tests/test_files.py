"""Saved agents: everything `predict` needs is data, nothing of somebody else's is executed, bad files are named."""

import base64
import contextlib
import inspect
import io
import json
import os
import zipfile

import cloudpickle
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env

from sb3_dreamer import Dreamer
from sb3_dreamer.files import FORMAT, describe_space, read_settings, space_from
from sb3_dreamer.policies import MlpPolicy

DEBUG = dict(
    model_size="debug", learning_starts=10, batch_size=2, batch_length=8, buffer_size=200, train_ratio=4, seed=0
)


def falling(progress: float) -> float:
    return 1e-3 * progress


@pytest.fixture(scope="module")
def model():
    return Dreamer("MlpPolicy", make_vec_env("Pendulum-v1"), device="cpu", **DEBUG).learn(16)


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


def rewrite(path, change) -> None:
    """The same zip file with its settings changed in place by `change`."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    settings = json.loads(parts["data"])
    change(settings)
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, json.dumps(settings) if name == "data" else part)


def plant(path, key: str, flag) -> None:
    """Make the file run code of its own when `key` is unpickled."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(flag),)

    pickled = base64.b64encode(cloudpickle.dumps(Evil())).decode()
    rewrite(path, lambda settings: settings.update({key: {":type:": "x", ":serialized:": pickled}}))


# -- files of somebody else --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [True, False])
def test_a_loaded_agent_acts_as_the_saved_one(model, saved, trusted: bool) -> None:
    loaded = Dreamer.load(saved, trusted=trusted, device="cpu")
    obs, episode_start = np.array([[0.1, -0.9, 2.0], [1.0, 0.0, 0.0]], np.float32), np.ones(2, bool)
    ours = model.predict(obs, episode_start=episode_start, deterministic=True)
    theirs = loaded.predict(obs, episode_start=episode_start, deterministic=True)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(one, other)


PICKLED = ["policy_class", "observation_space", "action_space", "learning_rate", "lr_schedule", "ep_info_buffer", "new"]


@pytest.mark.parametrize("key", PICKLED)
def test_untrusted_files_run_no_code(saved, tmp_path, key: str) -> None:
    plant(saved, key, tmp_path / "harm")
    if key == "learning_rate":
        with pytest.warns(UserWarning, match="learning_rate.* were not read"):
            Dreamer.load(saved, trusted=False, device="cpu")
    else:
        Dreamer.load(saved, trusted=False, device="cpu")
    assert not (tmp_path / "harm").exists()
    with contextlib.suppress(Exception):  # whatever becomes of it: the plant works, so the lines above mean something
        Dreamer.load(saved, trusted=True, device="cpu")
    assert (tmp_path / "harm").exists()


def test_the_list_of_what_is_pickled_is_complete(saved) -> None:
    pickled = {
        key for key, value in read_settings(saved).items() if isinstance(value, dict) and ":serialized:" in value
    }
    assert pickled == {
        "policy_class", "observation_space", "action_space", "lr_schedule", "train_freq", "_last_episode_starts",
        "ep_info_buffer", "ep_success_buffer",
    }  # fmt: skip


def test_a_pickled_schedule_is_left_out_with_a_warning_or_replaced(tmp_path) -> None:
    agent = Dreamer("MlpPolicy", "Pendulum-v1", learning_rate=falling, **DEBUG)
    agent.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="learning_rate.* were not read, their defaults are used"):
        loaded = Dreamer.load(tmp_path / "model", trusted=False)
    assert loaded.learning_rate == inspect.signature(Dreamer).parameters["learning_rate"].default
    assert Dreamer.load(tmp_path / "model", trusted=False, learning_rate=1e-5).lr_schedule(1.0) == 1e-5


class Mine(Dreamer):
    """A subclass that passes its arguments on."""

    def __init__(self, *args, mine: int = 1, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mine = mine


def test_a_subclass_that_passes_its_arguments_on_loads_as_dreamer_does(tmp_path) -> None:
    Mine("MlpPolicy", "Pendulum-v1", learning_rate=falling, mine=2, **DEBUG).save(tmp_path / "model")
    loaded = Mine.load(tmp_path / "model", stats_window_size=5)
    assert (loaded.mine, loaded._stats_window_size) == (2, 5)
    with pytest.warns(UserWarning, match=r"\['learning_rate'\] .* their defaults are used"):
        loaded = Mine.load(tmp_path / "model", trusted=False)
    assert loaded.learning_rate == inspect.signature(Dreamer).parameters["learning_rate"].default
    for unknown in ("args", "kwargs", "other"):
        with pytest.raises(TypeError, match=rf"load\(\) got {unknown}, which Mine does not have"):
            Mine.load(tmp_path / "model", **{unknown: 3})


def test_pickled_arguments_of_the_replay_are_left_out_too(tmp_path) -> None:
    where = {"storage_path": tmp_path / "replay"}  # a Path is no JSON
    Dreamer("MlpPolicy", "Pendulum-v1", replay_buffer_kwargs=where, **DEBUG).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="replay_buffer_kwargs.* were not read"):
        assert Dreamer.load(tmp_path / "model", trusted=False).replay_buffer_kwargs == {}


def test_folders_that_another_has_chosen_are_not_written_to(tmp_path) -> None:
    folders = dict(replay_buffer_kwargs={"storage_path": "theirs"}, tensorboard_log="logs")
    Dreamer("MlpPolicy", "Pendulum-v1", **folders, **DEBUG).save(tmp_path / "model")
    with pytest.warns(UserWarning, match=r"\['replay_buffer_kwargs', 'tensorboard_log'\] .* name folders"):
        loaded = Dreamer.load(tmp_path / "model", trusted=False)
    assert (loaded.replay_buffer_kwargs, loaded.tensorboard_log) == ({}, None)
    mine = Dreamer.load(tmp_path / "model", trusted=False, replay_buffer_kwargs={}, tensorboard_log="mine")
    assert mine.tensorboard_log == "mine"


@pytest.mark.filterwarnings("ignore:the replay is empty")
def test_an_untrusted_agent_goes_on_training(saved) -> None:
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), trusted=False, device="cpu")
    before = loaded._n_updates
    loaded.learn(10)
    assert loaded._n_updates > before > 0


@pytest.mark.filterwarnings("ignore:the replay is empty", "ignore:.* are pickled and were not read")
def test_an_untrusted_agent_whose_train_ratio_is_of_numpy_goes_on_training(tmp_path) -> None:
    numbers = dict(train_ratio=np.float32(8))
    agent = Dreamer("MlpPolicy", "Pendulum-v1", **{**DEBUG, **numbers})
    agent.learn(60).save(tmp_path / "model")
    loaded = Dreamer.load(tmp_path / "model", env=make_vec_env("Pendulum-v1"), trusted=False, device="cpu")
    assert loaded.learn(10).num_timesteps == 10


def test_a_policy_class_of_somebody_else_is_refused(tmp_path) -> None:
    class Mine(MlpPolicy):
        """Another one."""

    Dreamer(Mine, "Pendulum-v1", **DEBUG).save(tmp_path / "model")
    with pytest.raises(ValueError, match="policy class Mine, which is not one of"):
        Dreamer.load(tmp_path / "model", trusted=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(predict=3), r"would overwrite the methods \['predict'\]"),
        (lambda data: data.update(env="this:Env-v0"), r"holds \['env'\], which save\(\) leaves out"),
        (lambda data: data["described"].pop("action_space"), "describes no spaces that an agent could have"),
        (lambda data: data["described"]["action_space"].update(kind="Foo"), "describes no spaces that an agent could"),
        (lambda data: data["described"].update(policy=["x"]), "asks for the policy class"),
        (lambda data: data.update(described=[1]), "was not saved by Dreamer"),
        (lambda data: data.pop("described"), "was not saved by Dreamer"),
        (lambda data: data["described"].pop("format"), "saved by an older version of sb3_dreamer, in format 0"),
    ],
)
def test_a_file_made_by_hand_says_what_is_wrong_with_it(saved, change, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        Dreamer.load(saved, trusted=False, device="cpu")


SPACES = [
    spaces.Box(np.array([-1, -np.inf], np.float32), np.array([0.1, np.inf], np.float32)),
    spaces.Box(-(10**9), 10**9, (2, 3), np.int64),
    spaces.Box(0, 255, (3, 64, 64), np.uint8),
    spaces.Box(-1, 1, (), np.float64),
    spaces.Box(0, 1, (0,), np.float32),
    spaces.Discrete(5, start=-2),
    spaces.MultiDiscrete([2, 3], start=[-1, 4]),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([2, 3], dtype=np.int32),
    spaces.MultiBinary((2, 3)),
    spaces.MultiBinary(4),
    spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(0, 255, (8, 8, 3), np.uint8))]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_as_json(space: spaces.Space) -> None:
    described = json.dumps(describe_space(space))
    again = space_from(json.loads(described))
    assert again == space
    assert again.dtype == space.dtype
    assert len(described) < 300, "an image is not described pixel by pixel"
    if isinstance(space, spaces.Dict):
        assert list(again.spaces) == list(space.spaces)


# -- bad files ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        Dreamer.load(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_says_so(saved, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.zip is truncated.*copy it again"):
        Dreamer.load(saved)


def test_every_flipped_bit_in_the_contents_is_noticed(saved) -> None:
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        parts = [
            (info.header_offset + 60, info.compress_size) for info in archive.infolist() if info.compress_size > 200
        ]
    rng = np.random.default_rng(0)
    for start, size in parts * 3:
        where = start + int(rng.integers(size - 60))
        saved.write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
        with pytest.raises(ValueError, match=r"is damaged \(the checksum of .* is wrong"):
            Dreamer.load(saved)


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(1000), b"\x80\x04]\x94."])
def test_a_file_that_is_no_zip_says_so(tmp_path, content: bytes) -> None:
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ValueError, match="is not a zip file, so no saved agent"):
        Dreamer.load(tmp_path / "model")


def test_agents_of_other_algorithms_and_other_zip_files_are_foreign(tmp_path) -> None:
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10).save(tmp_path / "sac")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.txt", "meow")
    for name in ("sac", "photos.zip"):
        with pytest.raises(ValueError, match="was not saved by Dreamer"):
            Dreamer.load(tmp_path / name)


@pytest.mark.parametrize(("number", "age"), [(FORMAT - 1, "an older"), (FORMAT + 1, "a newer")])
def test_files_of_another_format_say_so(saved, number: int, age: str) -> None:
    rewrite(saved, lambda settings: settings["described"].update(format=number))
    with pytest.raises(
        ValueError, match=f"saved by {age} version of sb3_dreamer, in format {number}, this one reads {FORMAT}"
    ):
        Dreamer.load(saved)


def test_open_files_are_read_too(model) -> None:
    file = io.BytesIO()
    model.save(file)
    assert Dreamer.load(file, device="cpu", trusted=False)._n_updates == model._n_updates
    with pytest.raises(ValueError, match="is truncated"):
        Dreamer.load(io.BytesIO(file.getvalue()[:-100]))
