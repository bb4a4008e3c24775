"""`load_replay_buffer` of the agent: what fits goes on, what does not is named."""

import pickle

import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_dreamer import Dreamer

SETTINGS = dict(model_size="debug", learning_starts=20, batch_size=4, batch_length=16, buffer_size=1_000, train_ratio=8)


def agent(n_envs: int = 1, **settings) -> Dreamer:
    return Dreamer("MlpPolicy", make_vec_env("CartPole-v1", n_envs), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    model = agent().learn(60)
    model.save_replay_buffer(folder / "replay_buffer.pkl")
    return model, folder / "replay_buffer.pkl"


def test_a_new_agent_goes_on_with_the_saved_entries(trained):
    model, path = trained
    other = agent()
    other.load_replay_buffer(path, truncate_last_traj=True)
    assert other.replay_buffer.size() == model.replay_buffer.size() > 60
    other.learn(10)
    assert other.replay_buffer.size() >= model.replay_buffer.size() + 10
    assert other._n_updates > 0  # no second random phase


@pytest.mark.parametrize(
    "settings", [dict(n_envs=2), dict(batch_length=32), dict(model_size="debug", policy_kwargs=dict(deter=64))]
)
def test_a_replay_of_another_shape_is_refused(trained, settings):
    with pytest.raises(ValueError, match=r"has (n_envs|sequence_length|latent_size)=\d+, this agent \d+"):
        agent(**settings).load_replay_buffer(trained[1])


def test_a_pickle_of_something_else_is_refused(tmp_path):
    path = tmp_path / "replay_buffer.pkl"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(
        ValueError, match=r"holds a list, but .* add_experience\(path\) imports the transitions of SB3's buffers"
    ):
        agent().load_replay_buffer(path)


def test_a_replay_of_another_version_is_refused(trained, tmp_path):
    path = tmp_path / "replay_buffer.pkl"
    older = pickle.loads(trained[1].read_bytes())
    del older.code
    path.write_bytes(pickle.dumps(older))
    with pytest.raises(ValueError, match=r"replay_buffer\.pkl was saved by other versions of these packages \(.*code"):
        agent().load_replay_buffer(path)
    path.write_bytes(trained[1].read_bytes().replace(b"sb3_dreamer.replay.rings", b"sb3_dreamer.replay.wheel"))
    with pytest.raises(ValueError, match=r"other versions of these packages \(No module named 'sb3_dreamer.replay.wh"):
        agent().load_replay_buffer(path)
