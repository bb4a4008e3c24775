"""From a teacher to Dreamer: who acts, what is imitated, and for how long."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import ARS, MaskablePPO, RecurrentPPO
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import Guard, hand_over, offline_training, warm_start
from sb3_dreamer.hybrid.cloning import Cloning, Labels, clone_on_frozen_features, expected_features
from sb3_dreamer.hybrid.external_policy import ExternalPolicy
from sb3_dreamer.imitation import NO_TEACHER
from sb3_dreamer.planning import Planner
from sb3_dreamer.replay import read_episodes
from sb3_dreamer.types import Batch
from tests.hybrid.agents import SMALL, pendulum


class Constant:
    """Always pushes with the same torque."""

    def __init__(self, action: float = 1.0) -> None:
        self.observation_space, self.action_space = pendulum().observation_space, pendulum().action_space
        self.action, self.seen = action, []

    def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        self.seen.append((obs, state, episode_start.copy()))
        return np.full((len(obs), 1), self.action, np.float32), ("memory", len(self.seen))


class Interrupted(Constant):
    """Is interrupted once, at the 41st query."""

    stopped = False

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.seen) == 40 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt
        return super().predict(*args, **kwargs)


class Camera(gym.Env):
    """A picture, channels last, and two numbers; episodes of ten steps."""

    observation_space = gym.spaces.Dict(
        camera=gym.spaces.Box(0, 255, (40, 40, 3), np.uint8), speed=gym.spaces.Box(-9, 9, (2,), np.float32)
    )
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.observation_space.sample(), 0.0, False, self.steps == 10, {}


def fresh(n_envs: int = 1, **kwargs: Any) -> Dreamer:
    return Dreamer("MlpPolicy", pendulum(n_envs), **{**SMALL, **kwargs})


class TestExperience:
    def test_each_agent_logs_to_a_tensorboard_folder_of_its_own(self, tmp_path):
        for agent in ("Dreamer_1", "Dreamer_2"):
            model = fresh(tensorboard_log=str(tmp_path)).warm_start(Constant(), 60, updates=0)
            model.learn(10, reset_num_timesteps=False)
            model.learn(10, reset_num_timesteps=False)
            assert model.logger.dir == str(tmp_path / agent)
        model.warm_start(Constant(), 60, updates=0)
        model.learn(10, reset_num_timesteps=False)
        assert sorted(folder.name for folder in tmp_path.iterdir()) == ["Dreamer_1", "Dreamer_2"]

    def test_the_teachers_steps_are_stored_and_counted(self):
        model = fresh(2).warm_start(Constant(), 120, updates=0, student_share=0)
        assert model.num_timesteps == 120
        episodes = list(read_episodes(model.replay_buffer))
        assert [len(e) for e in episodes] == [50, 9, 50, 9]
        assert all((e.action == 0.5).all() for e in episodes), "scaled: the torque limit is 2"
        assert model._online_state[1].tolist() == [[0.5], [0.5]], "the model remembers the actions that were taken"

    def test_its_memory_and_the_starts_of_episodes_are_handed_to_it(self):
        teacher = Constant()
        fresh().warm_start(teacher, 60, updates=0)
        assert [n for n, (_, _, start) in enumerate(teacher.seen) if start[0]] == [0, 50]
        assert [state for _, state, _ in teacher.seen[:2]] == [None, ("memory", 1)]

    def test_in_the_last_half_the_model_acts_itself(self):
        teacher = Constant()
        model = fresh(2, seed=0).warm_start(teacher, 120, updates=0)
        by_teacher = [e.action[:, 0] == 0.5 for e in read_episodes(model.replay_buffer)]
        assert [n.sum() for n in by_teacher] == [30, 0, 30, 0]
        assert all(n[:30].all() for n in by_teacher[::2])
        assert len(teacher.seen) == 60, "queried at each step all the same"

    def test_the_updates_are_spread_over_the_models_own_steps(self):
        updates = []

        class Counting(Constant):
            def predict(self, *args: Any, **kwargs: Any) -> Any:
                updates.append(model._n_updates)
                return super().predict(*args, **kwargs)

        model = fresh()
        model.warm_start(Counting(), 60, updates=30)
        assert updates[:30] == [0] * 30, "while the teacher acts"
        assert updates[30:] == [30 - steps_left // 2 for steps_left in range(30, 0, -1)]
        assert model._n_updates == 30

    def test_updates_are_what_the_steps_pay_for(self):
        model = fresh(train_ratio=8).warm_start(Constant(), 60)
        assert model._n_updates == 60 * 8 // (4 * 8)
        assert model.imitation.fade_updates == 2 * 60 * 8 // (4 * 8), "it fades over twice the steps"
        model.learn(4)
        assert model._n_updates == 60 * 8 // (4 * 8) + 1, "nothing more is owed"

    def test_learning_does_not_begin_with_random_actions(self):
        model = fresh(learning_starts=10_000).warm_start(Constant(), 60, updates=1)
        assert not model._exploring()


class TestImitation:
    def test_the_actor_becomes_the_teacher(self):
        model = fresh(learning_rate=3e-3, warmup_updates=0).warm_start(Constant(1.5), 200, updates=50)
        action, _ = model.predict(np.array([[1.0, 0.0, 0.0]], np.float32), deterministic=True)
        assert abs(action.item() - 1.5) < 0.3

    def test_its_weight_decays(self):
        model, nothing = fresh(), Labels(np.zeros(1, int), 1)

        def weights(fade_updates: int, after: list[int]) -> list[float]:
            teacher: Any = Constant()
            cloning = Cloning(teacher, model.policy.actor, nothing, 10, fade_updates, 0, 0, arguments=None)
            return [cloning.weight(n_updates) for n_updates in after]

        assert weights(20, [0, 10, 15, 20, 30, 99]) == [1, 1, 0.75, 0.5, 0, 0]
        assert weights(0, [9, 10]) == [1, 0]

    def test_what_the_teacher_does_not_teach_the_actor_learns_itself(self):
        teacher = Constant()
        model = fresh(actor_lr_scale=0.4).warm_start(teacher, 60, updates=4, fade_steps=40)
        rates = []
        for _ in range(6):
            model.train(1, 4)
            of_teacher = model.imitation.optimizer.param_groups[0]["lr"] if model.imitation is not NO_TEACHER else 0.0
            rates.append((of_teacher, model.policy.optimizer.param_groups[1]["lr_scale"]))
        assert len(teacher.seen) == 60, "updates alone do not query it"
        expected = [(1e-3 * share, 0.4 * (1 - share)) for share in (1, 0.75, 0.5, 0.25, 0, 0)]
        np.testing.assert_allclose(rates, expected, rtol=1e-6)

    def test_the_actor_imitates_once_for_each_update_of_the_warm_start_and_sixteen_times_for_each_after_it(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        steps: list[float] = []
        monkeypatch.setattr(Cloning, "gradient_step", lambda cloning, features, labels, weight: steps.append(weight))
        model = fresh().warm_start(Constant(), 60, updates=2)
        assert len(steps) == 2 + 60 // 4, "the last ones are the final updates"
        model.train(3, 4)
        assert len(steps) == 2 + 60 // 4 + 3 * 16
        model.imitation.imitate(model, 0.0)
        assert len(steps) == 2 + 60 // 4 + 3 * 16

    def test_the_teacher_is_queried_until_its_weight_is_zero(self):
        teacher = Constant()
        model = fresh(train_ratio=4).warm_start(teacher, 60, updates=4, fade_steps=32)  # 8 steps are worth an update
        first = model.imitation.labels.since[0]
        model.learn(31, reset_num_timesteps=False)
        assert len(teacher.seen) == 91
        labeled = np.isfinite(model.imitation.labels.lookup(np.array([[0]]), np.arange(first + 100)[None])[0, :, 0])
        steps = [*range(50), *range(51, 61), *range(61, 92)]  # 50: the end of an episode
        np.testing.assert_array_equal(np.flatnonzero(labeled), np.add(first, steps))
        model.learn(40, reset_num_timesteps=False)
        assert (model.imitation, len(teacher.seen)) == (NO_TEACHER, 100)

    def test_labels_are_found_by_environment_and_entry(self):
        labels = Labels(np.array([5, 2000]), 1)
        labels.add(np.array([5, 2000]), np.array([[0.1], [0.2]], np.float32))
        # long after: the agent learned in between
        labels.add(np.array([6, 13500]), np.array([[0.3], [0.4]], np.float32))
        known = labels.lookup(np.array([[0], [1], [1]]), np.array([[4, 5, 6], [2000, 2001, 13500], [0, 10**6, 2000]]))
        nan = np.nan
        np.testing.assert_array_equal(
            known[..., 0], np.array([[nan, 0.1, 0.3], [0.2, nan, 0.4], [nan, nan, 0.2]], np.float32)
        )

    def test_the_teacher_labels_every_step_whether_it_or_the_model_acts(self):
        model = fresh().learn(60)
        model.warm_start(Constant(), 60, updates=1)
        first = model.imitation.labels.since[0]
        labeled = np.isfinite(model.imitation.labels.lookup(np.array([[0]]), np.arange(first + 100)[None])[0, :, 0])
        steps = [*range(first, first + 50), *range(first + 51, first + 61)]  # between them the end of an episode
        np.testing.assert_array_equal(np.flatnonzero(labeled), steps)

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_the_teacher_labels_without_exploration_unless_it_is_told_to_explore(self, deterministic: bool):
        given = []

        class Noted(Constant):
            def predict(self, *args: Any) -> Any:
                given.append(args[-1])
                return super().predict(*args)

        settings = {} if deterministic else {"deterministic": False}
        fresh().warm_start(Noted(), 60, updates=0, **settings)
        assert given == [deterministic] * 60

    def test_labeled_features_are_those_of_the_entries_at_which_the_teacher_was_queried(self):
        model = fresh().learn(60)
        model.warm_start(Constant(), 60, updates=0)
        features, labels = model.imitation.labeled_features(model, 8)
        assert 8 * 4 * 7 < len(features) < 8 * 4 * 8, "all but the ends of episodes, and of learn() no sequence"
        assert features.shape == (len(labels), model.policy.world_model.feature_width)
        th.testing.assert_close(labels, th.full((len(features), 1), 0.5))

    def test_what_the_replay_held_before_is_not_sampled_for_them(self):
        model = fresh(learning_starts=400).learn(400)
        model.warm_start(Constant(), 60, updates=0)
        queue = list(model.replay_buffer._rings._queue)
        features, _ = model.imitation.labeled_features(model, 8)
        assert len(features) > 8 * 4 * 7
        assert list(model.replay_buffer._rings._queue) == queue, "what the world model is to see next stays so"

    def test_a_gradient_step_raises_the_likelihood_of_the_labels_and_changes_nothing_without_labels(self):
        model = fresh().warm_start(Constant(), 60, updates=0)
        cloning, actor = model.imitation, model.policy.actor
        features, labels = cloning.labeled_features(model, 1)

        def likelihood() -> float:
            with th.no_grad():
                return actor(features).log_prob(labels).mean().item()

        before = likelihood()
        cloning.gradient_step(features[:0], labels[:0], 1.0)
        assert likelihood() == before
        cloning.gradient_step(features, labels, 1.0)
        assert likelihood() > before
        assert all(p.grad is None for p in model.policy.world_model.parameters())

    @pytest.mark.parametrize("rssm_type", ["gru", "transformer"])
    def test_the_features_are_those_of_a_deterministic_policy(self, rssm_type: str):
        model = fresh(rssm_type=rssm_type).learn(60)
        obs, starts = np.random.default_rng(0).normal(size=(7, 1, 3)).astype(np.float32), np.arange(7) % 4 == 0
        state, seen, taken = None, [], [np.zeros(1, np.float32)]
        for t in range(7):  # an episode of four steps, and three of the next
            _, state = model.predict(obs[t], state, episode_start=starts[t : t + 1], deterministic=True)
            seen.append(state[0][0, : model.policy.world_model.feature_width])
            taken.append(np.zeros(1, np.float32) if starts[(t + 1) % 7] else state[1][0])
        entries = th.zeros(1, 7)
        batch = Batch(
            obs={"obs": th.as_tensor(obs.swapaxes(0, 1))},
            prev_action=th.as_tensor(np.stack(taken[:7]))[None],
            reward=entries,
            is_first=th.as_tensor(starts)[None],
            is_terminal=entries.bool(),
            is_last=entries.bool(),
            start=th.ones(1, model.policy.world_model.rssm.latent_width),
            index=np.zeros((1, 2), int),
        )
        with th.no_grad():
            th.testing.assert_close(expected_features(model, batch)[0], th.as_tensor(np.stack(seen)))

    @pytest.mark.parametrize("updates", [2, 10])
    def test_the_number_of_final_updates_follows_from_the_labels_not_from_the_updates(self, updates: int):
        assert fresh().warm_start(Constant(), 60, updates=updates).imitation.final_updates_done == 60 // 4

    def test_the_final_updates_change_the_actor_and_nothing_else(self):
        model = fresh().warm_start(Constant(), 60, updates=0)
        features, labels = model.imitation.labeled_features(model, 2)
        before = {name: p.clone() for name, p in model.policy.named_parameters()}

        def error() -> float:
            with th.no_grad():
                return -model.policy.actor(features).log_prob(labels).mean().item()

        untaught = error()
        model.imitation.final_updates = 100
        clone_on_frozen_features(model, model.imitation)
        assert error() < untaught - 0.2
        assert model.imitation.final_updates_done == 100
        moved = {name.split(".")[0] for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
        assert (moved, model._n_updates) == ({"actor"}, 0)

    def test_a_saved_model_has_nothing_left_to_imitate(self, tmp_path: Path):
        fresh().warm_start(Constant(), 60, updates=1).save(tmp_path / "model")
        assert Dreamer.load(tmp_path / "model").imitation is NO_TEACHER


class TestTeachers:
    @pytest.mark.parametrize(
        ("algorithm", "policy", "settings"),
        [
            (SAC, "MlpPolicy", dict(buffer_size=100)),
            (PPO, "MlpPolicy", dict(n_steps=16, batch_size=16)),
            (RecurrentPPO, "MlpLstmPolicy", dict(n_steps=16, batch_size=16, policy_kwargs=dict(lstm_hidden_size=8))),
        ],
    )
    def test_a_file_acts_as_the_model_does(self, tmp_path: Path, algorithm: Any, policy: str, settings: Any):
        teacher = algorithm(policy, pendulum(), seed=0, device="cpu", **settings)
        teacher.save(tmp_path / "teacher")
        actions = []
        for given in (teacher, tmp_path / "teacher.zip"):
            model = fresh().warm_start(given, 60, deterministic=True, updates=0, student_share=0)
            actions.append(np.concatenate([e.action for e in read_episodes(model.replay_buffer)]))
        np.testing.assert_array_equal(*actions)

    def test_a_normalized_teacher_sees_what_it_was_trained_on(self, tmp_path: Path):
        env = VecNormalize(pendulum())
        teacher = PPO("MlpPolicy", env, n_steps=16, batch_size=16, seed=0, device="cpu").learn(16)
        teacher.save(tmp_path / "ppo")
        env.save(str(tmp_path / "vecnormalize.pkl"))
        with pytest.raises(ValueError, match="cannot act without its statistics"):
            fresh().warm_start(tmp_path / "ppo.zip", 60)
        model = fresh()
        path = tmp_path / "vecnormalize.pkl"
        model.warm_start(tmp_path / "ppo.zip", 60, vec_normalize=path, deterministic=True, updates=0, student_share=0)
        first = next(read_episodes(model.replay_buffer))
        expected = teacher.predict(env.normalize_obs(first.obs["obs"][:-1]), deterministic=True)[0]
        np.testing.assert_allclose(2 * first.action, expected, atol=1e-5)

    @pytest.mark.parametrize("wide", [False, True])
    def test_an_off_policy_one_reveals_it_by_the_type_of_what_it_saw_or_by_its_size(self, tmp_path: Path, wide: bool):
        def one() -> gym.Env:
            env = gym.make("Pendulum-v1", max_episode_steps=50)
            if not wide:
                return env
            space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
            return gym.wrappers.TransformObservation(env, lambda obs: obs.astype(np.float64), space)

        for given, right in ((VecNormalize(DummyVecEnv([one])), False), (DummyVecEnv([one]), True)):
            SAC("MlpPolicy", given, buffer_size=100, seed=0, device="cpu").learn(52).save(tmp_path / "sac")
            model = Dreamer("MlpPolicy", one(), **SMALL)
            if right:
                assert model.warm_start(tmp_path / "sac.zip", 60, updates=0).num_timesteps == 60
                continue
            with pytest.raises(ValueError, match="cannot act without its statistics"):
                model.warm_start(tmp_path / "sac.zip", 60)
            model.warm_start(tmp_path / "sac.zip", 60, vec_normalize=False, updates=0)
            assert model.num_timesteps == 60

    def test_an_off_policy_one_with_its_environment_is_not_guessed_about(self):
        """Its observations may exceed the bounds of their space without any normalization."""

        class Beyond(gym.Env):
            observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

            def reset(self, **kwargs: Any) -> Any:
                return np.array([0.0, 1.5], np.float32), {}

            def step(self, action: Any) -> Any:
                return np.array([0.0, 1.5], np.float32), 0.0, False, False, {}

        sac = SAC("MlpPolicy", Beyond(), buffer_size=100, learning_starts=100, device="cpu").learn(20)
        assert Dreamer("MlpPolicy", Beyond(), **SMALL).warm_start(sac, 60, updates=0).num_timesteps == 60

    @pytest.mark.parametrize("dimension", [0, 1])
    def test_one_that_returns_nan_is_named_and_the_actor_stays_as_it_is(self, dimension: int):
        box = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

        class Broken:
            queries = 0

            def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: Any = None) -> Any:
                self.queries += 1
                action = np.ones((len(obs), 2), np.float32)
                if self.queries == 45:
                    action[0, dimension] = np.nan
                return action, None

        env = gym.wrappers.TransformAction(pendulum().envs[0], lambda action: action[:1], box)
        model = Dreamer("MlpPolicy", env, **SMALL)
        with pytest.raises(ValueError, match=r"the teacher's predict\(\) returned NaN"):
            model.warm_start(Broken(), 60, updates=20)
        assert all(p.isfinite().all() for p in model.policy.actor.parameters())

    @pytest.mark.parametrize(
        ("space", "returned", "expected"),
        [
            (gym.spaces.Box(0, 9, (1,), np.int64), 2.9, [[3]]),
            (gym.spaces.Box(0, 9, (1,), np.int64), np.inf, [[9]]),
            (gym.spaces.Discrete(3), 2.0, [2]),
            (gym.spaces.Discrete(3), 1.5, None),
            (gym.spaces.Discrete(3), 3, None),
            (gym.spaces.Discrete(3), np.nan, None),
            (gym.spaces.MultiDiscrete([2, 3]), 1, [[1, 1]]),
            (gym.spaces.MultiDiscrete([2, 3]), 2, None),
            (gym.spaces.MultiBinary(2), True, [[1, 1]]),
            (gym.spaces.MultiBinary(2), 0.5, None),
        ],
    )
    def test_what_it_returns_are_actions_of_the_space_or_it_is_named(self, space: Any, returned: Any, expected: Any):
        class Env(gym.Env):
            observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), space

        class Returning:
            def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: Any = None) -> Any:
                return np.full((1, *space.shape), returned), None

        policy = ExternalPolicy(Dreamer("MlpPolicy", Env(), **SMALL), Returning(), None, deterministic=True)
        if expected is None:
            with pytest.raises(ValueError, match=r"the teacher's predict\(\) returned"):
                policy.predict(np.zeros((1, 2), np.float32), None, None)
        else:
            actions, _ = policy.predict(np.zeros((1, 2), np.float32), None, None)
            assert (actions.tolist(), actions.dtype) == (expected, space.dtype)

    def test_another_dreamer_observes_the_actions_of_the_student(self, monkeypatch: pytest.MonkeyPatch):
        teacher, model, seen = fresh(seed=5), fresh(), []
        predict = teacher.predict

        def noted(obs, state, *args):
            seen.append(None if state is None else state[1])
            return predict(obs, state, *args)

        monkeypatch.setattr(teacher, "predict", noted)
        model.warm_start(teacher, 40, updates=0).learn(5, reset_num_timesteps=False)
        taken = model.replay_buffer._storage.arrays["action"][:44]
        assert len(seen) == 45
        np.testing.assert_allclose(np.concatenate(seen[1:40]), taken[:39], atol=1e-6)

    @pytest.mark.parametrize("saved", [False, True])
    def test_another_dreamer_is_a_teacher_too(self, saved: bool, tmp_path: Path):
        teacher: Any = Dreamer("MlpPolicy", pendulum(), **{**SMALL, "seed": 3}).learn(60)
        obs = pendulum().reset()
        expected = teacher.predict(obs, deterministic=True)[0]
        if saved:
            teacher.save(tmp_path / "teacher")
            teacher = tmp_path / "teacher"
        policy = ExternalPolicy(fresh(), teacher, None, deterministic=True)
        actions, memory = policy.predict(obs, None, np.array([True]))
        np.testing.assert_array_equal(actions, expected)
        assert memory is not None
        assert fresh().warm_start(teacher, 60, updates=0, student_share=0).num_timesteps == 60

    @pytest.mark.parametrize("policy", ["LinearPolicy", "MlpPolicy"])
    def test_a_file_of_ars_acts_as_the_model_does(self, tmp_path: Path, policy: str):
        teacher = ARS(policy, pendulum(), n_delta=1, seed=0, device="cpu").learn(200)
        teacher.save(tmp_path / "ars")
        obs = pendulum().reset()
        policy = ExternalPolicy(fresh(), tmp_path / "ars.zip", None, deterministic=True)
        np.testing.assert_array_equal(policy.predict(obs, None, None)[0], teacher.predict(obs)[0])

    def test_a_loaded_model_reveals_whether_its_environment_was_normalized(self, tmp_path: Path):
        teacher = PPO("MlpPolicy", VecNormalize(pendulum()), n_steps=16, batch_size=16, device="cpu").learn(16)
        teacher.save(tmp_path / "ppo")
        with pytest.raises(ValueError, match="cannot act without its statistics"):
            fresh().warm_start(PPO.load(tmp_path / "ppo", env=pendulum()), 60)

    def test_a_file_of_dreamer_says_whether_it_learned_normalized(self, tmp_path: Path):
        env = VecNormalize(pendulum())
        Dreamer("MlpPolicy", env, **SMALL).learn(80).save(tmp_path / "teacher")
        with pytest.raises(ValueError, match="cannot act without its statistics"):
            fresh().warm_start(tmp_path / "teacher", 60)
        assert ExternalPolicy(fresh(), tmp_path / "teacher", env, deterministic=True).normalize is env

    def test_one_that_chooses_among_allowed_actions_is_refused(self):
        env = ActionMasker(gym.make("CartPole-v1"), lambda _: np.ones(2, bool))
        model = Dreamer("MlpPolicy", env, **SMALL)
        with pytest.raises(ValueError, match="Dreamer has no masks"):
            model.warm_start(MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=16, device="cpu"), 60)

    def test_statistics_of_another_environment_are_refused(self, tmp_path: Path):
        VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")])).save(str(tmp_path / "vecnormalize.pkl"))
        with pytest.raises(ValueError, match="the teacher's statistics are of other observations than Box"):
            fresh().warm_start(Constant(), 60, vec_normalize=tmp_path / "vecnormalize.pkl")

    def test_what_is_no_vecnormalize_holds_no_statistics(self, tmp_path: Path):
        (tmp_path / "vecnormalize.pkl").write_bytes(pickle.dumps({"mean": 0.0}))
        with pytest.raises(ValueError, match="the teacher's statistics are a dict: give a VecNormalize"):
            fresh().warm_start(Constant(), 60, vec_normalize=tmp_path / "vecnormalize.pkl")

    def test_one_that_sees_images_too_is_normalized_as_sb3_wraps_them(self, tmp_path: Path):
        """SB3 transposes images outside of the VecNormalize that it is given, Dreamer inside of its own."""
        ppo = PPO("MultiInputPolicy", VecNormalize(DummyVecEnv([Camera]), norm_obs_keys=["speed"]), 3e-4, 16, 16)
        ppo.learn(16)
        ppo.save(tmp_path / "ppo")
        ppo.get_vec_normalize_env().save(str(tmp_path / "vecnormalize.pkl"))
        model = Dreamer("MultiInputPolicy", DummyVecEnv([Camera]), **SMALL)
        seen = {"camera": np.ones((1, 3, 40, 40), np.uint8), "speed": np.ones((1, 2), np.float32)}
        shown = ppo.get_vec_normalize_env().normalize_obs(seen)
        assert not np.array_equal(shown["speed"], seen["speed"])
        for teacher, statistics in ((ppo, None), (tmp_path / "ppo", tmp_path / "vecnormalize.pkl")):
            policy = ExternalPolicy(model, teacher, statistics, deterministic=True)
            actions, _ = policy.predict(seen, None, np.array([True]))
            np.testing.assert_allclose(actions, ppo.predict(shown, deterministic=True)[0], rtol=1e-5)

    def test_a_file_of_dreamer_does_not_bring_its_seed(self, tmp_path: Path):
        fresh(seed=7).save(tmp_path / "teacher")
        drawn = []
        for seed in (1, 2):
            ExternalPolicy(fresh(seed=seed), tmp_path / "teacher", None, deterministic=True)
            drawn.append(th.rand(1).item())
        assert drawn[0] != drawn[1]

    @pytest.mark.parametrize("kind", [Planner, Guard])
    def test_what_acts_with_a_dreamer_observes_actions_too_and_sees_the_units_that_it_was_trained_with(self, kind: Any):
        other = fresh(seed=5)
        other.set_env(VecNormalize(pendulum()))
        teacher = Planner(other) if kind is Planner else Guard(other, Constant(), horizon=2)
        policy = ExternalPolicy(fresh(), teacher, None, deterministic=True)
        assert policy.normalize is other.get_vec_normalize_env()
        _, memory = policy.predict(pendulum().reset(), None, np.array([True]))
        new_memory = policy.with_action(memory, np.array([[1.0]], np.float32))
        assert new_memory[1].tolist() == [[0.5]], "scaled: the torque limit is 2"
        assert np.array_equal(new_memory[0], memory[0])
        assert type(new_memory) is type(memory)
        elsewhere = Dreamer("MlpPolicy", "MountainCarContinuous-v0", **SMALL)
        with pytest.raises(ValueError, match="the teacher's observations are Box"):
            ExternalPolicy(elsewhere, teacher, False, deterministic=True)

    def test_statistics_that_were_not_used_are_not_needed(self, tmp_path: Path):
        env = VecNormalize(pendulum(), norm_obs=False)
        PPO("MlpPolicy", env, n_steps=16, batch_size=16, seed=0, device="cpu").learn(16).save(tmp_path / "ppo")
        assert fresh().warm_start(tmp_path / "ppo.zip", 60, vec_normalize=False, updates=0).num_timesteps == 60


class TestInterrupted:
    @pytest.mark.parametrize(("another", "n_steps"), [(False, 70), (True, 60)])
    def test_another_call_starts_over(self, another: bool, n_steps: int):
        model, teacher = fresh(), Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model.warm_start(teacher, 60, updates=2)
        model.warm_start(Constant() if another else teacher, n_steps, updates=3)
        assert (model.num_timesteps, model._n_updates) == (40 + n_steps, 2 + 3)
        assert np.isfinite(model.imitation.labels.table).sum() == n_steps

    def test_a_teacher_that_fails_while_the_agent_learns_is_forgotten(self):
        class Dying(Constant):
            def predict(self, *args: Any, **kwargs: Any) -> Any:
                if len(self.seen) == 70:
                    raise OSError("the controller is gone")
                return super().predict(*args, **kwargs)

        model = fresh().warm_start(Dying(), 60, updates=2)
        with pytest.raises(RuntimeError, match=r"failed at environment step 70: OSError\('the controller is gone'\)"):
            model.learn(30, reset_num_timesteps=False)
        assert model.imitation is NO_TEACHER
        assert model.learn(30, reset_num_timesteps=False).num_timesteps == 100

    def test_the_same_call_takes_what_is_missing(self):
        model, teacher = fresh(), Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model.warm_start(teacher, 60, updates=6)
        assert (model.num_timesteps, model._n_updates) == (40, 4)
        assert np.isnan(model.imitation.labels.table).sum() == model.imitation.labels.table.size - 40
        model.warm_start(teacher, 60, updates=6)
        assert (model.num_timesteps, model._n_updates) == (60, 6)
        assert [len(e) for e in read_episodes(model.replay_buffer)] == [39, 19]

    def test_what_the_agent_does_in_between_is_labeled_too(self):
        model, teacher = fresh(), Interrupted()
        with pytest.raises(KeyboardInterrupt):
            model.warm_start(teacher, 60, updates=20)
        before = model._n_updates
        model.learn(30, reset_num_timesteps=False)
        assert 2 <= model._n_updates - before <= 3, "not those that the warm start would pay for"
        assert model.imitation.weight(model._n_updates) == 1, "the warm start is not finished"
        model.warm_start(teacher, 60, updates=20)
        assert np.isfinite(model.imitation.labels.table).sum() == 90

    def test_a_schedule_that_has_run_out_starts_again(self):
        model = fresh(learning_rate=lambda remaining: 1e-3 * remaining).learn(60)
        model.warm_start(Constant(), 60, updates=2)
        assert model.policy.optimizer.param_groups[0]["lr"] == 1e-3


class TestRefused:
    def test_before_any_work(self):
        model = fresh()
        with pytest.raises(ValueError, match="the teacher's observations are"):
            model.warm_start(DQN("MlpPolicy", gym.make("CartPole-v1"), buffer_size=10, device="cpu"), 60)
        for bad in (None, object()):
            with pytest.raises(TypeError, match=r"has no predict\(\)"):
                model.warm_start(bad, 60)
        with pytest.raises(TypeError, match="the teacher is the class PPO: give a trained model of it"):
            model.warm_start(PPO, 60)
        with pytest.raises(
            ValueError, match="n_steps=7 makes no sequence of batch_length=8 in each of 1 environments: give 8 or more"
        ):
            model.warm_start(Constant(), 7)
        with pytest.raises(
            ValueError,
            match="n_steps=15 makes no sequence of batch_length=8 in each of 2 environments: give 16 or more",
        ):
            fresh(2).warm_start(Constant(), 15)
        for name in ("updates", "fade_steps"):
            with pytest.raises(ValueError, match=f"{name}=-3 must be a whole number of at least 0"):
                model.warm_start(Constant(), 60, **{name: -3})
        with pytest.raises(ValueError, match="student_share=1 must be at least 0 and below 1"):
            model.warm_start(Constant(), 60, student_share=1)
        assert model.replay_buffer.size() == 0

    def test_without_the_libraries_for_the_progress_bar_nothing_is_started(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("sb3_dreamer.hybrid.progress.tqdm", None)
        model = fresh()
        with pytest.raises(ImportError, match="progress_bar=True needs tqdm and rich"):
            model.warm_start(Constant(), 60, progress_bar=True)
        assert model.imitation is NO_TEACHER

    def test_statistics_out_of_a_damaged_file(self, tmp_path: Path):
        (tmp_path / "vecnormalize.pkl").write_bytes(b"not a pickle")
        with pytest.raises(ValueError, match=r"vecnormalize.pkl is damaged or no statistics of VecNormalize"):
            fresh().warm_start(Constant(), 60, vec_normalize=tmp_path / "vecnormalize.pkl")

    def test_without_environment(self, tmp_path: Path):
        fresh().save(tmp_path / "model")
        with pytest.raises(ValueError, match="needs an environment"):
            Dreamer.load(tmp_path / "model").warm_start(Constant(), 60)

    def test_pretraining_on_nothing(self):
        with pytest.raises(ValueError, match="needs experience, and the replay holds 0 entries"):
            fresh().pretrain(1)


def test_another_replay_has_nothing_of_the_teacher(tmp_path: Path):
    other = fresh().learn(80)
    other.save_replay_buffer(tmp_path / "replay")
    model = fresh().warm_start(Constant(), 60, updates=2)
    model.load_replay_buffer(tmp_path / "replay")
    assert model.imitation is NO_TEACHER


def test_progress_counts_every_step_update_and_final_update(monkeypatch: pytest.MonkeyPatch):
    steps: list[int] = []

    @contextmanager
    def noted(total: int, what: str, shown: bool) -> Iterator[Any]:
        assert shown
        steps.append(total)
        yield lambda done: steps.append(-done)

    for module in (warm_start, offline_training, hand_over):
        monkeypatch.setattr(module, "progress", noted)
    model = fresh().warm_start(Constant(), 60, updates=20, progress_bar=True)
    assert (steps[0], sum(steps)) == (60 + 20 + 60 // 4, 0)
    steps.clear()
    model.pretrain(20, progress_bar=True)
    assert steps == [20, -16, -4]
    steps.clear()
    model.to_model_free(SAC, updates=3, critic_updates=2, buffer_size=100, progress_bar=True)
    assert steps == [5, *[-1] * 5]


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_a_bar_is_drawn(capsys: pytest.CaptureFixture):
    fresh().warm_start(Constant(), 60, updates=2, progress_bar=True)
    assert "warm start" in capsys.readouterr().out


def test_pretraining_takes_no_step():
    model = fresh().warm_start(Constant(), 60, updates=0)
    model.imitation = NO_TEACHER
    before = [p.clone() for p in model.policy.actor.parameters()]
    model.pretrain(3)
    assert (model._n_updates, model.num_timesteps) == (3, 60)
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.actor.parameters()))
