from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from benchmarks.envs import Recall, action_repeat, make_env


def test_dm_control_is_one_float32_vector():
    env = make_env("dmc/walker-walk")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == (24,)
    assert observation.dtype == np.float32
    assert env.observation_space.contains(observation)


def test_dm_control_episode_is_500_decisions_of_2_simulator_steps_and_ends_by_truncation():
    env = make_env("dmc/cartpole-swingup")
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape)
    ends = [env.step(action)[2:4] for _ in range(500)]
    assert ends == [(False, False)] * 499 + [(False, True)]
    assert env.unwrapped._env.physics.time() == pytest.approx(10.0)
    assert action_repeat("dmc/cartpole-swingup") == 2


@pytest.mark.parametrize(
    ("once", "repeated", "n"),
    [
        (lambda: make_env("dmc/cartpole-swingup").env, "dmc/cartpole-swingup", 2),
        (lambda: make_env("Hopper-v4"), "repeat-3/Hopper-v4", 3),
        (lambda: make_env("dmc/cartpole-swingup"), "repeat-2/dmc/cartpole-swingup", 2),
    ],
)
def test_action_repeat_sums_the_rewards(once: Callable[[], gym.Env], repeated: str, n: int):
    single, several = once(), make_env(repeated)
    action = np.full(single.action_space.shape, 0.5)
    single.reset(seed=3)
    several.reset(seed=3)
    expected = sum(single.step(action)[1] for _ in range(n))
    assert several.step(action)[1] == pytest.approx(expected, rel=1e-6)
    assert expected > 0


@pytest.mark.parametrize(
    ("name", "steps"),
    [("Hopper-v4", 1), ("repeat-3/Hopper-v4", 3), ("repeat-2/Humanoid-45", 2), ("repeat-2/dmc/reacher-easy", 4)],
)
def test_action_repeat_counts_the_steps_of_the_simulator(name: str, steps: int):
    assert action_repeat(name) == steps


@pytest.mark.parametrize(
    ("name", "full", "kept"),
    [
        ("Pendulum-no-velocity", "Pendulum-v1", [0, 1]),
        ("CartPole-no-velocity", "CartPole-v1", [0, 2]),
        ("Humanoid-45", "Humanoid-v4", list(range(45))),
    ],
)
def test_what_is_seen_in_part_is_a_part_of_what_there_is(name: str, full: str, kept: list[int]):
    hidden, shown = make_env(name), make_env(full)
    check_env(hidden, warn=False)
    assert hidden.observation_space.dtype == shown.observation_space.dtype
    np.testing.assert_array_equal(hidden.reset(seed=1)[0], shown.reset(seed=1)[0][kept])
    assert action_repeat(name) == 1


def test_cartpole_pixels_show_where_cart_and_pole_are():
    env = make_env("CartPole-pixels")
    start, _ = env.reset(seed=0)
    assert env.observation_space.contains(start)
    assert start.shape == (36, 60, 1)
    assert (start.min() < 100, start.max()) == (True, 255)
    moved = start
    for _ in range(8):
        moved = env.step(1)[0]
    darkness = [(255.0 - picture[..., 0]).sum(0) for picture in (start, moved)]
    centers = [(dark * np.arange(60)).sum() / dark.sum() for dark in darkness]
    assert abs(centers[1] - centers[0]) > 0.2


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("name", "shortest", "longest"), [("Recall", 2, 40), ("Recall-30", 30, 40)])
def test_recall_shows_its_number_once_and_pays_for_naming_its_sign_later(name, shortest, longest, right):
    env = make_env(name)
    check_env(env)
    waits = []
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        number, shown, total, ended = observation[0], [], 0.0, False
        while not ended:
            action = int((number > 0) == right) if observation[1] else env.action_space.sample()
            observation, reward, ended, truncated, _ = env.step(action)
            shown.append(observation[0])
            total += reward
        assert abs(number) == 10
        assert not any(shown)
        assert not truncated
        assert total == ((20.0 if number > 0 else 10.0) if right else -10.0)
        waits.append(len(shown) - Recall.ANSWERS)
    assert shortest <= min(waits) < shortest + 5
    assert longest - 5 < max(waits) <= longest


def test_uphill_slides_back_who_does_nothing_and_nothing_else_is_changed():
    flat, uphill = (make_env(name) for name in ("HalfCheetah-v4", "HalfCheetah-uphill"))
    reached = []
    for env in (flat, uphill):
        env.reset(seed=0)
        for _ in range(100):
            env.step(np.zeros(6, np.float32))
        reached.append(env.unwrapped.data.qpos[0])
    assert abs(reached[0]) < 0.3
    assert reached[1] < -1
    assert np.linalg.norm(uphill.unwrapped.model.opt.gravity) == pytest.approx(9.81)
    np.testing.assert_array_equal(flat.unwrapped.model.actuator_gear, uphill.unwrapped.model.actuator_gear)


def test_the_lame_one_has_no_motor_in_its_front_thigh():
    whole, lame = (make_env(name) for name in ("HalfCheetah-v4", "HalfCheetah-lame"))
    motors = [env.unwrapped.model.actuator(3) for env in (whole, lame)]
    assert [motor.name for motor in motors] == ["fthigh", "fthigh"]
    assert (motors[0].gear[0], motors[1].gear[0]) == (120, 0)
    others = [np.delete(env.unwrapped.model.actuator_gear, 3, 0) for env in (whole, lame)]
    np.testing.assert_array_equal(*others)
