"""What is exported: the best weights of a finished run, with all that its files say of them.

In: the folder of a run, and its dataset. Out: `Trained`, and the words that travel inside the exported file. Invariants:
nothing is known here of any dataset in particular; weights, results and dataset belong together, or are refused.
"""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import nn

from harness.config import Config, Data
from harness.evaluation.results import Results, read_results
from harness.evaluation.trained import Choices, open_trained
from harness.model.build import build_model
from harness.run.checkpoint import load_model
from harness.run.provenance import Checkpoint
from shards.files import sha256
from shards.index import Dataset, load
from shards.storage import is_url


@dataclass(frozen=True)
class Trained:
    """A finished run.

    model: with the best weights, on the CPU in float32, in evaluation mode. weights: where they are from. weights_sha256: of
    their file. config: settings of the run, with the mean and deviation of the weights and the path of the dataset. results:
    its metrics.json. dataset: the one it was trained on. temperature: that logits are divided by, 1 for none.
    """

    model: nn.Module
    weights: Checkpoint
    weights_sha256: str
    config: Config
    results: Results
    dataset: Dataset
    temperature: float = 1.0

    @property
    def classes(self) -> tuple[str, ...]:
        """The C names of the model's outputs, in their order."""
        return self.weights.provenance.classes

    @property
    def name(self) -> str:
        """The model's name in this harness, such as resnet50 or timm/vit_small_patch16_224."""
        return self.config.model.name

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of the dataset's images, in pixels."""
        return self.dataset.width, self.dataset.height


def load_trained(run: Path, data: Path | str | None) -> Trained:
    """Open a finished run; without a temperature, since that of its results is of averages over views.

    Args:
        data: where its dataset is now; None for where its settings have it.

    Raises:
        FileNotFoundError: no run, no best weights, no results, or no dataset, with what to do.
        ValueError: what is damaged, of another format, or does not belong to the run.
    """
    opened = open_trained(run, Choices(data=data))
    config, weights = opened.config, opened.weights
    results = read_results(run)
    if results.best_epoch != weights.progress.best_epoch or results.trained_on != weights.provenance.dataset:
        raise ValueError(
            f"{run / 'metrics.json'} is of epoch {results.best_epoch}, the best weights are of epoch "
            f"{weights.progress.best_epoch}. Let the training finish: start its command again."
        )
    dataset = _find_dataset(config.data, weights.provenance.dataset)
    model = build_model(config.model.name, len(opened.classes)).eval().requires_grad_(False)
    load_model(weights, model)
    digest = sha256(weights.folder / "model.safetensors")
    return Trained(model, weights, digest, config, results, dataset)


def _find_dataset(data: Data, fingerprint: str) -> Dataset:
    """The dataset of that fingerprint."""
    if not is_url(data.path) and not (Path(data.path) / "dataset.json").is_file():
        raise FileNotFoundError(
            f"The dataset of the run is not in {data.path}, and the exported file is checked on its validation split. Say where "
            "it is now: --data FOLDER"
        )
    dataset = load(data.path, data.access)
    if dataset.fingerprint != fingerprint:
        raise ValueError(
            f"{dataset.folder} holds the dataset {dataset.fingerprint[:12]}, but the run was trained on {fingerprint[:12]}. Name the "
            "folder of that one: --data FOLDER"
        )
    return dataset


def metadata(trained: Trained, preprocessing: str, thresholds: list[dict]) -> dict[str, str]:
    """What travels inside the exported file, by name; what is no plain word is JSON.

    Args:
        preprocessing: inside or outside. thresholds: as from `scoring.choose_thresholds`.
    """
    description, augment = trained.dataset.description, trained.config.augment
    mean, std = augment.normalization
    words = {
        "model": trained.name,
        "classes": json.dumps(list(trained.classes), ensure_ascii=False),
        "thresholds": json.dumps(thresholds, ensure_ascii=False),
        "temperature": json.dumps(trained.temperature),
        "preprocessing": preprocessing,
        "stored_size": json.dumps(list(trained.stored)),
        "fit": description.fit,
        "input_size": json.dumps(trained.results.image_size),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "license": description.license,
        "citation": description.citation,
        "dataset": trained.weights.provenance.dataset,
        "weights_sha256": trained.weights_sha256,
        "harness_version": _own_version(),
    }
    assert all(isinstance(word, str) for word in words.values())
    return words


def _own_version() -> str:
    try:
        return version("dermharness")
    except PackageNotFoundError:  # run from its folder, by PYTHONPATH
        return "not installed"
