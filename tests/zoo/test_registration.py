import subprocess
import sys
from pathlib import Path

import pytest

from sb3_dreamer import Dreamer
from sb3_dreamer.zoo import hyperparams_file, register, registration
from sb3_dreamer.zoo.patches import child_command

ROOT = Path(__file__).resolve().parents[2]


def test_register_adds_dreamer_in_place_and_twice_is_once():
    from rl_zoo3 import exp_manager, train
    from rl_zoo3.utils import ALGOS

    others = {name: algo for name, algo in ALGOS.items() if name != "dreamer"}
    for _ in range(2):
        register()
        assert others | {"dreamer": Dreamer} == ALGOS
    assert train.ALGOS is exp_manager.ALGOS is ALGOS
    assert {
        "dreamer",
        "sac",
        "ppo",
    } <= exp_manager.HYPERPARAMS_SAMPLER.keys() & exp_manager.HYPERPARAMS_CONVERTER.keys()


def test_import_of_the_wing_brings_no_rl_zoo3():
    code = "import sys, sb3_dreamer.zoo; print('rl_zoo3' in sys.modules, 'optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("module", ["rl_zoo3", "seaborn"])
def test_a_missing_library_names_the_pip_command(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'{module} not found.* pip install "sb3-dreamer\[zoo\]"'):
        registration.require("optuna", module)


def test_packaged_hyperparameters_are_found_in_a_checkout_and_in_a_wheel(monkeypatch, tmp_path):
    assert hyperparams_file() == ROOT / "zoo_hyperparams" / "dreamer.yml"
    monkeypatch.setattr(registration, "__file__", str(tmp_path / "sb3_dreamer" / "zoo" / "registration.py"))
    with pytest.raises(FileNotFoundError, match="-conf"):
        hyperparams_file()
    beside = tmp_path / "sb3_dreamer" / "zoo" / "dreamer.yml"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert hyperparams_file() == beside


def test_programs_of_the_zoo_start_through_this_package_and_others_as_they_are():
    here = [sys.executable, "-m", "sb3_dreamer.zoo"]
    assert child_command(["python", "-m", "rl_zoo3.record_video", "-n", "5"]) == [*here, "record_video", "-n", "5"]
    assert child_command(["python", "enjoy.py", "--no-render"]) == [*here, "enjoy", "--no-render"]
    assert child_command(["ffmpeg", "-i", "a.mp4"]) == ["ffmpeg", "-i", "a.mp4"]
