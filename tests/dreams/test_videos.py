import gymnasium as gym
import numpy as np
import pytest

from sb3_dreamer.dreams.extras import MissingExtra
from sb3_dreamer.dreams.open_loop import OpenLoop, Pair
from sb3_dreamer.dreams.videos import Body, as_rgb, image_video, with_bar
from sb3_dreamer.types import Spec


def image_loop(truth: np.ndarray, dream: np.ndarray, context: int) -> OpenLoop:
    scalars = Pair(np.zeros(truth.shape[:2]), np.zeros(dream.shape[:3]))
    spec = {"obs": Spec("image", truth.shape[2:])}
    return OpenLoop(spec, {"obs": Pair(truth, dream)}, *[scalars] * 3, np.ones(truth.shape[:2], bool), context)


def test_image_video_shows_truth_dream_and_error_side_by_side():
    truth = np.full((1, 4, 1, 64, 64), 200, np.uint8)
    dream = np.full((2, 1, 4, 1, 64, 64), 50, np.uint8)
    frames = image_video(image_loop(truth, dream, context=2), 0, "obs")
    assert frames.shape == (4, 128 + 6, 3 * 128, 3)
    picture = frames[:, 6:]
    assert (picture[:, :, :128] == 200).all()
    assert (picture[:, :, 128:256] == 50).all()
    assert (picture[:, :, 256:] == 150).all()


def test_the_bar_tells_seen_from_dreamed_and_the_video_ends_where_the_truth_does():
    truth = np.zeros((1, 5, 3, 8, 9), np.uint8)
    loop = image_loop(truth, truth[None], context=2)
    loop.valid[0, 4] = False
    frames = with_bar(np.full((5, 9, 9, 3), 7, np.uint8), loop, 0)
    assert frames.shape == (4, 16, 10, 3)  # even, as codecs want it
    green, blue = frames[1, 0, 0], frames[2, 0, 0]
    assert green[1] > green[2]
    assert blue[2] > blue[1]


def test_the_newest_of_stacked_frames_is_shown():
    stacked = np.arange(4, dtype=np.uint8)[None, :, None, None] * np.ones((2, 4, 5, 5), np.uint8)
    assert (as_rgb(stacked) == 3).all()
    assert as_rgb(np.zeros((2, 6, 5, 7), np.uint8)).shape == (2, 5, 7, 3)


@pytest.mark.parametrize(
    ("env_id", "skip"),
    [
        *[("Hopper-v4", 1), ("HalfCheetah-v4", 1), ("Walker2d-v4", 1), ("Ant-v4", 2), ("Humanoid-v4", 2)],
        *[("Swimmer-v4", 2), ("InvertedPendulum-v4", 0)],
    ],
)
def test_poses_are_those_of_the_simulator_up_to_the_root(env_id: str, skip: int):
    env = gym.make(env_id)
    body = Body(env)
    assert body.skip == skip
    obs, qpos = [], []
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(10):
        obs.append(env.step(env.action_space.sample())[0])
        qpos.append(env.unwrapped.data.qpos.copy())  # type: ignore[attr-defined]
    poses = body.poses(np.array(obs))
    np.testing.assert_allclose(poses[:, skip:], np.array(qpos)[:, skip:], atol=1e-6)
    moved = np.diff(np.array(qpos)[:, :skip], axis=0)
    np.testing.assert_allclose(np.diff(poses[:, :skip], axis=0), moved, atol=0.1)
    env.close()


@pytest.mark.parametrize(("env_id", "says"), [("Reacher-v4", "pose is not known"), ("Pendulum-v1", "not a MuJoCo")])
def test_where_the_observation_does_not_determine_the_pose_there_is_no_body(env_id: str, says: str):
    env = gym.make(env_id)
    with pytest.raises(ValueError, match=says):
        Body(env)
    env.close()


def test_where_nothing_can_be_rendered_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    env = gym.make("Hopper-v4")
    body = Body(env)

    tried = []

    def no_platform(*args: int) -> None:
        tried.append(args)
        raise RuntimeError("no OpenGL platform")

    monkeypatch.setattr("mujoco.Renderer", no_platform)
    for _ in range(2):
        with pytest.raises(MissingExtra, match=r"no OpenGL platform.*MUJOCO_GL=egl.*pip install"):
            body.frames(np.zeros((2, 11)))
    assert len(tried) == 1, "the second time it may end the process"
    env.close()
