import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import PendulumEnv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

import sb3_dreamer.dreams
from sb3_dreamer import Dreamer
from sb3_dreamer.dreams import DreamCallback, collect, write_report
from sb3_dreamer.dreams.__main__ import main
from sb3_dreamer.dreams.extras import MissingExtra, need
from sb3_dreamer.dreams.videos import Body, encode
from tests.dreams.dial import Dial

TINY = dict(model_size="debug", batch_size=2, batch_length=16, learning_starts=40, train_ratio=2, seed=0)


def block(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these libraries were not installed."""
    real: Callable[..., Any] = importlib.import_module

    def blocked(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", blocked)


def page_of(model: Dreamer, env: DummyVecEnv, folder: Path, **settings: Any) -> str:
    replay, real_return = collect(model, env, 60, sequence_length=20)
    path = write_report(model, replay.peek(4), folder / "a" / "index.html", "Dial", real_return, samples=4, **settings)
    return path.read_text("utf-8")


def test_the_page_stands_alone(tmp_path: Path):
    page = page_of(Dreamer("MlpPolicy", Dial(), **TINY), DummyVecEnv([Dial]), tmp_path)
    assert page.count("data:image/svg+xml;base64,") == 4  # the horizon error, and three sequences
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_tells_numbers_and_settings(tmp_path: Path):
    page = page_of(Dreamer("MlpPolicy", Dial(), **TINY), DummyVecEnv([Dial]), tmp_path, dims=["obs[2]"])
    for text in ("persistence", "train ratio</td><td>2<", "model size</td><td>debug<", "steps ahead the dream"):
        assert text in page


def test_unknown_dimensions_are_refused_with_those_that_there_are(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown dims \['obs\[9\]'\]; available: obs\[0\], obs\[1\], obs\[2\]"):
        page_of(Dreamer("MlpPolicy", Dial(), **TINY), DummyVecEnv([Dial]), tmp_path, dims=["obs[9]"])


def test_a_missing_extra_names_the_command_and_the_numbers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block(monkeypatch, "matplotlib")
    page = page_of(Dreamer("MlpPolicy", Dial(), **TINY), DummyVecEnv([Dial]), tmp_path)
    assert "matplotlib is not installed" in page
    assert "pip install &#34;sb3-dreamer[dreams]&#34;" in page
    assert "data:image/svg" not in page
    assert "Horizon error" in page


@pytest.mark.parametrize(("module", "extra"), [("moviepy", "dreams"), ("mujoco", "mujoco")])
def test_missing_extras_of_videos_name_the_command(module: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    block(monkeypatch, module)
    with pytest.raises(MissingExtra, match=rf'pip install "sb3-dreamer\[{extra}\]"'):
        need(module, extra)
    with pytest.raises(MissingExtra, match=module):
        encode(np.zeros((2, 8, 8, 3), np.uint8), ".gif") if module == "moviepy" else Body(gym.make("Hopper-v4"))


def test_videos_are_files_that_browsers_know():
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    assert encode(frames, ".gif").startswith(b"GIF89a")
    assert encode(frames, ".mp4")[4:8] == b"ftyp"


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Dreamer("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model.zip")
    sizes = ["--steps", "60", "--horizon", "20", "--sequences", "3", "--samples", "3"]
    page = main([str(tmp_path / "model.zip"), "--env", "Pendulum-v1", "--out", str(tmp_path / "dreams"), *sizes])
    assert page == tmp_path / "dreams" / "index.html"
    assert capsys.readouterr().out == f"{page}\n"
    text = page.read_text("utf-8")
    assert "Dreams of model in Pendulum-v1" in text
    assert "No video of the body" in text


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--sequences", "0"], "--sequences: 0 must be at least 1"),
        (["--samples", "-2"], "--samples: -2 must be at least 1"),
        (["--horizon", "0"], "--horizon: 0 must be at least 1"),
        (["--steps", "40"], "--steps 40: --context and --horizon together need 65 or more"),
        (["--vecnormalize", "nowhere.pkl"], "nowhere.pkl does not exist: pass the file that VecNormalize.save wrote"),
        (["--env", "CartPole-v1"], "model.zip in CartPole-v1: Observation spaces do not match"),
        (["--dims", "obs[9]"], r"--dims: unknown dims ['obs[9]']; available: obs[0], obs[1], obs[2]"),
    ],
)
def test_the_command_refuses_what_it_cannot_draw_before_a_step_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: list[str], says: str
):
    Dreamer("MlpPolicy", "Pendulum-v1", **TINY).save(tmp_path / "model.zip")
    monkeypatch.setattr(PendulumEnv, "step", None)
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "model.zip"), "--env", "Pendulum-v1", *wrong])
    assert says in f"{refused.value} {capsys.readouterr().err}"


def test_the_command_refuses_statistics_that_the_agent_did_not_learn_with(tmp_path: Path):
    Dreamer("MlpPolicy", "Pendulum-v1", **TINY).learn(100).save(tmp_path / "model.zip")
    VecNormalize(make_vec_env("Pendulum-v1")).save(str(tmp_path / "statistics.pkl"))
    given = [str(tmp_path / "model.zip"), "--env", "Pendulum-v1", "--vecnormalize", str(tmp_path / "statistics.pkl")]
    with pytest.raises(SystemExit, match="trained without VecNormalize: leave --vecnormalize out"):
        main(given)


class Pictures(gym.ObservationWrapper[np.ndarray, np.int64, np.ndarray]):
    """The dial as images."""

    def __init__(self) -> None:
        super().__init__(Dial())
        self.observation_space = gym.spaces.Box(0, 255, (1, 16, 16), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        image = np.zeros((1, 16, 16), np.uint8)
        x, y = (7 + 6 * observation[:2]).astype(int)
        image[0, x : x + 2, y : y + 2] = 255
        return image


def test_images_become_videos(tmp_path: Path):
    model = Dreamer("CnnPolicy", Pictures(), **TINY)
    page = page_of(model, DummyVecEnv([Pictures]), tmp_path)
    assert page.count("data:video/mp4;base64,") == 2


class Upright(Pictures):
    """Channels last, as cameras have them."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.moveaxis(super().observation(observation), 0, -1).repeat(3, -1)


def test_the_command_shows_images_with_channels_last_and_leaves_a_replay_on_disk_alone(tmp_path: Path):
    gym.register("Upright-v0", Upright)
    store = tmp_path / "store"
    model = Dreamer("CnnPolicy", "Upright-v0", **TINY, replay_buffer_kwargs=dict(storage_path=str(store))).learn(20)
    model.save(tmp_path / "model.zip")
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    sizes = ["--steps", "60", "--horizon", "20", "--sequences", "3", "--samples", "3"]
    page = main([str(tmp_path / "model.zip"), "--env", "Upright-v0", "--out", str(tmp_path / "dreams"), *sizes])
    assert page.read_text("utf-8").count("data:video/mp4;base64,") == 2
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before


def test_the_command_shows_images_of_an_agent_whose_rewards_are_normalised(tmp_path: Path):
    gym.register("Upright-v1", Upright)
    env = VecNormalize(VecTransposeImage(DummyVecEnv([Upright])), norm_obs=False)
    Dreamer("CnnPolicy", env, **TINY).learn(20).save(tmp_path / "model.zip")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    given = ["--env", "Upright-v1", "--vecnormalize", str(tmp_path / "vecnormalize.pkl"), "--out", str(tmp_path)]
    page = main([str(tmp_path / "model.zip"), *given, "--steps", "60", "--horizon", "20", "--samples", "3"])
    assert page.exists()
    VecNormalize(DummyVecEnv([Dial])).save(str(tmp_path / "vecnormalize.pkl"))
    with pytest.raises(SystemExit, match="has statistics of other observations than Upright-v1's"):
        main([str(tmp_path / "model.zip"), *given])


class Restorable(Dial):
    """Its state can be set as that of a MuJoCo task."""

    metadata = {"render_modes": ["rgb_array"]}

    def set_state(self, place: int) -> None:
        self.place = place


def test_the_command_needs_no_body_of_an_environment_that_only_has_a_set_state(tmp_path: Path):
    gym.register("Restorable-v0", Restorable)
    Dreamer("MlpPolicy", "Restorable-v0", **TINY).save(tmp_path / "model.zip")
    sizes = ["--steps", "60", "--horizon", "20", "--sequences", "3", "--samples", "3"]
    page = main([str(tmp_path / "model.zip"), "--env", "Restorable-v0", "--out", str(tmp_path), *sizes])
    assert "No video of the body: " in page.read_text("utf-8")


def learn(callback: DreamCallback | None, folder: Path, formats: list[str]) -> Dreamer:
    model = Dreamer("MlpPolicy", Dial(), **TINY)
    model.set_logger(configure(str(folder), formats))
    model.learn(100, callback=callback, log_interval=1)
    model.logger.close()
    return model


def test_callback_logs_numbers_figures_and_each_warning_once(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn(DreamCallback(every=20, sequences=2, samples=3), tmp_path, ["tensorboard", "csv"])
    told = [str(warning.message).rpartition(" (at ")[0] for warning in said if "shown once" in str(warning.message)]
    assert told
    assert len(told) == len(set(told)), "the same at another step is the same"
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    scalars = {tag for tag in log.Tags()["scalars"] if tag.startswith("dreams/")}
    assert {"dreams/obs_error_1", "dreams/obs_error_5", "dreams/obs_persistence_5", "dreams/reward_mean_1"} <= scalars
    assert {"dreams/kl", "dreams/dead_latents", "dreams/imagined_return", "dreams/error_ratio"} <= scalars
    assert {"dreams/open_loop", "dreams/horizon_error"} <= set(log.Tags()["images"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(context=16), "context=16 must be below batch_length=16"),
        (dict(context=0), "context=0 must be a whole number of at least 1"),
        (dict(samples=0), "samples=0 must be a whole number of at least 1"),
        (dict(sequences=2.5), "sequences=2.5 must be a whole number of at least 1"),
        (dict(every=-5), "every=-5 must be a whole number of at least 1"),
        (dict(dims=["obs[9]"]), r"unknown dims \['obs\[9\]'\]"),
        (dict(body_env="Hopper-v4"), "another observation space"),
    ],
)
def test_callback_refuses_what_does_not_fit_before_anything_is_learned(settings: dict, says: str):
    if "body_env" in settings:
        settings = dict(body_env=gym.make(settings["body_env"]))
    model = Dreamer("MlpPolicy", Dial(), **TINY)
    with pytest.raises(ValueError, match=says):
        model.learn(100, callback=DreamCallback(**{"every": 20, **settings}))
    assert model.num_timesteps == 0


@pytest.mark.parametrize("pieces", [1, 4])
def test_callback_looks_at_the_same_steps_however_often_learn_is_called(pieces: int, monkeypatch: pytest.MonkeyPatch):
    looked: list[int] = []
    callback = DreamCallback(every=40)
    monkeypatch.setattr(callback, "_evaluate", lambda _: looked.append(callback.num_timesteps))
    model = Dreamer("MlpPolicy", Dial(), **{**TINY, "learning_starts": 16, "batch_length": 12})
    for piece in range(pieces):
        model.learn(120 // pieces, callback=callback, reset_num_timesteps=piece == 0)
    assert looked == [40, 80, 120]
    model.learn(50, callback=callback)
    assert looked[3:] == [40], "counted anew"


def test_callback_inside_of_one_that_calls_it_now_and_then_is_refused():
    with pytest.raises(ValueError, match="DreamCallback inside of EveryNTimesteps would miss most rewards"):
        Dreamer("MlpPolicy", Dial(), **TINY).learn(40, callback=EveryNTimesteps(10, DreamCallback()))


def test_collecting_in_other_units_than_the_model_has_learned_from_is_refused():
    model = Dreamer("MlpPolicy", Dial(), **TINY).learn(80)
    with pytest.raises(ValueError, match="learned without VecNormalize around its observations, and env is with"):
        collect(model, VecNormalize(DummyVecEnv([Dial])), 20)
    collect(model, VecNormalize(DummyVecEnv([Dial]), norm_obs=False), 20, sequence_length=8)


def test_callback_refuses_other_algorithms():
    with pytest.raises(TypeError, match="PPO has none"):
        PPO("MlpPolicy", "CartPole-v1", device="cpu").learn(10, callback=DreamCallback())


@pytest.mark.filterwarnings("ignore:.*shown once")
def test_training_goes_on_as_if_nobody_looked(tmp_path: Path):
    alone = learn(None, tmp_path / "alone", [])
    watched = learn(DreamCallback(every=20, sequences=2, samples=3), tmp_path / "watched", ["csv"])
    for mine, theirs in zip(alone.policy.parameters(), watched.policy.parameters(), strict=True):
        np.testing.assert_array_equal(mine.detach(), theirs.detach())


def test_callback_without_matplotlib_says_so_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    block(monkeypatch, "matplotlib")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = learn(DreamCallback(every=20, sequences=2, samples=3), tmp_path, ["tensorboard"])
    assert sum("pip install" in str(warning.message) for warning in said) == 1
    assert model.num_timesteps == 100


def test_dreams_import_without_their_extras():
    heavy = "matplotlib|moviepy|mujoco|jinja2"
    assert sb3_dreamer.dreams.__file__ is not None
    source = "".join(path.read_text("utf-8") for path in Path(sb3_dreamer.dreams.__file__).parent.glob("*.py"))
    assert not re.findall(rf"^(?:import|from) (?:{heavy})", source, re.MULTILINE)
