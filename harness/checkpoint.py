"""Checkpoints that are whole or not there.

In: tensors and a `Progress`. Out: folders `RUN/checkpoints/step-00000123` and `RUN/checkpoints/best-00000100`. What
stays true: a folder takes its name only when every byte is on disk; its manifest holds the SHA-256 of each file;
nothing is deleted before what replaces it is safe; a damaged checkpoint is named and the one before it is used.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harness.progress import Progress
from shards.index import sha256
from shards.pack import sync

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """What weights were made of: model, classes in order, fingerprint of the dataset, hashes of its training groups."""

    model: str
    classes: tuple[str, ...]
    dataset: str
    train_groups: np.ndarray  # as from shards.index.group_hashes


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk: its folder, how far it is, and where it comes from."""

    folder: Path
    progress: Progress
    origin: Origin


def save_step(
    run: Path, progress: Progress, origin: Origin, model: nn.Module, optimizer: torch.optim.Optimizer, scaler, keep: int
) -> None:
    """Save all that continues a run, then remove all but the newest `keep` checkpoints and the best weights."""

    def write(folder: Path) -> None:
        _save_model(model, folder)
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        torch.save(state, folder / "optimizer.pt")

    _save(run / "checkpoints" / f"step-{progress.step:08d}", progress, origin, write)
    for folder in _newest_first(run, "step-")[keep:]:
        shutil.rmtree(folder)
    # Each checkpoint that is kept may be the one to continue from: the best weights that it names stay, too.
    named = {f"best-{_best_step(folder):08d}" for folder in _newest_first(run, "step-")}
    for folder in _newest_first(run, "best-"):
        if folder.name not in named:
            shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".*.tmp"):  # of a process that was killed while it saved
        shutil.rmtree(leftover)


def save_best(run: Path, progress: Progress, origin: Origin, model: nn.Module) -> None:
    """Save the best weights so far; the ones before are removed by the next `save_step`, which points to these."""
    _save(
        run / "checkpoints" / f"best-{progress.best_step:08d}",
        progress,
        origin,
        lambda folder: _save_model(model, folder),
    )


def newest(run: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest valid checkpoint to continue from, or None; what is damaged is named.

    Raises:
        ValueError: checkpoints are there, and none is valid, or they are of a newer format.
    """
    folders = _newest_first(run, "step-")
    for folder in folders:
        problem = _problem(folder)
        if problem is None:
            return _read(folder)
        say(f"checkpoint {folder} is damaged ({problem}): using the one before it")
    if folders:
        raise ValueError(
            f"No checkpoint in {run / 'checkpoints'} is whole. Remove {run} to start over, or restore a copy."
        )
    return None


def best(run: Path, progress: Progress | None = None) -> Checkpoint:
    """The best weights of a run.

    Args:
        run: its folder. progress: names the step of the best weights; without it, the newest there are.

    Raises:
        FileNotFoundError: there are none yet.
        ValueError: they are damaged.
    """
    folders = _newest_first(run, "best-")
    if progress is not None:
        folders = [folder for folder in folders if folder.name == f"best-{progress.best_step:08d}"]
    if not folders:
        raise FileNotFoundError(f"No best weights in {run / 'checkpoints'}. Train first: the first epoch saves them.")
    problem = _problem(folders[0])
    if problem:
        raise ValueError(f"The best weights {folders[0]} are damaged ({problem}). Restore a copy, or train again.")
    return _read(folders[0])


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, scaler) -> None:
    """Load weights, optimizer and loss scaler in place, on every rank."""
    load_model(checkpoint, model)
    state = torch.load(checkpoint.folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load weights in place; every tensor must be there."""
    model.load_state_dict(load_file(checkpoint.folder / "model.safetensors"))


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that readers, and a crash, see the old or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _save_model(model: nn.Module, folder: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def _save(folder: Path, progress: Progress, origin: Origin, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    np.save(temporary / "train-groups.npy", origin.train_groups)
    origin_text = {"model": origin.model, "classes": list(origin.classes), "dataset": origin.dataset}
    content = {"format": FORMAT, "progress": asdict(progress), "origin": origin_text}
    (temporary / "progress.json").write_text(json.dumps(content, indent=1) + "\n")
    manifest = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    if folder.exists():  # from before a crash: the same step again, so nothing is lost if this one replaces it
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync(folder.parent)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is not what was written"
        if not {"progress.json", "model.safetensors", "train-groups.npy"} <= set(manifest):
            return "its manifest is incomplete"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _read(folder: Path) -> Checkpoint:
    content = json.loads((folder / "progress.json").read_text())
    if content["format"] > FORMAT:
        raise ValueError(
            f"{folder} has format {content['format']}; this version reads up to {FORMAT}. Update dermharness."
        )
    made_of = content["origin"]
    groups = np.load(folder / "train-groups.npy", allow_pickle=False)
    origin = Origin(made_of["model"], tuple(made_of["classes"]), made_of["dataset"], groups)
    return Checkpoint(folder, Progress(**content["progress"]), origin)


def _best_step(folder: Path) -> int:
    """The step of the best weights that a checkpoint names; -1 if it is too damaged to name any."""
    try:
        return json.loads((folder / "progress.json").read_text())["progress"]["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _newest_first(run: Path, prefix: str) -> list[Path]:
    return sorted((run / "checkpoints").glob(f"{prefix}*"), reverse=True)
