"""What a checkpoint says of itself: how far it is, and what its weights were made of.

In: a `Progress` and a `Provenance`, or a checkpoint's folder. Out: `progress.json`, or a `Checkpoint`. Invariants: what an older
version did not write yet has the value that held then; a folder of a newer version, or one that says what none says, is refused.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.config.sections import MEAN, STD
from harness.run.progress import Progress
from shards.groups import GroupFile, Groups, read_hashes
from shards.shape import misfit, parse_json

PROGRESS_FILE, GROUPS_FILE = "progress.json", "train-groups.npy"
GROUPS_NAMED = (
    "train-groups.json"  # in place of GROUPS_FILE, where the groups are too many to be copied into each checkpoint
)
NAMED_SHAPE = {"path": str, "sha256": str, "groups": int}
FORMAT = 2
SHAPE = {  # of progress.json
    "format": int,
    "progress": {
        **dict.fromkeys(
            (
                *("epoch", "samples_seen", "step", "best_step", "best_epoch", "epochs_without_improvement"),
                *("skipped_steps", "micro_batch"),
            ),
            int,
        ),
        **{"monitor": str, "best": (float, None), "loss": float, "correct": float, "images": float},
    },
    "provenance": {"model": str, "classes": [str], "dataset": str, "order": str, "mean": [float], "std": [float]},
}
# Added to progress.json within the format, with what held before.
ADDED = {"skipped_steps": 0, "micro_batch": 0, "monitor": ""}
ADDED_PROVENANCE = {"mean": list(MEAN), "std": list(STD)}


@dataclass(frozen=True)
class Provenance:
    """What weights were made of: model, classes in order, fingerprint of the dataset, hashes of its training groups.

    order: what the order of samples followed from; where it differs, `samples_seen` says nothing.
    mean, std: of the colours, by which the model's images are normalised.
    """

    model: str
    classes: tuple[str, ...]
    dataset: str
    train_groups: Groups
    order: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk: its folder, how far it is, and where it comes from."""

    folder: Path
    progress: Progress
    provenance: Provenance


def as_json(content: dict) -> bytes:
    """A small file of a checkpoint."""
    return (json.dumps(content, indent=1) + "\n").encode()


def progress_json(progress: Progress, provenance: Provenance) -> bytes:
    """The content of `progress.json`."""
    origin = {name: value for name, value in asdict(provenance).items() if name != "train_groups"}
    return as_json({"format": FORMAT, "progress": asdict(progress), "provenance": origin})


def weights_metadata(provenance: Provenance) -> dict[str, str]:
    """What a file of these weights says of itself wherever it is copied; read by `model.weights.read_origin`."""
    words = {"classes": list(provenance.classes), "mean": list(provenance.mean), "std": list(provenance.std)}
    return {"model": provenance.model} | {name: json.dumps(value) for name, value in words.items()}


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint whose files are whole.

    Raises:
        ValueError: it has the format of another version, or says what no checkpoint says.
    """
    path = folder / PROGRESS_FILE
    try:
        content = parse_json(path.read_bytes())
        problem = misfit(content, {"format": int})
        if not problem and content["format"] == FORMAT:
            problem = misfit(content, {"progress": dict, "provenance": dict})
        if not problem and content["format"] == FORMAT:
            content["progress"] = ADDED | content["progress"]
            content["provenance"] = ADDED_PROVENANCE | content["provenance"]
            problem = misfit(content, SHAPE)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}). Restore a copy of {folder}.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"{folder} has format {content['format']}; this version reads up to {FORMAT}. Update dermharness."
        )
    if content["format"] < FORMAT:
        raise ValueError(
            f"{folder} has format {content['format']}, of version 0.1 of the harness, whose runs are not continued. Name "
            f"another --run.folder; to train on from these weights, give --model.weights {folder / 'model.safetensors'}."
        )
    provenance_json = content["provenance"]
    provenance = Provenance(
        provenance_json["model"],
        tuple(provenance_json["classes"]),
        provenance_json["dataset"],
        _read_groups(folder),
        provenance_json["order"],
        tuple(provenance_json["mean"]),
        tuple(provenance_json["std"]),
    )
    return Checkpoint(folder, Progress(**{name: content["progress"][name] for name in SHAPE["progress"]}), provenance)


def groups_json(groups: GroupFile) -> bytes:
    """The content of `train-groups.json`."""
    return as_json({"path": str(groups.path), "sha256": groups.sha256, "groups": groups.count})


def _read_groups(folder: Path) -> Groups:
    """A checkpoint's training groups, or the file of them: where it was at the training, or in the run's folder.

    Raises:
        ValueError: they are damaged.
    """
    path = folder / GROUPS_NAMED
    if not path.is_file():
        return read_hashes(folder / GROUPS_FILE)
    try:
        content = parse_json(path.read_bytes())
        problem = misfit(content, NAMED_SHAPE)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}). Restore a copy of {folder}.")
    places = Path(content["path"]), folder.parents[1] / "train.groups.npy"
    there = next((place for place in places if place.is_file()), places[0])
    return GroupFile(there, content["sha256"], content["groups"])
