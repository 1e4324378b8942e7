"""Which checkpoint to continue from, and what to do where files are damaged.

In: a run's folder. Out: a `Checkpoint` whose files have the SHA-256 of their manifest. Invariants: a damaged checkpoint is named and
the one before it is used; nothing damaged is ever loaded.
"""

import os
import shutil
from pathlib import Path

from harness.run.checkpoint import EMA_FILE, MANIFEST, Checkpoint, as_json, latest_first, read_checkpoint
from harness.run.console import LOGGER
from harness.run.progress import Progress
from shards.files import sha256, write_durably
from shards.shape import parse_json

FILES = {"progress.json", "model.safetensors", "train-groups.npy", "optimizer.pt", EMA_FILE}  # beside the manifest


def latest_valid(run: Path, quiet: bool = False) -> Checkpoint | None:
    """The latest valid checkpoint to continue from, or None; damaged ones are named, unless `quiet`.

    Raises:
        ValueError: checkpoints are there, and none is valid, or they are of a newer format.
    """
    folders = latest_first(run, "step-")
    for folder in folders:
        problem = find_corruption(folder)
        if problem is None:
            return read_checkpoint(folder)
        if not quiet:
            LOGGER.warning(f"checkpoint {folder} is damaged ({problem}): using the one before it")
    if folders:
        raise ValueError(
            f"No checkpoint in {run / 'checkpoints'} is whole. Remove {run} to start over, or restore a copy."
        )
    return None


def repair_best(run: Path, progress: Progress) -> None:
    """Make sure that the best weights named by a checkpoint are whole, from the checkpoint of their step if need be.

    Raises:
        ValueError: they are damaged, and no checkpoint of their step is kept.
    """
    name = f"{progress.best_step:08d}"
    folder, same = run / "checkpoints" / f"best-{name}", run / "checkpoints" / f"step-{name}"
    problem = find_corruption(folder) if progress.best_step else None
    if not problem:
        return
    if find_corruption(same):
        raise ValueError(
            f"The best weights {folder} are damaged ({problem}). Restore a copy, or remove {run} to start over."
        )
    LOGGER.warning(f"the best weights {folder} are damaged ({problem}): made again from {same}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(same, folder, ignore=shutil.ignore_patterns("optimizer.pt", MANIFEST))
    if (folder / EMA_FILE).is_file():  # the best weights are those that were judged
        os.replace(folder / EMA_FILE, folder / "model.safetensors")
    write_durably(folder / MANIFEST, as_json({path.name: sha256(path) for path in sorted(folder.iterdir())}))


def find_best(run: Path, progress: Progress | None = None) -> Checkpoint:
    """The best weights of a run.

    Args:
        run: its folder. progress: names the step of the best weights; without it, the newest there are.

    Raises:
        FileNotFoundError: there are none yet.
        ValueError: they are damaged.
    """
    folders = latest_first(run, "best-")
    if progress is not None:
        folders = [folder for folder in folders if folder.name == f"best-{progress.best_step:08d}"]
    if not folders:
        raise FileNotFoundError(f"No best weights in {run / 'checkpoints'}. Train first: the first epoch saves them.")
    problem = find_corruption(folders[0])
    if problem:
        raise ValueError(f"The best weights {folders[0]} are damaged ({problem}). Restore a copy, or train again.")
    return read_checkpoint(folders[0])


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if each has the SHA-256 of the manifest."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        if unknown := sorted(set(manifest) - FILES):  # it may lead anywhere
            return f"its manifest names {unknown[0][:80]!r}"
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is not what was written"
        if not {"progress.json", "model.safetensors", "train-groups.npy"} <= set(manifest):
            return "its manifest is incomplete"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None
