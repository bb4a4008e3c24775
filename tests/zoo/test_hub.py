"""What is published: the card next to the model."""

import zipfile
from pathlib import Path

from sb3_dreamer.zoo.hub import complete_card

CARD = """# **Dreamer** Agent playing **Pendulum-v1**
This is a trained model using the [stable-baselines3 library](https://github.com/DLR-RM/stable-baselines3).

## Usage
```
pip install rl_zoo3
python -m rl_zoo3.load_from_hub --algo dreamer --env Pendulum-v1 -orga me -f logs/
python -m rl_zoo3.enjoy --algo dreamer --env Pendulum-v1  -f logs/
```
"""


def folder_with(tmp_path: Path, monitor: str) -> Path:
    (tmp_path / "README.md").write_text(CARD)
    with zipfile.ZipFile(tmp_path / "train_eval_metrics.zip", "w") as archive:
        if monitor:
            archive.writestr("0.monitor.csv", monitor)
    return tmp_path


def test_the_card_has_the_learning_curve_and_commands_that_work(tmp_path: Path):
    log = '#{"t_start": 0, "env_id": "Pendulum-v1"}\nr,l,t\n-1200,200,1\n-900,200,2\n'
    complete_card(folder_with(tmp_path, log))
    card = (tmp_path / "README.md").read_text()
    assert "![Learning curve](learning_curve.png)" in card
    assert (tmp_path / "learning_curve.png").stat().st_size > 1000
    assert "TRUST_REMOTE_CODE=True python -m sb3_dreamer.zoo load_from_hub --algo dreamer" in card
    assert "\npython -m sb3_dreamer.zoo enjoy --algo dreamer" in card
    assert 'pip install "sb3-dreamer[zoo]"' in card


def test_a_run_without_a_finished_episode_is_published_without_a_curve(tmp_path: Path):
    for log in ('#{"t_start": 0, "env_id": "Pendulum-v1"}\nr,l,t\n', ""):
        complete_card(folder_with(tmp_path, log))
        card = (tmp_path / "README.md").read_text()
        assert "Learning curve" not in card
        assert "sb3_dreamer.zoo enjoy" in card
        assert not (tmp_path / "learning_curve.png").exists()
