"""From Dreamer to SB3: what the model-free algorithm receives, and that SB3 alone can continue with it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import TQC, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.hybrid import LatentVecEnv, hand_over
from sb3_dreamer.hybrid import real_states as module_of_states
from sb3_dreamer.hybrid.distillation import ActionValues, DistillationTargets, action_values, distillation_targets
from sb3_dreamer.hybrid.hand_over import fill_replay
from sb3_dreamer.hybrid.real_states import dream_returns, imagined_observations, real_states, unpacked
from sb3_dreamer.hybrid.students import FINAL_RATE, LEARNING_RATE, SLOW_START, fit, start_slowly, teach, teach_critics
from sb3_dreamer.replay import Episode, read_episodes
from tests.hybrid.agents import SMALL, pendulum

NET = dict(net_arch=[32, 32])
QUICK: dict[str, Any] = dict(updates=5, critic_updates=2, buffer_size=1000, batch_size=16, policy_kwargs=NET)


class Short(gym.Wrapper):
    """Pendulum of a single step that reports the options of its reset."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1", max_episode_steps=1))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed)[0], {"options": options}


def episode(first: int, length: int, terminal: bool) -> Episode:
    obs = np.arange(first, first + length + 1, dtype=np.float32)[:, None]
    return Episode({"obs": obs}, np.full((length, 1), 0.1, np.float32), obs[1:, 0], terminal)


def line_buffer(n_envs: int, kind: type[ReplayBuffer] = ReplayBuffer, **kwargs: Any) -> ReplayBuffer:
    line, stick = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1, 1, (1,), np.float32)
    return kind(20 * n_envs, line, stick, "cpu", n_envs=n_envs, **kwargs)


def smooth_targets(n: int) -> DistillationTargets:
    """Observations like Pendulum's, actions that depend on them, a standard deviation of 0.2."""
    rng = np.random.default_rng(n)
    obs = rng.uniform(-1, 1, (n, 3)).astype(np.float32)
    mean = th.tanh(th.as_tensor(obs @ np.array([[1.0], [-1.0], [0.5]], np.float32)))
    nothing = th.zeros(n)
    return DistillationTargets({"obs": obs}, mean, th.full((n, 1), 0.2), nothing)


def random_values(n: int, spread: float, mean: float = -5) -> ActionValues:
    """In n states four actions, one worth 3 more than another that is smaller by 1; the mean of all is random."""
    action = th.rand(n, 4, 1) * 2 - 1
    obs = np.random.default_rng(n).uniform(-1, 1, (n, 3)).astype(np.float32)
    return ActionValues({"obs": obs}, action, 3 * action[..., 0] + mean + spread * th.randn(n, 1))


class TestCritics:
    @pytest.mark.parametrize("algorithm", [SAC, TD3, TQC, CrossQ])
    def test_they_learn_the_values_of_actions_whatever_the_rate_of_the_student(self, dreamer: Dreamer, algorithm: Any):
        student = dreamer.to_model_free(algorithm, **QUICK, learning_rate=1e-9)
        targets = random_values(2000, spread=0.0, mean=1000.0)
        teach_critics(student, targets, 2000)
        obs = targets.obs_for(student.policy, slice(None))
        with th.no_grad():
            predicted = student.critic(obs, targets.action[:, 0])
        for values in predicted.unbind(1) if algorithm is TQC else predicted:  # (n, 1), TQC's quantiles (n, .)
            assert float((values.mean(1) - targets.value[:, 0]).square().mean()) < 0.05 * 3.0

    def test_their_rate_falls_to_almost_nothing_so_that_the_last_minibatches_do_not_decide(self):
        weight = th.nn.Parameter(th.zeros(()))
        path: list[float] = []
        fit(
            [weight],
            lambda _: weight,
            random_values(100, 0.0).minibatches(200, 10),
            200,
            lambda _: path.append(weight.item()),
        )
        rates = -np.diff(path, prepend=0.0)  # Adam's steps under a constant gradient
        np.testing.assert_allclose(rates[0], LEARNING_RATE, rtol=1e-3)
        np.testing.assert_allclose(rates[-1], LEARNING_RATE * FINAL_RATE, rtol=0.5)
        assert (np.diff(rates) < 0).all()

    @pytest.mark.parametrize("mean", [-5, 1000], ids="mean {}".format)
    def test_differences_between_actions_are_learned_even_if_states_cannot_be_distinguished(
        self, dreamer: Dreamer, mean: float
    ):
        sac = dreamer.to_model_free(SAC, **QUICK)
        targets = random_values(2000, spread=5.0, mean=mean)
        teach_critics(sac, targets, 1000)
        obs = targets.obs_for(sac.policy, slice(None))
        with th.no_grad():
            low, high = (sac.critic(obs, th.full((2000, 1), a))[0].mean() for a in (-0.5, 0.5))
        assert abs(high - low - 3.0) < 0.3
        assert abs(high + low - 2 * mean) < 1.0

    def test_without_updates_critics_and_value_functions_stay_as_sb3_makes_them(self, dreamer: Dreamer):
        for algorithm, none in ((SAC, dict(QUICK, critic_updates=0)), (PPO, dict(updates=0, n_steps=32))):
            handed_over = dreamer.to_model_free(algorithm, **none, seed=3)
            fresh = algorithm("MlpPolicy", pendulum(), seed=3, device="cpu", policy_kwargs=handed_over.policy_kwargs)
            for name, value in fresh.policy.state_dict().items():
                if name.startswith(("critic.", "value_net.")):
                    assert th.equal(value, handed_over.policy.state_dict()[name]), name

    def test_critics_of_an_unknown_form_are_refused_before_any_work(self, dreamer: Dreamer, monkeypatch):
        class OneNetwork(th.nn.Module):
            """Not a list of q_networks."""

        class Mine(SAC):
            """An algorithm of somebody's own."""

            def _create_aliases(self) -> None:
                super()._create_aliases()
                self.critic = OneNetwork()

        monkeypatch.setattr(hand_over, "real_states", None)
        with pytest.raises(ValueError, match="Mine cannot take over from Dreamer"):
            dreamer.to_model_free(Mine, **QUICK)

    def test_targets_are_what_was_taught(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, **QUICK)
        for name, value in sac.critic.state_dict().items():
            assert th.allclose(value, sac.critic_target.state_dict()[name], atol=1e-6)

    def test_dreamers_own_action_comes_first_and_values_are_deterministic(self, dreamer: Dreamer):
        real = real_states(dreamer, 100)
        targets = action_values(dreamer, real, 0.9, on_latents=False)
        assert targets.action.shape == (len(targets), 4, 1)
        assert targets.action.abs().max() <= 1.0
        row = {tuple(obs): i for i, obs in enumerate(real.obs["obs"])}
        start = unpacked(dreamer, real.packed[[row[tuple(obs)] for obs in targets.obs["obs"]]])
        own = dreamer.policy.actor(start.features).mode()
        np.testing.assert_allclose(targets.action[:, 0], own.detach(), atol=1e-6)
        value = dream_returns(dreamer, start, 0.9, sample=False)[1][:, 0]
        np.testing.assert_allclose(targets.value[:, 0], value, rtol=1e-2, atol=1e-2)


class TestSlowStart:
    @pytest.mark.parametrize("algorithm", [SAC, TD3, TQC, CrossQ])
    def test_the_actors_first_steps_are_small_the_critics_are_not_and_sb3_alone_keeps_that(
        self, dreamer: Dreamer, algorithm: Any, tmp_path: Path
    ):
        dreamer.to_model_free(algorithm, env=pendulum(), **QUICK, seed=0).save(tmp_path / "student")
        student = algorithm.load(tmp_path / "student", env=pendulum())
        student.learning_rate, student.lr_schedule = 1e-3, lambda _: 1e-3
        parts = student.actor, student.critic
        before = [copy.deepcopy([p.detach() for p in part.parameters()]) for part in parts]
        student.learn(30, reset_num_timesteps=False)
        actor, critic = (
            float(
                th.cat([(p.detach() - q).abs().flatten() for p, q in zip(part.parameters(), old, strict=True)]).mean()
            )
            for part, old in zip(parts, before, strict=True)
        )
        assert 0 < actor < 10 * critic / SLOW_START
        assert critic > 1e-3

    @pytest.mark.parametrize("algorithm", [SAC, CrossQ])
    def test_nothing_has_moved_and_no_update_is_counted(self, dreamer: Dreamer, algorithm: Any):
        student = dreamer.to_model_free(algorithm, **QUICK, learning_rate=0.5)
        before = copy.deepcopy([part.state_dict() for part in (student.actor, student.critic)])
        start_slowly(student)
        assert student._n_updates == 0
        assert all(th.equal(value, before[0][name]) for name, value in student.actor.state_dict().items())
        assert all(th.equal(value, before[1][name]) for name, value in student.critic.named_parameters())

    def test_amsgrad_which_never_forgets_is_left_as_it_is(self, dreamer: Dreamer):
        net = dict(net_arch=[16], optimizer_kwargs=dict(amsgrad=True))
        sac = dreamer.to_model_free(SAC, **{**QUICK, "policy_kwargs": net})
        states = list(sac.actor.optimizer.state.values())
        assert states
        assert all(state["step"] < 1000 and state["exp_avg_sq"].max() < 1000 for state in states)

    def test_another_optimizer_than_adam_is_left_as_it_is(self, dreamer: Dreamer):
        net = dict(net_arch=[16], optimizer_class=th.optim.SGD)
        sac = dreamer.to_model_free(SAC, **{**QUICK, "policy_kwargs": net})
        sac.learn(5, reset_num_timesteps=False)
        assert sac.num_timesteps == dreamer.num_timesteps + 6


class TestTransitions:
    def test_next_observations_ends_and_time_limits(self):
        buffer = line_buffer(1)
        fill_replay(buffer, [episode(0, 2, terminal=True), episode(10, 2, terminal=False)])
        assert buffer.observations[:4].flatten().tolist() == [0, 1, 10, 11]
        assert buffer.next_observations[:4].flatten().tolist() == [1, 2, 11, 12]
        assert buffer.rewards[:4].flatten().tolist() == [1, 2, 11, 12]
        assert buffer.dones[:4].flatten().tolist() == [0, 1, 0, 1]
        assert buffer.timeouts[:4].flatten().tolist() == [0, 0, 0, 1]
        assert buffer.pos == 4

    def test_an_episode_that_is_cut_where_a_column_is_full_is_a_time_limit(self):
        buffer = line_buffer(2)
        fill_replay(buffer, [episode(0, 3, terminal=True), episode(10, 6, terminal=True)])
        assert buffer.pos == 4, "of nine, one is left out"
        assert buffer.observations[:4, :, 0].T.tolist() == [[0, 1, 2, 10], [11, 12, 13, 14]]
        assert buffer.next_observations[:4, :, 0].T.tolist() == [[1, 2, 3, 11], [12, 13, 14, 15]]
        assert buffer.dones[:4].T.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
        assert buffer.timeouts[:4].T.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]

    def test_one_episode_fills_all_columns(self):
        buffer = line_buffer(4)
        fill_replay(buffer, [episode(0, 8, terminal=True)])
        assert buffer.observations[:2, :, 0].T.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert buffer.timeouts[1].tolist() == [1, 1, 1, 0]

    def test_n_step_returns_stay_within_their_episode(self):
        buffer = line_buffer(1, NStepReplayBuffer, n_steps=3, gamma=1.0)
        fill_replay(buffer, [episode(0, 2, terminal=False), episode(10, 4, terminal=True)])
        samples = buffer._get_samples(np.array([0, 2, 3]))
        assert samples.rewards.flatten().tolist() == [1 + 2, 11 + 12 + 13, 12 + 13 + 14]
        assert samples.next_observations.flatten().tolist() == [2, 13, 14]
        assert samples.dones.flatten().tolist() == [0, 0, 1]

    def test_every_transition_of_the_replay_arrives(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, **QUICK)
        episodes = list(read_episodes(dreamer.replay_buffer))
        buffer = sac.replay_buffer
        assert buffer.n_envs == 2
        first = episodes[0]
        np.testing.assert_array_equal(buffer.observations[:50, 0], first.obs["obs"][:-1])
        np.testing.assert_array_equal(buffer.next_observations[:50, 0], first.obs["obs"][1:])
        np.testing.assert_array_equal(buffer.actions[:50, 0], first.action)
        np.testing.assert_array_equal(buffer.dones, buffer.timeouts)
        assert np.flatnonzero(buffer.timeouts[:100, 0]).tolist() == [49, 99]
        assert buffer.pos == sum(map(len, episodes)) // 2


class TestSettings:
    def test_a_class_that_hands_its_arguments_on_gets_the_same(self, dreamer: Dreamer):
        class Mine(SAC):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)

        quick = {name: value for name, value in QUICK.items() if name != "policy_kwargs"}
        mine, sac = (dreamer.to_model_free(one, **quick) for one in (Mine, SAC))
        for name in ("learning_starts", "ent_coef", "policy_kwargs"):
            assert getattr(mine, name) == getattr(sac, name)
        assert mine.learning_starts == 0

    def test_as_many_entries_are_taken_as_fit_into_memory(self, dreamer: Dreamer, monkeypatch):
        unlimited, width = real_states(dreamer, 10_000), dreamer.policy.world_model.rssm.packed_width
        assert unlimited.packed.shape == (len(unlimited), width)
        monkeypatch.setattr(module_of_states, "MIN_ENTRIES", 60)
        monkeypatch.setattr(module_of_states, "MAX_BYTES", 100 * (4 * width + 5 * 12))  # three numbers of four bytes
        assert 90 <= len(real_states(dreamer, 10_000)) <= 100 < len(unlimited)
        monkeypatch.setattr(module_of_states, "MAX_BYTES", 0)
        assert 40 < len(real_states(dreamer, 10_000)) <= 60

    def test_nothing_throws_the_policy_away(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, **QUICK)
        assert sac.learning_starts == 0
        assert sac.num_timesteps == dreamer.num_timesteps
        assert sac._n_updates == 0
        scale = dreamer.policy.return_scale.scale.item()
        np.testing.assert_allclose(sac.log_ent_coef.exp().item(), dreamer.ent_coef * scale, rtol=0.01)
        obs = sac.policy.obs_to_tensor(sac.replay_buffer.observations[:200].reshape(-1, 3))[0]
        with th.no_grad():
            entropy = -sac.actor.action_log_prob(obs)[1].mean().item()
        assert abs(sac.target_entropy - entropy) < 0.2
        for ours, theirs in zip(sac.critic.parameters(), sac.critic_target.parameters()):
            assert (ours - theirs).abs().max() < 0.01

    def test_what_the_caller_gives_is_kept(self, dreamer: Dreamer):
        kwargs = {**QUICK, "policy_kwargs": dict(net_arch=[16])}
        given = copy.deepcopy(kwargs)
        chosen = dict(ent_coef=0.2, learning_starts=7, target_entropy=-3.0, gamma=0.9)
        sac = dreamer.to_model_free(SAC, **kwargs, **chosen)
        assert kwargs == given
        assert (sac.ent_coef, sac.learning_starts, sac.target_entropy, sac.gamma) == (0.2, 7, -3.0, 0.9)
        assert sac.actor.latent_pi[0].out_features == 16

    @pytest.mark.parametrize("algorithm", [SAC, TD3, TQC, CrossQ])
    def test_off_policy_algorithms_go_on_learning(self, dreamer: Dreamer, algorithm: Any):
        model = dreamer.to_model_free(algorithm, **QUICK)
        before = model.replay_buffer.pos
        model.learn(6, reset_num_timesteps=False)
        assert model.num_timesteps == dreamer.num_timesteps + 6
        assert model.replay_buffer.pos == before + 3

    @pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG, TQC])
    def test_networks_are_layer_normalized(self, dreamer: Dreamer, algorithm: Any):
        student = dreamer.to_model_free(algorithm, **QUICK)
        critic = student.critic.qf0 if algorithm is TQC else student.critic.q_networks[0]
        x = 7 * th.randn(5, 32) + 3
        for network in (critic, student.actor.mu if algorithm in (TD3, DDPG) else student.actor.latent_pi):
            normed = network[1](x)
            mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0)
            np.testing.assert_allclose(normed, ((x - mean) / std).clamp(min=0), atol=1e-4)

    def test_they_are_not_where_the_algorithm_has_norms_of_its_own_or_the_caller_says_otherwise(self, dreamer: Dreamer):
        kwargs = {**QUICK, "policy_kwargs": dict(NET, activation_fn=th.nn.Tanh)}
        assert isinstance(dreamer.to_model_free(SAC, **kwargs).critic.q_networks[0][1], th.nn.Tanh)
        assert dreamer.to_model_free(CrossQ, **QUICK).policy.activation_fn is th.nn.ReLU

    def test_each_logs_to_a_tensorboard_folder_of_its_own(self, dreamer: Dreamer, tmp_path):
        few: Any = dict(updates=1, critic_updates=0, n_steps=10, batch_size=10, tensorboard_log=str(tmp_path))
        for folder in ("PPO_1", "PPO_2"):
            ppo = dreamer.to_model_free(PPO, pendulum(), **few).learn(10, reset_num_timesteps=False)
            assert ppo.logger.dir == str(tmp_path / folder)

    def test_dreamer_goes_on_after_it_lent_its_environments(self):
        model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(60)
        model.to_model_free(SAC, **QUICK).learn(5)
        model.learn(20, reset_num_timesteps=False)
        lengths = [len(e) for e in read_episodes(model.replay_buffer)]
        assert lengths == [50, 9, 19], "the stream was cut where the environments were lent"

    @pytest.mark.parametrize("named", [False, True])
    def test_dreamer_and_its_student_may_take_turns(self, named: bool):
        model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(60)
        sac = model.to_model_free(SAC, env=model.get_env() if named else None, **QUICK)
        for agent in (model, sac, model):
            agent.learn(20, reset_num_timesteps=False)
        assert [len(e) for e in read_episodes(model.replay_buffer)] == [50, 9, 19, 19]

    def test_an_environment_is_shared_however_it_is_wrapped(self):
        env = gym.make("Pendulum-v1", max_episode_steps=50)
        model = Dreamer("MlpPolicy", env, **SMALL).learn(60)
        student = model.to_model_free(SAC, env=env, **QUICK)
        assert student.env is not model.env
        for agent in (student, model):
            agent.learn(20, reset_num_timesteps=False)
        assert [len(e) for e in read_episodes(model.replay_buffer)] == [50, 9, 19]

    def test_an_environment_may_be_given_by_its_id(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, env="Pendulum-v1", **QUICK)
        assert sac.get_env().envs[0].spec.id == "Pendulum-v1"

    def test_dreamer_does_not_reset_environments_that_it_did_not_lend(self):
        model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(60)
        model.to_model_free(PPO, updates=2)
        model.set_env(pendulum())
        for _ in range(2):
            model.learn(20, reset_num_timesteps=False)
        assert [len(e) for e in read_episodes(model.replay_buffer)] == [50, 9, 39]

    def test_a_replay_without_a_transition_is_refused(self, dreamer: Dreamer):
        with pytest.raises(ValueError, match="transitions=3 must be a whole number of at least 4"):
            dreamer.to_model_free(SAC, **QUICK, transitions=3)

    @pytest.mark.parametrize("name", ["updates", "critic_updates", "transitions"])
    def test_numbers_are_whole_or_refused_before_any_work(self, dreamer: Dreamer, name: str, monkeypatch):
        monkeypatch.setattr(hand_over, "teach", None)
        for value in (-1, 10.5, "10"):
            with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number of at least "):
                dreamer.to_model_free(SAC, **{**QUICK, name: value})

    def test_as_in_learn_they_may_come_as_floats(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, updates=2.0, critic_updates=2.0, transitions=1e2)
        assert sac.replay_buffer.size() == 48  # of two environments, entries without a next one left out

    @pytest.mark.parametrize("limit", ["transitions", "buffer_size"])
    def test_only_the_newest_transitions_are_given(self, dreamer: Dreamer, limit: str):
        sac = dreamer.to_model_free(SAC, **{**QUICK, limit: 40})
        newest = list(read_episodes(dreamer.replay_buffer, 40))
        np.testing.assert_array_equal(sac.replay_buffer.observations[:19, 0], newest[0].obs["obs"][:-1][:19])
        assert sac.replay_buffer.pos == sum(map(len, newest)) // 2 <= 20

    def test_a_deterministic_student_of_a_matrix_of_actions_goes_on_learning(self):
        env = gym.wrappers.TransformAction(
            gym.make("Pendulum-v1", max_episode_steps=50),
            lambda action: action.mean(1),
            gym.spaces.Box(-2.0, 2.0, (1, 3), np.float32),
        )
        model = Dreamer("MlpPolicy", env, **SMALL).learn(80)
        td3 = model.to_model_free(TD3, **QUICK).learn(5, reset_num_timesteps=False)
        assert td3.num_timesteps == 85

    def test_a_deterministic_student_explores_as_widely_as_dreamer(self, dreamer: Dreamer):
        td3 = dreamer.to_model_free(TD3, **QUICK)
        targets = distillation_targets(dreamer, real_states(dreamer, 1000), td3.gamma, False)
        np.testing.assert_allclose(td3.action_noise._sigma, targets.std.mean(0), rtol=0.1)


class TestPolicy:
    @pytest.mark.parametrize("algorithm", [SAC, TD3, CrossQ, PPO])
    def test_deterministic_actions_are_those_taught_also_on_observations_not_seen(self, algorithm: Any):
        settings = dict(n_steps=64) if algorithm is PPO else dict(buffer_size=10)
        student = algorithm("MlpPolicy", pendulum(), seed=0, device="cpu", policy_kwargs=dict(NET), **settings)
        targets, held_out = smooth_targets(2000), smooth_targets(200)
        teach(student, targets, 600)
        actions = student.predict(held_out.obs["obs"], deterministic=True)[0] / 2.0
        assert np.abs(actions - held_out.mean.numpy()).mean() < 0.05
        assert held_out.mean.std() > 0.3

    def test_actions_of_wide_and_lopsided_bounds_are_learned_as_any_other(self):
        space = gym.spaces.Box(np.array([0.0], np.float32), np.array([4000.0], np.float32))
        wide = gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda a: a / 1000 - 2, space)
        ppo = PPO("MlpPolicy", wide, seed=0, device="cpu", policy_kwargs=dict(NET), n_steps=64)
        targets = smooth_targets(2000)
        teach(ppo, targets, 600)
        actions = ppo.predict(targets.obs["obs"], deterministic=True)[0] / 2000.0 - 1
        assert np.abs(actions - targets.mean.numpy()).mean() < 0.05
        assert ppo.policy.log_std.exp().item() == pytest.approx(0.2 * 2000, rel=1e-4)

    def test_a_width_that_the_caller_gives_is_kept(self, dreamer: Dreamer):
        ppo = dreamer.to_model_free(PPO, updates=2, n_steps=32, policy_kwargs=dict(NET, log_std_init=-2.0))
        assert ppo.policy.log_std.tolist() == [-2.0]

    def test_sacs_width_is_dreamers(self):
        sac = SAC("MlpPolicy", pendulum(), seed=0, device="cpu", policy_kwargs=dict(NET), buffer_size=10)
        targets = smooth_targets(2000)
        teach(sac, targets, 600)
        obs = sac.policy.obs_to_tensor(targets.obs["obs"])[0]
        with th.no_grad():
            actions = th.stack([sac.actor(obs) for _ in range(64)])
        assert abs(actions.std(0).mean() - 0.2) < 0.05

    def test_ppo_has_dreamers_width_and_values(self, dreamer: Dreamer):
        ppo = dreamer.to_model_free(PPO, updates=500, n_steps=32, policy_kwargs=NET)
        targets = distillation_targets(dreamer, real_states(dreamer, 1000), ppo.gamma, False)
        np.testing.assert_allclose(ppo.policy.log_std.exp().item(), 2 * targets.std.mean().item(), rtol=0.05)

    def test_ppo_has_dreamers_values(self):
        ppo = PPO("MlpPolicy", pendulum(), seed=0, device="cpu", n_steps=32, batch_size=32, policy_kwargs=dict(NET))
        targets = smooth_targets(2000)
        targets.value = 1000 + 5 * th.as_tensor(targets.obs["obs"][:, 0])
        teach(ppo, targets, 1500)
        with th.no_grad():
            values = ppo.policy.predict_values(targets.obs_for(ppo.policy, slice(None))).squeeze(-1)
        assert (values - targets.value).abs().mean() < 0.2 * targets.value.std()

    def test_choices_are_handed_over_as_probabilities(self):
        model = Dreamer("MlpPolicy", "CartPole-v1", **SMALL).learn(80)
        ppo = model.to_model_free(PPO, updates=200, n_steps=16, batch_size=16, policy_kwargs=NET)
        targets = distillation_targets(model, real_states(model, 1000), ppo.gamma, False)
        with th.no_grad():
            probs = ppo.policy.get_distribution(targets.obs_for(ppo.policy, slice(None)))
        assert (probs.distribution.probs - targets.mean).abs().mean() < 0.05

    def test_real_states_are_those_of_predict_along_the_stored_actions(self, dreamer: Dreamer):
        real, state = real_states(dreamer, 1000), None
        for t in range(int(np.flatnonzero(real.is_last)[0]) + 1):
            obs = {key: part[t : t + 1] for key, part in real.obs.items()}["obs"]
            _, (packed, _) = dreamer.predict(obs, state, deterministic=True)
            np.testing.assert_allclose(real.packed[t], packed[0], atol=1e-4)
            state = packed, real.action[t : t + 1].numpy()

    def test_real_and_imagined_targets_are_about_equally_many(self, dreamer: Dreamer):
        real = real_states(dreamer, 100)
        n_real = int((~real.is_last).sum())
        assert 0 <= len(distillation_targets(dreamer, real, 0.9, False)) - (2 * n_real) * 0.9 < 0.4 * n_real

    def test_dreams_of_one_step_have_nothing_between_their_ends_to_learn_from(self):
        env = FakeImageEnv(screen_height=32, screen_width=32, n_channels=3, discrete=False)
        model = Dreamer("CnnPolicy", env, **{**SMALL, "imagination_horizon": 1}).learn(40)
        real = real_states(model, 1000)
        assert len(distillation_targets(model, real, 0.9, False)) == (~real.is_last).sum()

    def test_returns_are_of_the_students_discount(self, dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
        """Rewards of 1, a critic that says 100 (of 1 / (1 - 0.99)), nothing ends: at 0.9 each value is 10."""
        world_model, critic = dreamer.policy.world_model, dreamer.policy.critic
        monkeypatch.setattr(world_model, "predict_reward", lambda f: th.ones(f.shape[:-1]))
        monkeypatch.setattr(world_model, "predict_discount", lambda f: th.full(f.shape[:-1], 0.99))
        monkeypatch.setattr(critic, "value", lambda f: th.full(f.shape[:-1], 100.0))
        real = real_states(dreamer, 100)
        for gamma, value in ((0.9, 10.0), (0.99, 100.0)):
            targets = distillation_targets(dreamer, real, gamma, False)
            np.testing.assert_allclose(targets.value, value, rtol=1e-4)


class TestLatents:
    def test_features_for_a_task_that_needs_memory(self, dreamer: Dreamer):
        sac = dreamer.to_model_free(SAC, on="latents", **QUICK)
        assert isinstance(sac.env, LatentVecEnv)
        assert sac.observation_space.shape == (dreamer.policy.world_model.feature_width,)
        sac.learn(110, reset_num_timesteps=False)
        buffer = sac.replay_buffer
        end = int(np.flatnonzero(buffer.dones[: buffer.pos, 0])[-1])
        assert not np.allclose(buffer.next_observations[end, 0], buffer.observations[end + 1, 0])
        np.testing.assert_array_equal(buffer.next_observations[end - 1], buffer.observations[end])

    def test_it_works_around_processes_and_passes_options_on(self, dreamer: Dreamer):
        env = LatentVecEnv(dreamer, SubprocVecEnv([Short] * 2))
        env.set_options({"x": 1})
        env.reset()
        assert [info["options"] for info in env.reset_infos] == [{"x": 1}] * 2
        before = env.reset_infos
        _, _, dones, infos = env.step(np.zeros((2, 1), np.float32))
        assert env.reset_infos is env.env.reset_infos
        assert env.reset_infos is not before
        env.close()
        assert dones.all()
        assert infos[0]["terminal_observation"].shape == env.observation_space.shape

    def test_infos_of_resets_come_through_the_wrappers_of_other_vectors(self, dreamer: Dreamer):
        env = LatentVecEnv(dreamer, VecMonitor(DummyVecEnv([Short] * 2)))
        env.set_options({"x": 1})
        env.reset()
        assert [info["options"] for info in env.reset_infos] == [{"x": 1}] * 2
        env.step(np.zeros((2, 1), np.float32))
        assert [info["options"] for info in env.reset_infos] == [None] * 2

    def test_other_spaces_are_refused(self, dreamer: Dreamer):
        with pytest.raises(ValueError, match=r"env has the observation_space Box\(.*, the model Box\("):
            LatentVecEnv(dreamer, make_vec_env("MountainCarContinuous-v0"))

    def test_a_step_before_the_first_episode_is_refused(self, dreamer: Dreamer):
        with pytest.raises(RuntimeError, match=r"no episode has started: call reset\(\) before step"):
            LatentVecEnv(dreamer, pendulum()).step(np.zeros((1, 1), np.float32))

    def test_the_last_observation_goes_through_the_filter_too(self, dreamer: Dreamer):
        latent, plain, state = LatentVecEnv(dreamer, pendulum(steps=2)), pendulum(steps=2), None
        for env in (latent, plain):
            env.seed(3)
        obs, action = plain.reset(), np.ones((1, 1), np.float32)
        latent.reset()
        for _ in range(2):
            _, (packed, _) = dreamer.predict(obs, state, deterministic=True)
            state = packed, dreamer.policy.actions.encode(action)
            (obs, _, done, infos), (_, _, _, seen) = plain.step(action), latent.step(action)
        assert done.all()
        _, (packed, _) = dreamer.predict(infos[0]["terminal_observation"][None], state, deterministic=True)
        expected = dreamer.policy.world_model.rssm.unpack(th.as_tensor(packed)).features[0]
        np.testing.assert_allclose(seen[0]["terminal_observation"], expected, atol=1e-6)

    def test_a_value_that_is_not_finite_is_refused_and_does_not_enter_the_memory(self, dreamer: Dreamer):
        env = LatentVecEnv(dreamer, pendulum())
        env.reset()
        before = env._memory[0].clone()
        with pytest.raises(ValueError, match="LatentVecEnv got obs with a number that is NaN"):
            env._filter(np.float32([[np.nan, 0.0, 0.0]]), np.zeros(1, bool))
        assert th.equal(env._memory[0], before)

    def test_where_no_transition_is_among_the_newest_none_is_handed_over(self):
        model = Dreamer("MlpPolicy", pendulum(steps=10), **{**SMALL, "buffer_size": 200}).learn(101)
        assert list(read_episodes(model.replay_buffer, 2)) == []  # the end of one episode, the beginning of another
        sac = model.to_model_free(SAC, on="latents", transitions=2, **QUICK)
        assert sac.replay_buffer.size() == 0

    def test_only_vectors_of_environments_are_seen_through(self, dreamer: Dreamer):
        with pytest.raises(TypeError, match=r"wraps a VecEnv, not PendulumEnv: make_vec_env\(\) makes one"):
            LatentVecEnv(dreamer, gym.make("Pendulum-v1").unwrapped)

    def test_the_features_are_those_of_predict(self, dreamer: Dreamer):
        env = LatentVecEnv(dreamer, pendulum())
        env.seed(3)
        plain = pendulum()
        plain.seed(3)
        features, obs, state = env.reset(), plain.reset(), None
        for _ in range(3):
            action, state = dreamer.predict(obs, state, deterministic=True)
            with th.no_grad():
                expected = dreamer.policy.world_model.rssm.unpack(th.as_tensor(state[0])).features
            np.testing.assert_allclose(features, expected, atol=1e-6)
            features, obs = env.step(action)[0], plain.step(action)[0]


class TestFiles:
    def test_sb3_loads_it_without_this_package(self, dreamer: Dreamer, tmp_path: Path):
        sac = dreamer.to_model_free(SAC, **QUICK)
        sac.save(tmp_path / "sac.zip")
        sac.save_replay_buffer(tmp_path / "replay.pkl")
        obs = sac.replay_buffer.observations[0]
        np.save(tmp_path / "obs.npy", obs)
        code = (
            "import sys, numpy as np; sys.modules['sb3_dreamer'] = None\n"
            "from stable_baselines3 import SAC\n"
            f"model = SAC.load(r'{tmp_path}/sac.zip'); model.load_replay_buffer(r'{tmp_path}/replay.pkl')\n"
            f"action = model.predict(np.load(r'{tmp_path}/obs.npy'), deterministic=True)[0]\n"
            "print(model.replay_buffer.pos, *action.flatten())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pos, *actions = done.stdout.split()
        assert int(pos) == sac.replay_buffer.pos
        np.testing.assert_allclose(
            np.array(actions, float), sac.predict(obs, deterministic=True)[0].flatten(), atol=1e-5
        )

    def test_its_policy_alone_can_be_saved_too(self, dreamer: Dreamer, tmp_path: Path):
        sac = dreamer.to_model_free(SAC, **QUICK)
        sac.policy.save(tmp_path / "policy.pth")
        obs = sac.replay_buffer.observations[0]
        actions = (
            policy.predict(obs, deterministic=True)[0] for policy in (sac.policy.load(tmp_path / "policy.pth"), sac)
        )
        np.testing.assert_allclose(*actions, atol=1e-6)


class TestAnotherDevice:
    """The student is on a device of its own. "meta" is one on every machine: it has no values, but refuses others."""

    @pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU")
    def test_on_policy(self, dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(th.distributions.Distribution, "_validate_args", False)  # it reads values
        ppo = dreamer.to_model_free(PPO, updates=2, n_steps=32, device="meta")
        assert ppo.policy.action_net.weight.device.type == "meta"

    def test_off_policy(self, dreamer: Dreamer, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(hand_over, "start_slowly", lambda student: None)  # SB3's train() needs values
        noise = NormalActionNoise(np.zeros(1), np.ones(1))
        td3 = dreamer.to_model_free(TD3, **QUICK, action_noise=noise, device="meta")
        assert td3.critic.q_networks[0][0].weight.device.type == "meta"


class TestRefused:
    @pytest.mark.parametrize(
        ("algorithm", "kwargs", "message"),
        [
            (DQN, {}, "cannot take over here.*action space"),
            (RecurrentPPO, {"policy": "MlpLstmPolicy"}, "cannot take over from Dreamer"),
            (SAC, {"on": "pixels"}, 'on="pixels" is unknown'),
            (SAC, {"use_sde": True}, "leave them False"),
            (SAC, {"env": "CartPole-v1"}, "same spaces and wrappers"),
            (Dreamer, {}, "Dreamer cannot take over from Dreamer: use SAC"),
        ],
    )
    def test_what_cannot_take_over(self, dreamer: Dreamer, algorithm: Any, kwargs: Any, message: str):
        kwargs = dict(kwargs)
        if "env" in kwargs:
            kwargs["env"] = gym.make(kwargs["env"])
        with pytest.raises(ValueError, match=message):
            dreamer.to_model_free(algorithm, **kwargs)

    def test_the_name_of_an_algorithm(self, dreamer: Dreamer):
        with pytest.raises(TypeError, match="algorithm must be an algorithm class of SB3, not 'PPO'"):
            dreamer.to_model_free("PPO")

    def test_an_empty_replay(self):
        with pytest.raises(ValueError, match="needs experience, and the replay holds 0 entries"):
            Dreamer("MlpPolicy", pendulum(), **SMALL).to_model_free(SAC)

    def test_one_that_has_not_learned_yet(self, dreamer: Dreamer):
        model = Dreamer("MlpPolicy", pendulum(), **SMALL).add_experience(dreamer.replay_buffer)
        with pytest.raises(ValueError, match="has not learned anything to hand over yet"):
            model.to_model_free(SAC)

    def test_choices_that_begin_elsewhere(self):
        class Shifted(gym.Wrapper):
            action_space = gym.spaces.Discrete(2, start=5)

            def step(self, action: Any) -> Any:
                return super().step(action - 5)

        model = Dreamer("MlpPolicy", Shifted(gym.make("CartPole-v1")), **SMALL).learn(80)
        with pytest.raises(ValueError, match="count from 0"):
            model.to_model_free(PPO)

    def test_actions_of_whole_numbers(self):
        space = gym.spaces.Box(-2, 2, (1,), np.int64)
        whole = gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda a: a.astype(np.float32), space)
        model = Dreamer("MlpPolicy", whole, **SMALL).learn(80)
        with pytest.raises(ValueError, match="make fractions of the actions"):
            model.to_model_free(PPO)

    def test_observations_that_begin_elsewhere(self):
        class Corner(gym.Env):
            observation_space = gym.spaces.Dict(a=gym.spaces.Discrete(3, start=2))
            action_space = gym.spaces.Discrete(2)

            def reset(self, **kwargs: Any) -> Any:
                return {"a": 2}, {}

            def step(self, action: Any) -> Any:
                return {"a": 2}, 0.0, False, False, {}

        model = Dreamer("MultiInputPolicy", Corner(), **SMALL).learn(60)
        with pytest.raises(ValueError, match=r"nor observe Discrete\(3, start=2\)"):
            model.to_model_free(PPO)

    def test_an_algorithm_without_the_policy_that_the_observations_need(self):
        named = gym.wrappers.TransformObservation(
            gym.make("Pendulum-v1"), lambda obs: {"obs": obs}, gym.spaces.Dict(obs=pendulum().observation_space)
        )
        model = Dreamer("MultiInputPolicy", named, **SMALL).learn(60)
        with pytest.raises(ValueError, match=r'CrossQ has no MultiInputPolicy, only MlpPolicy: .*on="latents"'):
            model.to_model_free(CrossQ)

    def test_nothing_of_a_refused_environment_is_changed(self):
        model = Dreamer("MlpPolicy", VecNormalize(pendulum()), **SMALL).learn(60)
        env = VecNormalize(pendulum())
        with pytest.raises(ValueError, match="cannot take over here"):
            model.to_model_free(DQN, env=env)
        assert env.obs_rms.mean.tolist() == [0, 0, 0]

    def test_masked_choices(self):
        model = Dreamer("MlpPolicy", "CartPole-v1", **SMALL).learn(80)
        env = ActionMasker(gym.make("CartPole-v1"), lambda _: np.ones(2, bool))
        with pytest.raises(ValueError, match=r"MaskablePPO cannot take over from Dreamer: use PPO, A2C or TRPO"):
            model.to_model_free(MaskablePPO, env=env)

    @pytest.mark.parametrize("other", [dict(norm_obs=False), dict(clip_obs=0.1), dict(gamma=0.9)])
    def test_another_normalization(self, other: dict[str, Any]):
        model = Dreamer("MlpPolicy", VecNormalize(pendulum()), **SMALL).learn(60)
        (name,) = other
        with pytest.raises(ValueError, match=f"VecNormalize has {name}=.* around env and .* around Dreamer's"):
            model.to_model_free(SAC, env=VecNormalize(pendulum(), **other))

    def test_without_the_normalization_that_it_learned_with(self, tmp_path: Path):
        model = Dreamer("MlpPolicy", VecNormalize(pendulum()), **SMALL).learn(80)
        model.save(tmp_path / "model")
        model.save_replay_buffer(tmp_path / "replay")
        loaded = Dreamer.load(tmp_path / "model")
        loaded.load_replay_buffer(tmp_path / "replay")
        with pytest.raises(ValueError, match="needs the statistics of VecNormalize that this model has learned with"):
            loaded.to_model_free(SAC, env=pendulum())

    def test_normalization_on_one_side_only(self, dreamer: Dreamer):
        plain, normalized = VecNormalize(pendulum(), norm_reward=False), VecNormalize(pendulum())
        for env, on in ((normalized, "observations"), (plain, "latents")):
            with pytest.raises(ValueError, match="wrap env as Dreamer's is"):
                dreamer.to_model_free(SAC, env=env, on=on)
        with pytest.raises(ValueError, match="wrap env as Dreamer's is"):
            Dreamer("MlpPolicy", plain, **SMALL).learn(80).to_model_free(SAC, env=pendulum())


def test_a_new_vecnormalize_takes_dreamers_statistics_over():
    own = VecNormalize(pendulum())
    model = Dreamer("MlpPolicy", own, **SMALL).learn(60)
    other = VecNormalize(pendulum())
    sac = model.to_model_free(SAC, env=other, **QUICK)
    np.testing.assert_array_equal(other.obs_rms.mean, own.obs_rms.mean)
    assert other.ret_rms.var == own.ret_rms.var
    sac.learn(10)
    assert other.obs_rms.count > own.obs_rms.count, "its own from there on"


def test_statistics_that_are_not_training_stay_as_they_are():
    model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(60)
    env = VecNormalize(pendulum(), norm_reward=False)
    env.reset()
    env.training = False
    before = env.obs_rms.copy()
    model.to_model_free(SAC, env=env, **QUICK)
    assert (env.obs_rms.count, env.obs_rms.mean.tolist()) == (before.count, before.mean.tolist())


@pytest.mark.parametrize("algorithm", [SAC, PPO])
def test_the_students_environment_alone_may_normalize_its_observations(algorithm: Any):
    model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(200)
    env = VecNormalize(pendulum(), norm_reward=False)
    settings = dict(n_steps=64) if algorithm is PPO else dict(buffer_size=1000, critic_updates=2)
    student = model.to_model_free(algorithm, env=env, updates=600, policy_kwargs=dict(NET), **settings)
    seen = np.concatenate([e.obs["obs"] for e in read_episodes(model.replay_buffer)])
    np.testing.assert_allclose(env.obs_rms.mean, seen.mean(0), atol=1e-3)
    np.testing.assert_allclose(env.obs_rms.var, seen.var(0), rtol=1e-2)
    targets = distillation_targets(model, real_states(model, 1000), 0.99, False)
    actions = student.predict(env.normalize_obs(targets.obs["obs"]), deterministic=True)[0] / 2
    assert np.abs(actions - targets.mean.numpy()).mean() < 0.1
    if algorithm is SAC:
        assert np.abs(student.replay_buffer.observations[:190, 0, 2]).max() > 2, "the replay keeps the original numbers"
    student.learn(10, reset_num_timesteps=False)


def test_values_are_scaled_from_the_discount_that_the_critic_was_trained_with(monkeypatch: pytest.MonkeyPatch):
    """``model.gamma`` may have been changed since the last update."""
    model = Dreamer("MlpPolicy", pendulum(), **SMALL).learn(60)
    start = unpacked(model, real_states(model, 10).packed)
    action = th.zeros(len(start.features), 1)
    monkeypatch.setattr(model.policy.critic, "value", lambda features: th.full(features.shape[:-1], 100.0))
    before = dream_returns(model, start, 0.9, action, sample=False)[1]
    model.gamma = 0.9
    th.testing.assert_close(dream_returns(model, start, 0.9, action, sample=False)[1], before)


@pytest.mark.parametrize("weight", [0.0, lambda progress_remaining: 0.01 * progress_remaining], ids=["zero", "falls"])
def test_without_an_entropy_weight_at_the_end_the_temperature_is_small_but_there_is_one(weight):
    dreamer = Dreamer("MlpPolicy", pendulum(), **SMALL, ent_coef=weight).learn(60)
    scale = dreamer.policy.return_scale.scale.item()
    assert dreamer.to_model_free(SAC, **QUICK).ent_coef == f"auto_{3e-5 * scale:.6g}"


def test_under_vecnormalize_the_replay_is_original_and_targets_are_normalized():
    env = VecNormalize(pendulum(), clip_obs=5.0)
    model = Dreamer("MlpPolicy", env, **SMALL).learn(60)
    sac = model.to_model_free(SAC, **QUICK)
    episodes = list(read_episodes(model.replay_buffer))
    np.testing.assert_array_equal(sac.replay_buffer.observations[:50, 0], episodes[0].obs["obs"][:-1])
    real = real_states(model, 1000)
    np.testing.assert_allclose(real.obs["obs"][:51], env.normalize_obs(episodes[0].obs["obs"]), rtol=1e-5)


def test_imagined_observations_have_the_limits_of_vecnormalize_not_those_of_the_space():
    env = VecNormalize(pendulum(), clip_obs=1.5)
    model = Dreamer("MlpPolicy", env, **SMALL).learn(60)
    model.policy.world_model.predict_obs = lambda features: {"obs": th.tensor([[1.2, -3.0, 9.0]])}
    assert imagined_observations(model, th.zeros(1, 1))["obs"].tolist() == [[np.float32(1.2), -1.5, 1.5]]
    env.norm_obs = False
    assert imagined_observations(model, th.zeros(1, 1))["obs"].tolist() == [[1.0, -1.0, 8.0]]


def test_a_dict_with_a_single_key_is_a_dict():
    env = gym.make("Pendulum-v1", max_episode_steps=50)
    named = gym.wrappers.TransformObservation(
        env, lambda obs: {"obs": obs}, gym.spaces.Dict({"obs": env.observation_space})
    )
    model = Dreamer("MultiInputPolicy", named, **SMALL).learn(60)
    model.to_model_free(SAC, **QUICK).learn(5)


def test_the_transformer_is_taught_and_hands_over_as_the_gru():
    model = Dreamer("MlpPolicy", pendulum(), rssm_type="transformer", **SMALL)
    teacher = PPO("MlpPolicy", pendulum(), n_steps=16, batch_size=16, device="cpu")
    model.warm_start(teacher, 60, updates=2).learn(20, reset_num_timesteps=False)
    for on in ("observations", "latents"):
        sac = model.to_model_free(SAC, on=on, **QUICK)
        assert sac.learn(6, reset_num_timesteps=False).replay_buffer.pos == 50 + 9 + 19 + 6
