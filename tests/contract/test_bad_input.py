"""Bad input is named, and nothing is lost."""

import io
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_dreamer import Dreamer
from sb3_dreamer.imitation import NO_TEACHER
from sb3_dreamer.metrics import MAX_SKIPPED

DEBUG = dict(model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=500, train_ratio=4,
             imagination_horizon=2, imagination_starts=2, seed=0, device="cpu")  # fmt: skip


class Broken(gym.Env):
    """Fine until something happens at a step.

    :param at: the step.
    :param what: "obs", "reward", "terminal", "reset" or "raise".
    :param value: the number there.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, at: int = 10**9, what: str = "", value: float = np.nan) -> None:
        self.at, self.what, self.value, self.steps = at, what, value, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation("reset"), {}

    def step(self, action):
        self.steps += 1
        if self.now("raise"):
            raise RuntimeError("the simulator has exploded")
        reward = self.value if self.now("reward") else 1.0
        done = self.steps % 15 == 0
        return self.observation("terminal" if done else "obs"), reward, done, False, {}

    def now(self, what: str) -> bool:
        """Whether it happens here; once only."""
        happens = self.steps == self.at and self.what == what
        self.what = "" if happens else self.what
        return happens

    def observation(self, what: str) -> np.ndarray:
        obs = np.full(3, self.steps, np.float32)
        if self.now(what):
            obs[1] = self.value
        return obs


def agent(env=None, policy: str = "MlpPolicy", **settings) -> Dreamer:
    return Dreamer(policy, Broken() if env is None else env, **{**DEBUG, **settings})


def everything(model: Dreamer) -> list[th.Tensor]:
    """Copies of all that an update may change."""
    policy = model.policy
    moments = [t for state in policy.optimizer.state.values() for t in state.values()]
    steps = [group["step"] for group in policy.optimizer.param_groups]
    return [t.detach().clone() for t in (*policy.state_dict().values(), *moments, *steps)]


def same(first: list[th.Tensor], second: list[th.Tensor]) -> bool:
    return all(th.equal(a, b) for a, b in zip(first, second, strict=True))


# -- numbers of the environment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("what", "at", "message", "kept"),
    [
        ("obs", 20, r"at environment step 40: observation of env 1 holds {} at \(1,\), expected finite", 2 * 21),
        ("reward", 20, r"at environment step 40: reward of env 1 holds {}, expected finite", 2 * 20),
        ("terminal", 30, r"at environment step 60: terminal observation of env 1 holds {} at \(1,\)", 2 * 30),
        ("reset", 30, r"at environment step 60: observation of env 1 holds {} at \(1,\)", 2 * 32),
    ],
)
def test_numbers_that_are_not_finite_name_environment_and_step_and_are_not_stored(what, at, value, message, kept):
    model = agent(DummyVecEnv([Broken, lambda: Broken(at, what, value)]))
    with pytest.raises(ValueError, match=message.format(value)):
        model.learn(100)
    assert model.replay_buffer.size() == kept
    assert all(np.isfinite(column).all() for column in model.replay_buffer._storage.arrays.values())
    model.save_replay_buffer(io.BytesIO())
    before = model._n_updates
    model.learn(10, reset_num_timesteps=False)  # the fault has passed
    assert model._n_updates > before
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_a_first_observation_that_is_nan_is_named_before_anybody_acts_on_it():
    with pytest.raises(ValueError, match=r"at environment step 0: observation of env 0 holds nan at \(1,\)"):
        agent(Broken(0, "reset")).learn(10)


def test_nan_is_found_behind_vecnormalize_too():
    model = agent(VecNormalize(DummyVecEnv([lambda: Broken(20, "obs")])))
    with pytest.raises(ValueError, match="at environment step 20: observation of env 0 holds nan"):
        model.learn(100)
    assert model.replay_buffer.size() == 21


@pytest.mark.parametrize(("what", "name"), [("obs", "obs"), ("reward", "returns")])
def test_statistics_that_took_a_bad_number_in_are_refused_until_there_are_others(what: str, name: str):
    model = agent(VecNormalize(DummyVecEnv([lambda: Broken(20, what)])))
    with pytest.raises(ValueError, match="at environment step 20"):
        model.learn(100)
    teacher = PPO("MlpPolicy", DummyVecEnv([Broken]), n_steps=8, batch_size=8, device="cpu")
    for goes_on in (
        lambda: model.learn(10, reset_num_timesteps=False),
        lambda: model.warm_start(teacher, 20, vec_normalize=False),
        lambda: model.pretrain(1),
    ):
        with pytest.raises(ValueError, match=rf"statistics of VecNormalize \({name}\) are not finite"):
            goes_on()
    assert model.imitation is NO_TEACHER
    model.set_env(VecNormalize(DummyVecEnv([Broken])))
    before = model.num_timesteps
    assert model.learn(10, reset_num_timesteps=False).num_timesteps == before + 10


def test_statistics_that_nothing_is_normalised_with_may_be_bad():
    model = agent(VecNormalize(DummyVecEnv([lambda: Broken(20, "reward")]), norm_reward=False))
    with pytest.raises(ValueError, match="at environment step 20"):
        model.learn(100)
    model.learn(10, reset_num_timesteps=False)


def test_an_environment_that_raises_loses_nothing(tmp_path):
    model = agent(Broken(20, "raise"))
    with pytest.raises(RuntimeError, match="the simulator has exploded"):
        model.learn(100)
    assert model.replay_buffer.size() == 20  # 19 steps, and the end of the episode of 15
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    other = Dreamer.load(tmp_path / "model", env=Broken())
    other.load_replay_buffer(tmp_path / "replay")
    other.learn(10, reset_num_timesteps=False)
    assert (other.num_timesteps, other.replay_buffer.size()) == (29, 30)


# -- updates that are not finite ---------------------------------------------------------------------------------------


def poison(model: Dreamer, monkeypatch, updates=range(10**9), where: str = "reward", value: float = np.nan) -> None:
    """Let some of the coming updates have a number that is not finite."""
    sample, count = model.replay_buffer.sample, iter(range(10**9))

    def poisoned(*args, **kwargs):
        batch = sample(*args, **kwargs)
        if next(count) in updates:
            (batch.reward if where == "reward" else batch.obs["obs"])[0, 3] = value
        return batch

    monkeypatch.setattr(model.replay_buffer, "sample", poisoned)


@pytest.mark.parametrize(("where", "value"), [("reward", np.nan), ("obs", np.nan), ("obs", np.inf)])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(monkeypatch, where, value):
    model = agent().learn(30)
    before, updates = everything(model), model._n_updates
    assert len(before) > 150
    poison(model, monkeypatch, range(3), where, value)
    latents = model.replay_buffer._storage.arrays["latent"]
    model.train(3, 2)
    assert np.isfinite(latents).all()
    assert same(before, everything(model))
    assert (model._metrics.skips(), model._n_updates) == (3, updates + 3)
    model.train(1, 2)
    assert not same(before, everything(model))
    assert model._metrics.skips() == 3
    assert all(t.isfinite().all() for t in everything(model))


def test_a_gradient_that_is_not_finite_changes_nothing_either(monkeypatch):
    model = agent().learn(30)
    before = everything(model)
    parameter = next(model.policy.actor.parameters())
    handle = parameter.register_hook(lambda grad: grad * np.inf)
    model.train(1, 2)
    assert same(before, everything(model))
    assert model._metrics.skips() == 1
    handle.remove()
    model.train(1, 2)
    assert not same(before, everything(model))


def test_skipped_updates_are_logged_and_are_in_no_mean(monkeypatch):
    model = agent().learn(30, log_interval=None)
    model._metrics.reset()
    poison(model, monkeypatch, range(1, 2))
    model.train(3, 2)
    logged = {}
    monkeypatch.setattr(model.logger, "dump", lambda step: logged.update(model.logger.name_to_value))
    model.dump_logs()
    assert logged["train/skipped_updates"] == 1
    assert all(np.isfinite(value) for key, value in logged.items() if key.startswith("train/"))


def test_many_in_a_row_stop_with_the_last_good_parameters(monkeypatch, tmp_path):
    model = agent(train_ratio=16).learn(30)
    before = everything(model)
    poison(model, monkeypatch)
    with pytest.raises(ValueError, match=r"updates were skipped, .* not finite.*reward_loss") as error:
        model.learn(100)
    assert "smaller learning_rate" in str(error.value)
    assert MAX_SKIPPED <= model._metrics.skips() < 2 * MAX_SKIPPED
    assert same(before, everything(model))
    model.save(tmp_path / "model")
    monkeypatch.undo()
    model.learn(10, reset_num_timesteps=False)
    assert not same(before, everything(model))


def test_many_that_are_not_in_a_row_do_not_stop(monkeypatch):
    model = agent().learn(30)
    poison(model, monkeypatch, [i for i in range(60) if i % 3])
    model.train(60, 2)
    assert model._metrics.skips() == 40


def test_no_update_makes_the_device_wait_for_the_host():
    class NoNumberIsAskedFor(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not th.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = agent().learn(30)
    batch = model.replay_buffer.sample(2)
    with NoNumberIsAskedFor():
        _, metrics = model.update(batch)
        model._metrics.add(metrics)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_ratio", 0), ("train_ratio", -1.0), ("train_ratio", np.nan), ("train_ratio", np.inf),
        ("train_ratio", "512"),
        ("batch_size", 0), ("batch_size", 2.5), ("batch_length", 1), ("batch_length", True),
        ("imagination_horizon", 0), ("imagination_starts", 0), ("imagination_starts", -3),
        ("gamma", 1.01), ("gamma", -0.1), ("gamma", 0), ("center_advantage", 1), ("critic_lr_scale", -1),
        ("critic_ema_decay", 1.1), ("gae_lambda", 2), ("ent_coef", -1e-3), ("ent_coef", np.nan),
        ("learning_rate", -1e-4), ("learning_rate", "3e-5"), ("warmup_updates", -1),
        ("learning_starts", -1), ("buffer_size", 0),
        ("policy_kwargs", "units=128"), ("replay_buffer_kwargs", "replay/"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r} must be "):
        agent(**{name: value})


@pytest.mark.parametrize("learn", [lambda model: model.learn(1), lambda model: model.pretrain(1)])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("batch_size", 0, "batch_size=0 must be a whole number"),
        ("imagination_starts", 0, "imagination_starts=0 must be a whole number"),
        ("batch_length", 5, "batch_length=5 was assigned to an agent whose replay serves sequences of 8: give it to"),
    ],
)
def test_settings_that_were_assigned_meanwhile_are_checked_before_learning(learn, name, value, says):
    model = agent().learn(20)
    setattr(model, name, value)
    with pytest.raises(ValueError, match=says):
        learn(model)


def test_a_vector_of_gymnasium_is_refused_with_sb3s():
    with pytest.raises(TypeError, match="SB3 has its own"):
        Dreamer("MlpPolicy", gym.make_vec("Pendulum-v1", 2))


@pytest.mark.parametrize(
    ("space", "bad"),
    [(spaces.Discrete(3, start=5), 8), (spaces.Discrete(3), -1), (spaces.MultiDiscrete([2, 3]), [1, 3])],
)
def test_an_observation_that_is_no_choice_of_its_space_is_named(space, bad):
    class Choices(Broken):
        observation_space = space

    model = agent(Choices())
    model.predict(space.sample())
    with pytest.raises(ValueError, match=r"predict\(\) got obs \[.*, expected choices of (Multi)?Discrete"):
        model.predict(np.array(bad))


@pytest.mark.parametrize(
    "setting", [dict(tau=0.5), dict(use_sde=True), dict(optimize_memory_usage=True), dict(policy="CnnPolicy")]
)
def test_settings_of_sac_are_refused_when_loading_too(tmp_path, setting):
    agent().save(tmp_path / "model")
    with pytest.raises(TypeError, match=rf"load\(\) got {next(iter(setting))}, which Dreamer does not have"):
        Dreamer.load(tmp_path / "model", **setting)


def test_a_replay_does_not_take_the_place_of_one_that_is_kept_on_disk(tmp_path):
    agent().learn(20).save_replay_buffer(tmp_path / "replay")
    on_disk = agent(replay_buffer_kwargs=dict(storage_path=tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"keeps its replay in .*folder, the one of .*replay was in memory"):
        on_disk.load_replay_buffer(tmp_path / "replay")
    on_disk.learn(20)
    assert (tmp_path / "folder").exists()


def test_an_agent_without_an_environment_is_asked_for_one():
    with pytest.raises(ValueError, match=r"a new agent needs an environment, .*: give env="):
        Dreamer("MlpPolicy", None)


def test_a_single_dream_cannot_be_centered():
    with pytest.raises(ValueError, match="imagination_starts=2 or more, or center_advantage=False"):
        agent(imagination_starts=1)
    agent(imagination_starts=1, center_advantage=False)


@pytest.mark.parametrize(
    ("name", "value"), [("imagination_starts", None), ("gamma", 1), ("ent_coef", 0), ("gae_lambda", 0)]
)
def test_settings_at_their_limits_work(name, value):
    model = agent(**{name: value}).learn(16)
    assert model._n_updates > 0
    assert model._metrics.skips() == 0


def test_sequences_that_the_replay_can_never_hold_are_refused():
    with pytest.raises(ValueError, match=r"buffer_size=100 leaves 50 entries .* use a buffer_size of at least 130"):
        agent(DummyVecEnv([Broken, Broken]), buffer_size=100, batch_length=64)


def test_unknown_sizes_widths_and_models_name_the_known_ones():
    with pytest.raises(ValueError, match=r'model_size="size1g" is unknown; use one of .*size200m'):
        agent(model_size="size1g")
    with pytest.raises(TypeError, match=r"policy is <class .*PPO'>, which has no world model: give one of \['Mlp"):
        Dreamer(PPO, "Pendulum-v1")
    with pytest.raises(ValueError, match=r"policy_kwargs \['gamma', 'model_size'\] are arguments of Dreamer itself"):
        agent("Pendulum-v1", policy_kwargs=dict(model_size="debug", gamma=0.9, units=8))
    with pytest.raises(
        ValueError, match=r"policy_kwargs \['net_arch'\] are unknown; it takes normalize_obs and the widths .*'units'"
    ):
        agent(policy_kwargs=dict(net_arch=[64]))
    with pytest.raises(ValueError, match=r"units=0 in policy_kwargs must be a whole number of at least 1"):
        agent(policy_kwargs=dict(units=0))
    with pytest.raises(ValueError, match=r"units=7.5 in policy_kwargs must be"):
        agent(policy_kwargs=dict(units=7.5))
    with pytest.raises(ValueError, match=r"blocks=4 do not divide a layer of 30 inputs"):
        agent(policy_kwargs=dict(deter=30))
    with pytest.raises(ValueError, match=r'rssm_type="lstm" is unknown; use one of .*gru'):
        agent(rssm_type="lstm")
    with pytest.raises(ValueError, match="Policy MlpLstmPolicy unknown"):
        agent(policy="MlpLstmPolicy")


def test_a_replay_of_transitions_is_refused():
    with pytest.raises(ValueError, match="replay_buffer_class=HerReplayBuffer is no SequenceReplayBuffer"):
        agent(replay_buffer_class=HerReplayBuffer)
    with pytest.raises(ValueError, match="replay_buffer_class='SequenceReplayBuffer' is no SequenceReplayBuffer"):
        agent(replay_buffer_class="SequenceReplayBuffer")


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_that_are_no_agents_are_named(tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match=r"text.zip is not a zip file"):
        Dreamer.load(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.jpg", b"miau")
    with pytest.raises(ValueError, match=r"photos.zip was not saved by Dreamer"):
        Dreamer.load(tmp_path / "photos.zip")
    PPO("MlpPolicy", make_vec_env("CartPole-v1"), n_steps=8, batch_size=8).save(tmp_path / "ppo")
    with pytest.raises(ValueError, match=r"ppo was not saved by Dreamer: load it with the algorithm that saved it"):
        Dreamer.load(tmp_path / "ppo")
    with pytest.raises(FileNotFoundError, match="nothing"):
        Dreamer.load(tmp_path / "nothing")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    agent().save(tmp_path / "model")
    whole = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "model.zip").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model is truncated|model.zip is truncated"):
        Dreamer.load(tmp_path / "model")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_an_observation_that_is_not_finite_in_float32_is_not_acted_on(bad):
    obs = np.zeros((2, 3))
    obs[1, 2] = bad
    with pytest.raises(ValueError, match=r"predict\(\) got obs with a number that is NaN or infinite"):
        agent().predict(obs)


@pytest.mark.parametrize("rssm_type", ["gru", "transformer"])
def test_the_start_of_an_episode_clears_a_state_that_is_not_finite(rssm_type):
    model, obs = agent(rssm_type=rssm_type), np.zeros((2, 3), np.float32)
    spoilt = tuple(np.full_like(part, np.nan) for part in model.predict(obs)[1])
    action, state = model.predict(obs, spoilt, np.array([True, True]), deterministic=True)
    expected, fresh = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(action, expected)
    np.testing.assert_array_equal(state[0], fresh[0])


BOX = gym.spaces.Box(-1, 1, (3,), np.float32)


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (gym.spaces.Dict(a=gym.spaces.Dict(b=BOX)), BOX, "FlattenObservation"),
        (gym.spaces.Dict(a=gym.spaces.Tuple([BOX])), BOX, "FlattenObservation"),
        (gym.spaces.Dict(a=gym.spaces.Text(3)), BOX, "FlattenObservation"),
        (gym.spaces.Dict({}), BOX, "an empty Dict cannot be observed"),
        (gym.spaces.Box(-1, 1, (0,)), BOX, "has a dimension of size 0"),
        (BOX, gym.spaces.Tuple([BOX]), "TransformAction"),
        (BOX, gym.spaces.Dict(a=BOX), "TransformAction"),
        (BOX, gym.spaces.MultiDiscrete([[2, 2], [3, 3]]), "TransformAction"),
        (BOX, gym.spaces.Box(-1, 1, (0,)), "of at least one number"),
    ],
)
def test_spaces_that_do_not_fit_are_refused_with_what_to_do(observations, actions, message):
    class Odd(gym.Env):
        observation_space, action_space = observations, actions

    with pytest.raises(ValueError, match=message):
        agent(Odd(), policy="MultiInputPolicy" if isinstance(observations, gym.spaces.Dict) else "MlpPolicy")


def test_what_is_no_environment_is_named():
    with pytest.raises(TypeError, match="is no environment: give one of Gymnasium, a VecEnv, or the id of one"):
        agent(lambda: gym.make("Pendulum-v1"))


def test_settings_that_there_are_not_are_refused(tmp_path):
    agent("Pendulum-v1").save(tmp_path / "model")
    with pytest.raises(TypeError, match=r"load\(\) got train_ration, which Dreamer does not have"):
        Dreamer.load(tmp_path / "model", train_ration=64)
    assert Dreamer.load(tmp_path / "model", env="Pendulum-v1", train_ratio=64).train_ratio == 64
    again = Dreamer.load(tmp_path / "model", env="Pendulum-v1", stats_window_size=7).learn(1)
    assert again.ep_info_buffer.maxlen == 7
    with pytest.raises(TypeError, match="positional arguments"):
        Dreamer("MlpPolicy", "Pendulum-v1", 3e-4, 100_000)


def test_a_new_agent_tells_that_its_folder_has_entries_of_another_run(tmp_path):
    kwargs = dict(replay_buffer_kwargs=dict(storage_path=str(tmp_path / "replay")))
    agent(**kwargs).learn(5).save(tmp_path / "model")
    with pytest.warns(UserWarning, match="holds 5 entries already"):
        agent(**kwargs)
    Dreamer.load(tmp_path / "model")
