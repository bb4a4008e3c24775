"""save() and load(): everything comes back, and no file is ever half there."""

import copy
import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize

from sb3_dreamer import Dreamer
from sb3_dreamer.policies import MlpPolicy

DEBUG = dict(model_size="debug", learning_starts=12, batch_size=2, batch_length=8, buffer_size=500, train_ratio=8,
             imagination_horizon=2, imagination_starts=2, seed=0, device="cpu")  # fmt: skip

WITHOUT_REPLAY = pytest.mark.filterwarnings("ignore:the replay is empty")


def agent(env="Pendulum-v1", **settings) -> Dreamer:
    return Dreamer("MlpPolicy", env, **{**DEBUG, **settings})


@pytest.fixture(scope="module")
def model() -> Dreamer:
    return agent(gamma=0.9, learning_rate=1e-3, policy_kwargs=dict(units=24)).learn(40)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return path


def tensors(value) -> list[th.Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, th.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in tensors(one)] if isinstance(value, list | tuple) else []


def same(first, second) -> bool:
    return all(th.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


# -- round trips -------------------------------------------------------------------------------------------------------


def test_a_loaded_agent_has_the_parameters_the_moments_and_the_settings(model, saved):
    loaded = Dreamer.load(saved, device="cpu")
    assert same(loaded.get_parameters(), model.get_parameters())
    assert len(tensors(loaded.get_parameters())) > 50
    names = (
        "num_timesteps",
        "_n_updates",
        "_entries_owed",
        "gamma",
        "batch_length",
        "train_ratio",
        "model_size",
        "seed",
    )
    assert [getattr(loaded, name) for name in names] == [getattr(model, name) for name in names]
    assert loaded.policy_kwargs == dict(units=24)
    assert loaded.policy.world_model.gamma == 0.9
    obs = np.zeros(3, np.float32)
    assert loaded.predict(obs, deterministic=True)[0] == model.predict(obs, deterministic=True)[0]


def test_what_is_saved_is_small_and_has_no_pickled_tensors(saved):
    data, params, variables = load_from_zip_file(saved)
    assert sorted(params) == ["policy", "policy.optimizer"]
    assert not variables
    online = {
        "env",
        "replay_buffer",
        "_last_obs",
        "_last_original_obs",
        "_online_state",
        "_metrics",
        "_logger",
        "policy",
    }
    assert not online & data.keys()
    assert not tensors({key: value for key, value in data.items() if isinstance(value, dict | list | th.Tensor)})


def test_suffix_and_folders_come_by_themselves(model, tmp_path):
    model.save(tmp_path / "a" / "b" / "model")
    model.save(str(tmp_path / "model.zip"))
    model.save(str(tmp_path / "model_v0.5"))
    model.save_replay_buffer(tmp_path / "a" / "replay")
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {os.path.join("a", "b", "model.zip"), "model.zip", "model_v0.5", os.path.join("a", "replay.pkl")}
    Dreamer.load(tmp_path / "a" / "b" / "model")


def test_open_files_are_written_and_read(model):
    file, replay = io.BytesIO(), io.BytesIO()
    model.save(file)
    model.save_replay_buffer(replay)
    file.seek(0)
    replay.seek(0)
    loaded = Dreamer.load(file, device="cpu")
    loaded.load_replay_buffer(replay)
    assert same(loaded.get_parameters(), model.get_parameters())
    assert loaded.replay_buffer.size() == model.replay_buffer.size()


def test_include_and_exclude_are_heeded(model):
    file = io.BytesIO()
    model.save(file, exclude=["ep_info_buffer"], include=["_last_obs"])
    file.seek(0)
    data, _, _ = load_from_zip_file(file)
    assert "ep_info_buffer" not in data
    assert np.array_equal(data["_last_obs"], model._last_obs)


def test_the_replay_has_a_file_of_its_own(model, tmp_path):
    with pytest.raises(ValueError, match=r"call save_replay_buffer\(path\)"):
        model.save(tmp_path / "model", include=["replay_buffer"])
    assert not list(tmp_path.iterdir())


# -- environments ------------------------------------------------------------------------------------------------------


@WITHOUT_REPLAY
def test_an_agent_without_an_environment_acts_and_learns_when_it_is_given_one(saved):
    loaded = Dreamer.load(saved, device="cpu")
    assert loaded.get_env() is None
    with pytest.raises(AssertionError, match="environment"):
        loaded.learn(5)
    loaded.set_env(make_vec_env("Pendulum-v1"))
    loaded.learn(5, reset_num_timesteps=False)
    assert loaded.num_timesteps == 45
    evaluate_policy(loaded, make_vec_env("Pendulum-v1"), n_eval_episodes=1)


@WITHOUT_REPLAY
def test_load_may_change_the_number_of_environments_and_set_env_may_not(saved):
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1", 3), device="cpu", learning_starts=24)
    assert loaded.replay_buffer.n_envs == loaded.n_envs == 3
    updates = loaded._n_updates
    loaded.learn(36)
    assert loaded._n_updates > updates
    with pytest.raises(AssertionError, match="number of environments"):
        loaded.set_env(make_vec_env("Pendulum-v1", 2))


def test_other_spaces_are_refused(model, saved):
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        Dreamer.load(saved, env=make_vec_env("CartPole-v1"))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(make_vec_env("CartPole-v1"))


@WITHOUT_REPLAY
def test_a_loaded_agent_waits_for_data_acts_as_it_learned_and_does_not_explore(saved, monkeypatch):
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), device="cpu")
    monkeypatch.setattr(loaded.action_space, "sample", lambda: pytest.fail("random action"))
    updates = loaded._n_updates
    loaded.learn(11)
    assert loaded._n_updates == updates
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded._n_updates == updates + (31 - 11) * 8 // 16


# -- settings at load --------------------------------------------------------------------------------------------------


@WITHOUT_REPLAY
def test_the_learning_rate_given_to_load_is_used(saved):
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), device="cpu", learning_rate=7e-5)
    loaded.learn(30)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 7e-5
    still = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), device="cpu", learning_rate=0.0)
    before = {name: value.clone() for name, value in still.policy.named_parameters()}
    still.learn(30)
    assert still._n_updates > loaded._n_updates - 1
    slow = "critic.slow."
    assert all(th.equal(value, before[name]) for name, value in still.policy.named_parameters() if slow not in name)


@WITHOUT_REPLAY
def test_the_rates_given_to_load_are_used_whatever_the_saved_optimiser_says(saved):
    env = make_vec_env("Pendulum-v1")
    rates = dict(actor_lr_scale=0.0, critic_lr_scale=0.5, critic_ema_decay=0.0, warmup_updates=0)
    loaded = Dreamer.load(saved, env=env, device="cpu", **rates)
    before = {name: value.clone() for name, value in loaded.policy.state_dict().items()}
    loaded.learn(30)
    moved = {name for name, value in loaded.policy.state_dict().items() if not th.equal(value, before[name])}
    assert not any(name.startswith("actor.") for name in moved)
    assert any(name.startswith("critic.fast.") for name in moved)
    assert [group["warmup_steps"] for group in loaded.policy.optimizer.param_groups] == [0, 0, 0]
    assert [group["lr_scale"] for group in loaded.policy.optimizer.param_groups] == [1.0, 0.0, 0.5]
    critic = loaded.policy.critic
    assert all(
        th.equal(slow, fast) for slow, fast in zip(critic.slow.parameters(), critic.fast.parameters(), strict=True)
    )


def test_settings_given_to_load_are_used_and_checked(saved):
    loaded = Dreamer.load(saved, batch_length=16, gamma=0.5, train_ratio=3)
    assert loaded.replay_buffer.sequence_length == 16
    assert (loaded.gamma, loaded.train_ratio) == (0.5, 3)
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1"):
        Dreamer.load(saved, batch_size=0)
    with pytest.raises(ValueError, match="policy kwargs"):
        Dreamer.load(saved, policy_kwargs=dict(units=8))


@WITHOUT_REPLAY
def test_a_discount_given_to_load_holds_for_the_continue_head_from_the_next_update_on(model, saved, tmp_path):
    """Until then it predicts ends under the discount that it has learned: another one would make up ends, or none."""
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), device="cpu", gamma=0.5)
    features = th.randn(20, model.policy.world_model.feature_width)
    own, other = (agent.policy.world_model.predict_continue(features) for agent in (model, loaded))
    th.testing.assert_close(other, own)
    loaded.save(tmp_path / "again")
    assert Dreamer.load(tmp_path / "again").policy.world_model.gamma == 0.9
    loaded.learn(30)
    assert loaded.policy.world_model.gamma == 0.5
    loaded.policy.save(tmp_path / "policy.pth")
    assert MlpPolicy.load(tmp_path / "policy.pth", device="cpu").world_model.gamma == 0.5


@WITHOUT_REPLAY
def test_updates_owed_when_the_agent_was_saved_wait_for_data(model, tmp_path):
    model.save(tmp_path / "model")
    env = make_vec_env("Pendulum-v1")
    loaded = Dreamer.load(tmp_path / "model", env=env, device="cpu", batch_size=1, batch_length=2)
    loaded._entries_owed, updates = 15.5, loaded._n_updates  # most of an update of 2 x 8, or 7 of these
    loaded.learn(11)
    assert loaded._n_updates == updates
    assert loaded._entries_owed == 15.5
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded._n_updates == updates + (15.5 + 8) // 2


# -- parameters --------------------------------------------------------------------------------------------------------


def test_parameters_go_from_agent_to_agent(model):
    other = agent(policy_kwargs=dict(units=24), seed=5)
    assert not same(other.policy.state_dict(), model.policy.state_dict())
    other.set_parameters(model.get_parameters())
    assert same(other.get_parameters(), model.get_parameters())
    before = copy.deepcopy(model.get_parameters())
    other.learn(40)
    assert same(model.get_parameters(), before), "they are copies, the optimizer's moments too"


def test_parameters_come_from_a_file_too(model, saved):
    other = agent(policy_kwargs=dict(units=24), seed=5)
    other.set_parameters(str(saved))
    assert same(other.get_parameters(), model.get_parameters())


def test_unknown_and_missing_names_are_refused(model):
    params = model.get_parameters()
    with pytest.raises(ValueError, match="unknown: actor_of_somebody"):
        model.set_parameters({**params, "actor_of_somebody": {}})
    with pytest.raises(ValueError, match="do not match"):
        model.set_parameters({"policy": params["policy"]})
    model.set_parameters({"policy": params["policy"]}, exact_match=False)


def test_an_optimizer_of_another_agent_is_refused_before_anything_is_changed(model):
    before = [t.clone() for t in tensors(model.policy.state_dict())]
    params = copy.deepcopy(model.get_parameters())
    params["policy.optimizer"]["param_groups"][0]["params"].pop()
    for tensor in params["policy"].values():
        tensor.mul_(2)
    with pytest.raises(ValueError, match=r"optimizer's parameters belong to another agent: groups of .* Nothing was"):
        model.set_parameters(params)
    assert same(before, model.policy.state_dict())


def test_learning_on_without_the_replay_is_warned_of(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = Dreamer.load(tmp_path / "model", env=make_vec_env("Pendulum-v1"))
    with pytest.warns(UserWarning, match="the replay is empty.*load_replay_buffer"):
        loaded.learn(3, reset_num_timesteps=False)


def test_parameters_of_other_spaces_are_refused_before_anything_is_changed(model, tmp_path):
    agent("MountainCarContinuous-v0", policy_kwargs=dict(units=24)).save(tmp_path / "car")
    before = [t.clone() for t in tensors(model.policy.state_dict())]
    with pytest.raises(ValueError, match=r"with other spaces or widths: .* has shape .* Nothing was changed"):
        model.set_parameters(str(tmp_path / "car"))
    assert same(before, model.policy.state_dict())


# -- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["model.zip", "replay.pkl"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(model, tmp_path, what, monkeypatch):
    save = model.save if what == "model.zip" else model.save_replay_buffer
    save(tmp_path / what)
    before = (tmp_path / what).read_bytes()

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / what)
    assert (tmp_path / what).read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [what]


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_file(model, tmp_path):
    model.save(tmp_path / "model.zip")
    before = (tmp_path / "model.zip").read_bytes()
    code = f"""
import os, torch
from sb3_dreamer import Dreamer
model = Dreamer.load({str(tmp_path / "model.zip")!r}, device="cpu")
torch.save = lambda *args: os.kill(os.getpid(), 9)
model.save({str(tmp_path / "model.zip")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -9
    assert (tmp_path / "model.zip").read_bytes() == before
    assert zipfile.ZipFile(tmp_path / "model.zip").testzip() is None


def test_a_saved_file_may_be_read_by_whom_the_umask_lets(model, tmp_path):
    before = os.umask(0o022)
    try:
        model.save(tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model.zip").stat().st_mode & 0o777 == 0o644


# -- the replay --------------------------------------------------------------------------------------------------------


def test_a_loaded_replay_is_learned_from_at_once_and_its_next_entry_begins_an_episode(model, saved, tmp_path):
    model.save_replay_buffer(tmp_path / "replay")
    loaded = Dreamer.load(saved, env=make_vec_env("Pendulum-v1"), device="cpu")
    loaded.load_replay_buffer(tmp_path / "replay")
    updates, size = loaded._n_updates, model.replay_buffer.size()
    loaded.learn(4)
    assert loaded._n_updates == updates + 2
    flags = loaded.replay_buffer._storage.arrays["flags"]
    assert flags[[size - 1, size, size + 1]].tolist() == [2, 1, 0]  # last, first, neither


def test_a_replay_loaded_in_the_middle_of_an_episode_is_not_continued_by_it(model, tmp_path):
    model.save_replay_buffer(tmp_path / "replay")
    other = agent(policy_kwargs=dict(units=24)).learn(5)
    other.load_replay_buffer(tmp_path / "replay")
    size = other.replay_buffer.size()
    other.learn(2, reset_num_timesteps=False)
    assert other.replay_buffer._storage.arrays["flags"][[size - 1, size, size + 1]].tolist() == [2, 1, 0]


def test_a_pickled_replay_has_the_rows_in_use_only(model):
    assert len(pickle.dumps(model.replay_buffer)) < model.replay_buffer.nbytes / 5


# -- what is damaged or missing, and links -----------------------------------------------------------------------------


def test_missing_parameters_leave_the_agent_as_it_was(model):
    other = agent(policy_kwargs=dict(units=24), seed=5)
    before = copy.deepcopy(other.get_parameters())
    with pytest.raises(ValueError, match=r"missing: policy\.optimizer .* Nothing was changed"):
        other.set_parameters({"policy": model.get_parameters()["policy"]})
    assert same(other.get_parameters(), before)
    other.set_parameters({"policy": model.get_parameters()["policy"]}, exact_match=False)
    assert same(other.policy.state_dict(), model.policy.state_dict())


def test_a_truncated_replay_is_named(model, tmp_path):
    path = tmp_path / "replay.pkl"
    model.save_replay_buffer(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"replay\.pkl is damaged or no saved replay"):
        model.load_replay_buffer(path)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", ["latest.zip", "latest"])
def test_a_link_stays_a_link(model, tmp_path, name):
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.zip"
    link.symlink_to(tmp_path / "real" / "model.zip")
    model.save(tmp_path / name)
    assert link.is_symlink()
    assert Dreamer.load(tmp_path / "real" / "model.zip").num_timesteps == model.num_timesteps


def test_who_learned_with_statistics_is_warned_of_an_environment_without(tmp_path):
    normalized = VecNormalize(make_vec_env("Pendulum-v1"))
    settings = dict(model_size="debug", learning_starts=10, batch_size=2, batch_length=8, train_ratio=16, seed=0)
    Dreamer("MlpPolicy", normalized, **settings).learn(12).save(tmp_path / "model")
    Dreamer.load(tmp_path / "model")  # who acts without an environment may normalize on their own
    Dreamer.load(tmp_path / "model", env=normalized)
    told = "learned from what a VecNormalize made of the observations, and its environment has none"
    with pytest.warns(UserWarning, match=told) as warned:
        model = Dreamer.load(tmp_path / "model", env="Pendulum-v1")
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="the replay is empty"), pytest.warns(UserWarning, match=told):
        model.learn(5)


def test_who_learned_with_statistics_is_warned_of_new_ones(tmp_path):
    normalized = VecNormalize(make_vec_env("Pendulum-v1"))
    settings = dict(model_size="debug", learning_starts=10, batch_size=2, batch_length=8, train_ratio=16, seed=0)
    Dreamer("MlpPolicy", normalized, **settings).learn(12).save(tmp_path / "model")
    normalized.save(tmp_path / "statistics.pkl")
    with pytest.warns(UserWarning, match="has seen no observation yet, .*VecNormalize.load") as warned:
        Dreamer.load(tmp_path / "model", env=VecNormalize(make_vec_env("Pendulum-v1")))
    assert warned[0].filename == __file__
    Dreamer.load(tmp_path / "model", env=VecNormalize.load(tmp_path / "statistics.pkl", make_vec_env("Pendulum-v1")))


def test_who_learned_without_statistics_is_warned_of_an_environment_that_normalises(tmp_path):
    settings = dict(model_size="debug", learning_starts=10, batch_size=2, batch_length=8, train_ratio=16, seed=0)
    Dreamer("MlpPolicy", "Pendulum-v1", **settings).learn(12).save(tmp_path / "model")
    Dreamer.load(tmp_path / "model", env=VecNormalize(make_vec_env("Pendulum-v1"), norm_obs=False))
    with pytest.warns(UserWarning, match="learned from observations as they are, and VecNormalize") as warned:
        Dreamer.load(tmp_path / "model", env=VecNormalize(make_vec_env("Pendulum-v1")))
    assert warned[0].filename == __file__
