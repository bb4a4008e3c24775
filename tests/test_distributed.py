"""Environments in a Ray cluster: one more VecEnv, step by step what SB3's own one does."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, OrderEnforcing
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_dreamer import Dreamer
from sb3_dreamer.distributed import RayVecEnv
from sb3_dreamer.replay import read_episodes
from tests.hybrid.conftest import SMALL

# Ray leaves the processes of its cluster to themselves, and Python tells so when it collects their handles.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    # Ray is polite and starts its workers at a low priority; beside other work they would take a minute to be there
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config={"worker_niceness": 0})
    yield
    ray.shutdown()


def pendulum(steps: int = 20, **kwargs: Any) -> Callable[[], gym.Env]:
    return lambda: gym.make("Pendulum-v1", max_episode_steps=steps, **kwargs)


def dict_env() -> gym.Env:
    class Two(gym.Env):  # made here, so that it travels to the workers by value
        observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(5)})
        action_space = spaces.Box(-1, 1, (1,))

        def reset(self, **kwargs: Any) -> Any:
            self.lock, self.count = threading.Lock(), 0  # cannot be pickled
            return {"a": np.zeros(2, np.float32), "b": 0}, {"options": kwargs.get("options")}

        def step(self, action: Any) -> Any:
            if action[0] == 1:
                raise ZeroDivisionError("the simulator went through the floor")
            self.count, self.last = self.count + 1, float(action[0])
            return {"a": np.repeat(action, 2), "b": self.count}, 1.0, self.count == 4, False, {}

        def tell(self, what: str, index: int) -> str:
            return f"{what} {index} {self.last:.1f}"

    return Two()


@pytest.fixture(scope="module")
def three(cluster: None) -> Iterator[RayVecEnv]:
    """Of two workers: a process takes seconds to start."""
    env = RayVecEnv([pendulum(render_mode="rgb_array")] * 3, envs_per_worker=2, num_cpus=0.5)
    yield env
    env.close()


def test_each_step_is_that_of_sb3s_own(three: RayVecEnv):
    own = DummyVecEnv([pendulum()] * 3)
    for env in (own, three):
        env.seed(3)
    np.testing.assert_array_equal(three.reset(), own.reset())
    rng = np.random.default_rng(0)
    for _ in range(45):  # over two time limits
        actions = rng.uniform(-2, 2, (3, 1)).astype(np.float32)
        (obs, rewards, dones, infos), expected = three.step(actions), own.step(actions)
        np.testing.assert_array_equal(obs, expected[0])
        np.testing.assert_array_equal(rewards, expected[1])
        np.testing.assert_array_equal(dones, expected[2])
        for info, other in zip(infos, expected[3], strict=True):
            assert info.get("TimeLimit.truncated") == other.get("TimeLimit.truncated")
            np.testing.assert_array_equal(info.get("terminal_observation", 0), other.get("terminal_observation", 0))


def test_environments_may_write_into_their_actions():
    class Clipping(gym.Wrapper):
        def step(self, action: Any) -> Any:
            return super().step(np.clip(action, -0.5, 0.5, out=action))

    env = RayVecEnv([lambda: Clipping(gym.make("Pendulum-v1"))])
    env.reset()
    actions = np.ones((1, 1), np.float32)
    env.step(actions)
    env.close()
    assert actions == 1


def test_environments_may_write_into_what_they_are_given():
    class Keeping(gym.Wrapper):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            assert options is not None
            options["kept"] += 1
            return super().reset(seed=seed)

        def put(self, kept: np.ndarray) -> float:
            kept += 1
            return float(kept[0])

    env = RayVecEnv([lambda: Keeping(gym.make("Pendulum-v1"))])
    env.set_options({"kept": np.zeros(1000)})
    env.reset()
    assert env.env_method("put", np.full(1000, 4.0)) == [5.0]
    env.close()


def test_seeds_are_used_once(three: RayVecEnv):
    three.seed(3)
    assert not np.array_equal(three.reset(), three.reset())


def test_dict_observations_options_methods_and_an_error_that_comes_as_what_it_is():
    env = RayVecEnv([dict_env] * 3, envs_per_worker=2, num_cpus=0.5)
    env.set_options([{"n": 0}, {"n": 1}, {"n": 2}])
    assert env.reset()["a"].shape == (3, 2)
    assert [info["options"] for info in env.reset_infos] == [{"n": 0}, {"n": 1}, {"n": 2}]
    obs = env.step(np.array([[0.1], [0.2], [0.3]], np.float32))[0]
    np.testing.assert_allclose(obs["a"][:, 1], [0.1, 0.2, 0.3], rtol=1e-6)
    assert obs["b"].tolist() == [1, 1, 1]
    assert env.env_method("tell", "at", index=7, indices=[2, 0]) == ["at 7 0.3", "at 7 0.1"]
    assert env.has_attr("lock")
    assert not env.has_attr("key")
    with pytest.raises(ZeroDivisionError, match="through the floor"):
        env.step(np.array([[0.0], [1.0], [0.0]], np.float32))
    env.close()


def test_infos_of_resets_are_those_of_the_newest_episode(three: RayVecEnv):
    three.reset()
    first = list(three.reset_infos)
    for step in range(20):
        assert all(info is old for info, old in zip(three.reset_infos, first, strict=True)), step
        three.step(np.zeros((3, 1), np.float32))
    assert not any(info is old for info, old in zip(three.reset_infos, first, strict=True))


def test_attributes_are_those_of_the_environments_asked_for(three: RayVecEnv):
    three.reset()
    three.set_attr("g", 3.0, indices=[0, 2])
    assert three.get_attr("g") == [3.0, 10.0, 3.0]
    three.set_attr("g", 10.0)
    assert three.env_is_wrapped(OrderEnforcing, indices=2) == [True]
    assert three.env_is_wrapped(FlattenObservation) == [False] * 3
    assert [image.shape[-1] for image in three.get_images()] == [3, 3, 3]


def test_dreamer_learns_in_it_what_it_learns_in_sb3s_own(three: RayVecEnv):
    ours, own = (Dreamer("MlpPolicy", env, **SMALL).learn(150) for env in (three, DummyVecEnv([pendulum()] * 3)))
    assert ours._n_updates == own._n_updates >= 10
    for episode, other in zip(read_episodes(ours.replay_buffer), read_episodes(own.replay_buffer), strict=True):
        np.testing.assert_array_equal(episode.obs["obs"], other.obs["obs"])


def test_ppo_learns_in_it(three: RayVecEnv):
    assert PPO("MlpPolicy", three, n_steps=8, batch_size=24).learn(48).num_timesteps == 48


def test_a_worker_that_dies_is_named_and_the_agent_goes_on_with_others():
    env = RayVecEnv([pendulum()] * 2, envs_per_worker=2, num_cpus=0.5)
    model = Dreamer("MlpPolicy", env, **SMALL).learn(40)
    ray.kill(env.workers[0])
    with pytest.raises(RuntimeError, match="a worker of environments died"):
        model.learn(40, reset_num_timesteps=False)
    env.close()
    model.set_env(DummyVecEnv([pendulum()] * 2))
    assert model.learn(40, reset_num_timesteps=False).num_timesteps >= 80


def test_an_environment_that_cannot_be_made_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)could not be made.*Pendulun.*needs its packages"):
        RayVecEnv([lambda: gym.make("Pendulun-v1")], num_cpus=0.5)


@pytest.mark.parametrize(("number", "share"), [(0, 1), (2, 0)])
def test_senseless_numbers_are_refused(number: int, share: int):
    with pytest.raises(ValueError, match="both must be at least 1"):
        RayVecEnv([pendulum()] * number, envs_per_worker=share)


def test_what_the_cluster_cannot_give_is_said_before_it_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    with pytest.warns(UserWarning, match="1 workers with num_cpus=1 need more than the 0.5 CPUs left in the cluster"):
        RayVecEnv([pendulum()]).close()
