import inspect
from importlib import import_module

import gymnasium as gym
import pytest
import yaml

from sb3_dreamer import Dreamer
from sb3_dreamer.zoo import hyperparams_file, register

BLOCKS = yaml.safe_load(hyperparams_file().read_text("utf-8"))
DEFAULTS = {name: p.default for name, p in inspect.signature(Dreamer.__init__).parameters.items()}
MUJOCO = ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "Swimmer", "Reacher", "Pusher"]
MUJOCO += ["InvertedPendulum", "InvertedDoublePendulum"]


@pytest.fixture(scope="module")
def check():
    register()
    from sb3_dreamer.zoo.experiment import check_hyperparameters

    return check_hyperparameters


def test_promised_environments_have_blocks():
    promised = {"default", "atari", "Pendulum-v1", "CartPole-v1", "dm_control/walker-walk-v0"}
    promised |= {f"{name}-{version}" for name in MUJOCO for version in ("v4", "v5")}
    assert promised <= BLOCKS.keys()


def test_every_block_is_of_an_environment_that_exists():
    import shimmy

    gym.register_envs(shimmy)
    assert BLOCKS.keys() - gym.registry.keys() == {"default", "atari"}


@pytest.mark.parametrize("env_id", BLOCKS)
def test_a_block_names_steps_policy_and_nothing_unknown(check, env_id):
    assert {"n_timesteps", "policy"} <= BLOCKS[env_id].keys()
    check(BLOCKS[env_id], "dreamer.yml")


@pytest.mark.parametrize("env_id", BLOCKS)
def test_a_block_does_not_repeat_defaults_of_the_constructor(env_id):
    repeated = [name for name, value in BLOCKS[env_id].items() if name in DEFAULTS and DEFAULTS[name] == value]
    assert repeated == []


@pytest.mark.parametrize("env_id", [env_id for env_id in BLOCKS if "env_wrapper" in BLOCKS[env_id]])
def test_a_block_gives_its_wrappers_arguments_that_they_have(env_id):
    for entry in BLOCKS[env_id]["env_wrapper"]:
        [(wrapper, arguments)] = entry.items() if isinstance(entry, dict) else [(entry, {})]
        module, _, name = wrapper.rpartition(".")
        inspect.signature(getattr(import_module(module), name)).bind("environment", **arguments)


@pytest.mark.parametrize(
    ("given", "meant"), [("train_ration", "train_ratio"), ("horizon", "imagination_horizon"), ("n_env", "n_envs")]
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(check, given, meant):
    with pytest.raises(ValueError, match=f'"{given}" .* did you mean "{meant}"'):
        check({"policy": "MlpPolicy", given: 1}, "my.yml")


def test_where_no_known_name_is_near_none_is_guessed(check):
    with pytest.raises(ValueError, match=r'"tau" .* is not a hyperparameter of Dreamer\. Available: actor_lr_scale'):
        check({"tau": 0.01}, "my.yml")


def test_what_the_zoo_passes_itself_is_no_hyperparameter(check):
    with pytest.raises(ValueError, match=r'"seed" .* is not a hyperparameter'):
        check({"seed": 1}, "my.yml")


def test_a_number_that_yaml_takes_for_text_is_refused_and_a_schedule_is_not(check):
    block = yaml.safe_load("{ent_coef: 3e-4, learning_rate: lin_4e-4}")
    with pytest.raises(ValueError, match="ent_coef: 3e-4 is text to YAML; write ent_coef: !!float 3e-4"):
        check(block, "my.yml")
    check({"learning_rate": block["learning_rate"], "ent_coef": "lin_4e-4"}, "my.yml")


def test_the_weight_of_the_entropy_may_be_a_schedule():
    register()
    from sb3_dreamer.zoo.experiment import DreamerExperiment

    read = DreamerExperiment._preprocess_schedules({"ent_coef": "lin_4e-3_1e-3_0.5", "learning_rate": "lin_4e-4"})
    assert [read["ent_coef"](left) for left in (1.0, 0.75, 0.5, 0.0)] == pytest.approx([4e-3, 2.5e-3, 1e-3, 1e-3])
    assert [read["learning_rate"](left) for left in (1.0, 0.0)] == [4e-4, 0]
    assert DreamerExperiment._preprocess_schedules({"ent_coef": 3e-4}) == {"ent_coef": 3e-4}


@pytest.mark.parametrize("text", ["lin", "lin_", "exp_1e-3", "lin_1e-3_1e-4", "lin_1e-3_1e-4_0", "lin_1e-3_1e-4_2"])
def test_what_is_no_schedule_is_refused(text):
    from sb3_dreamer.zoo.schedules import linear_schedule

    with pytest.raises(ValueError, match=f'"{text}" is no schedule: write lin_<start> or lin_<start>_<end>_<end_frac'):
        linear_schedule(text)
