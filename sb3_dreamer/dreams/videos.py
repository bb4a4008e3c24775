"""Videos: images as truth | dream | error, and the bodies of MuJoCo tasks as truth | dream."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_dreamer.dreams.extras import MissingExtra, need
from sb3_dreamer.dreams.open_loop import OpenLoop

FPS = 15
SEEN, DREAMED = (90, 160, 90), (31, 111, 180)  # colors of the bar above a frame
MIN_PIXELS = 128  # smaller images are magnified
BODY_PIXELS = 192  # height and width of a frame


def image_video(rollout: OpenLoop, sequence: int, key: str) -> np.ndarray:
    """Truth | dream | absolute error of the first dream of a sequence: frames (T, height, width, 3) uint8."""
    truth, dream = (as_rgb(x) for x in (rollout.obs[key].truth[sequence], rollout.obs[key].dream[0, sequence]))
    error = np.abs(truth.astype(np.int16) - dream).astype(np.uint8)
    frames = np.concatenate([truth, dream, error], 2)
    times = -(-MIN_PIXELS // truth.shape[1])
    return with_bar(frames.repeat(times, 1).repeat(times, 2), rollout, sequence)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """(T, C, H, W) -> (T, H, W, 3); the newest of stacked frames."""
    channels = 3 if images.shape[1] % 3 == 0 else 1
    return np.broadcast_to(np.moveaxis(images[:, -channels:], 1, -1), (*np.moveaxis(images, 1, -1).shape[:-1], 3))


def with_bar(frames: np.ndarray, rollout: OpenLoop, sequence: int) -> np.ndarray:
    """Put a bar above the frames, green in the context and blue in the dream; cut at the last valid entry.

    Height and width become even, as video codecs require.
    """
    until, (_, height, width, _) = int(rollout.valid[sequence].sum()), frames.shape
    barred = np.zeros((until, height + 6 + height % 2, width + width % 2, 3), np.uint8)
    barred[:, 6 : height + 6, :width] = frames[:until]
    barred[: rollout.context, :4], barred[rollout.context :, :4] = SEEN, DREAMED
    return barred


class Body:
    """Renders the poses of a MuJoCo task, which it reads from observations.

    Observations must start with the positions ``qpos``, with or without the first ones of the root, and the velocities
    ``qvel``; this is checked on real steps. Omitted positions of the root are integrated from the velocities.

    :param env: environment of the task, not the one trained in: it is stepped, and its state is set.
    :raises ValueError: if it is not a MuJoCo task of Gymnasium, or the observation does not determine the pose.
    :raises MissingExtra: without mujoco.
    """

    def __init__(self, env: gym.Env) -> None:
        need("mujoco", "mujoco")
        from gymnasium.envs.mujoco import MujocoEnv

        self.env: Any = env.unwrapped
        self._failure: MissingExtra | None = None
        if not isinstance(env.observation_space, gym.spaces.Box) or not isinstance(self.env, MujocoEnv):
            raise ValueError(f"{self.env} is not a MuJoCo task of Gymnasium with vector observations")
        env.reset(seed=0)
        seen = [np.asarray(env.step(env.action_space.sample())[0]) for _ in range(3)]
        fits = [skip for skip in (0, 1, 2) if self._fits(seen[-1], skip)]
        if not fits:
            raise ValueError(f"observations of {self.env} do not start with its joint positions: the pose is not known")
        self.skip = fits[0]

    def _fits(self, obs: np.ndarray, skip: int) -> bool:
        positions = self.env.data.qpos[skip:]
        rest = obs[len(positions) :]
        return obs.ndim == 1 and len(rest) >= skip and np.allclose(obs[: len(positions)], positions, atol=1e-6)

    def poses(self, obs: np.ndarray) -> np.ndarray:
        """Observations over time (T, X) -> positions (T, nq)."""
        n = self.env.model.nq - self.skip
        root = np.cumsum(obs[:, n : n + self.skip] * self.env.dt, 0)
        return np.concatenate([root, obs[:, :n]], 1)

    def frames(self, obs: np.ndarray) -> np.ndarray:
        """Render the poses of observations over time, without shadows: (T, X) -> (T, height, width, 3) uint8.

        :raises MissingExtra: if MuJoCo cannot render here.
        """
        import mujoco

        model, data = self.env.model, self.env.data
        if self._failure is not None:
            raise self._failure  # a second try may crash the process inside OpenGL
        try:
            renderer = mujoco.Renderer(model, BODY_PIXELS, BODY_PIXELS)
        except Exception as error:  # every OpenGL platform fails in its own way
            self._failure = MissingExtra(
                f"MuJoCo cannot render here, so this video is left out ({error}). Without a display set MUJOCO_GL=egl; "
                'if that does not help: pip install "sb3-dreamer[mujoco]", apt-get install libegl1'
            )
            raise self._failure from error
        rendered = []
        tracks = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0
        for qpos in self.poses(obs):
            mujoco.mj_normalizeQuat(model, qpos)
            self.env.set_state(qpos, np.zeros(model.nv))
            renderer.update_scene(data, camera="track" if tracks else -1)
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
            rendered.append(renderer.render())
        renderer.close()
        return np.stack(rendered)


Units = Callable[[np.ndarray], np.ndarray]


def body_video(rollout: OpenLoop, sequence: int, body: Body, in_units: Units = np.asarray) -> np.ndarray:
    """Real body | dreamed body of the first dream of a sequence: frames (T, height, width, 3) uint8.

    :param rollout: dreams of observations with the single key "obs".
    :param sequence: which of the B sequences.
    :param body: of the same task.
    :param in_units: turns the model's observations into those of the task; undoes VecNormalize.
    :raises MissingExtra: if MuJoCo cannot render here.
    """
    pair = rollout.obs["obs"]
    sides = [body.frames(in_units(obs).astype(np.float64)) for obs in (pair.truth[sequence], pair.dream[0, sequence])]
    return with_bar(np.concatenate(sides, 2), rollout, sequence)


def encode(frames: np.ndarray, suffix: str) -> bytes:
    """A video file's bytes.

    :param frames: (T, height, width, 3) uint8.
    :param suffix: ".mp4" for browsers, ".gif" for TensorBoard.
    :raises MissingExtra: without moviepy.
    """
    clip = need("moviepy", "dreams").ImageSequenceClip(list(frames), fps=FPS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"dream{suffix}")
        if suffix == ".gif":
            clip.write_gif(path, logger=None)
        else:
            clip.write_videofile(path, logger=None)
        return path.read_bytes()
