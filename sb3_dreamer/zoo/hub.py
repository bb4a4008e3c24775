"""Publishing: the Zoo's ``push_to_hub``, with a model card that is correct for Dreamer.

With ``HF_HUB_OFFLINE=1`` nothing is uploaded: the folder ``hub/<name>`` is written, for inspection.
``load_from_hub`` downloads pickles; the hub's library allows that only with ``TRUST_REMOTE_CODE=True``.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

CURVE = "learning_curve.png"
# text that rl_zoo3 writes into a card -> the correct text
CARD_REPLACEMENTS = {
    "using the [stable": "using sb3_dreamer, the [stable",
    "python -m rl_zoo3.load_from_hub": "TRUST_REMOTE_CODE=True python -m sb3_dreamer.zoo load_from_hub",
    "python -m rl_zoo3.": "python -m sb3_dreamer.zoo ",
    "pip install rl_zoo3": 'pip install "sb3-dreamer[zoo]"',
}


@contextmanager
def hub_knows_dreamer() -> Iterator[None]:
    """Complete the card of a Dreamer before the upload, and work with all versions of the hub's libraries."""
    import huggingface_hub
    import requests.exceptions
    from huggingface_hub.errors import HfHubHTTPError

    integration = import_module("huggingface_sb3.push_to_hub")
    if not hasattr(integration, "generate_metadata"):  # rl_zoo3 2.9 calls it; sb3-team-hf-integration 3.2 renamed it
        metadata_of = integration._generate_metadata
        integration.generate_metadata = lambda *args: metadata_of(*args).to_dict()  # type: ignore[attr-defined]
    # If a file is missing, rl_zoo3 2.9 expects the exception of requests; huggingface_hub 1.0 raises its own.
    same_exception = patch.object(requests.exceptions, "HTTPError", HfHubHTTPError)
    with same_exception, patch.object(huggingface_hub, "HfApi", Publisher):
        yield


class Publisher:
    """The three methods of the hub's client that ``push_to_hub`` calls; completes the card before the upload."""

    def __init__(self) -> None:
        from huggingface_hub import constants
        from huggingface_hub.hf_api import HfApi

        self.offline = constants.HF_HUB_OFFLINE
        self.endpoint = constants.ENDPOINT
        self.api = HfApi()

    def create_repo(self, repo_id: str, **kwargs: Any) -> str:
        return f"{self.endpoint}/{repo_id}" if self.offline else self.api.create_repo(repo_id, **kwargs)

    def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
        if self.offline:
            local_dir.mkdir(parents=True, exist_ok=True)
        else:
            self.api.snapshot_download(repo_id, local_dir=local_dir)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        complete_card(folder_path)
        if self.offline:
            from wasabi import msg

            msg.warn(f"HF_HUB_OFFLINE is set: nothing is uploaded, see {folder_path.resolve()}")
        else:
            self.api.upload_folder(repo_id=repo_id, folder_path=folder_path, commit_message=commit_message)


def complete_card(folder: Path) -> None:
    """Put the learning curve and working commands into the card of a Dreamer; other cards remain unchanged.

    :param folder: what ``push_to_hub`` is about to upload.
    """
    card = folder / "README.md"
    text = card.read_text("utf-8")
    if "**Dreamer** Agent" not in text:
        return
    for written, correct in CARD_REPLACEMENTS.items():
        text = text.replace(written, correct)
    if draw_learning_curve(folder):
        text = text.replace("\n## Usage", f"\n![Learning curve]({CURVE})\n\n## Usage", 1)
    card.write_text(text, "utf-8")


def draw_learning_curve(folder: Path) -> bool:
    """Draw ``learning_curve.png`` from the evaluations of the run, or from its training episodes if it had none.

    :param folder: holds ``train_eval_metrics.zip``.
    :return: whether there was anything to draw.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    from stable_baselines3.common.monitor import LoadMonitorResultsError
    from stable_baselines3.common.results_plotter import load_results, ts2xy, window_func

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    with tempfile.TemporaryDirectory() as metrics, zipfile.ZipFile(folder / "train_eval_metrics.zip") as archive:
        archive.extractall(metrics)
        evaluations = Path(metrics, "evaluations.npz")
        if evaluations.is_file():
            data = np.load(evaluations)
            steps, returns = data["timesteps"], data["results"]
            mean, std = returns.mean(1), returns.std(1)
            axes.plot(steps, mean, marker=".")
            axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
            axes.set(ylabel=f"return, {returns.shape[1]} evaluation episodes", xlabel="environment steps")
        else:
            try:
                steps, returns = ts2xy(load_results(metrics), "timesteps")
            except LoadMonitorResultsError:
                returns = np.zeros(0)
            if len(returns) == 0:
                plt.close(figure)
                return False
            window = min(10, len(returns))
            axes.plot(*window_func(steps, returns, window, np.mean))
            axes.set(ylabel=f"return, mean of {window} training episodes", xlabel="environment steps")
    axes.grid(alpha=0.3)
    figure.savefig(folder / CURVE, dpi=120)
    plt.close(figure)
    return True
