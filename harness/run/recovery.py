"""Which checkpoint to continue from, and what to do where files are damaged.

In: a run's folder. Out: a `Checkpoint` whose files have the SHA-256 of their manifest. Invariants: a damaged checkpoint is named and
the one before it is used; nothing damaged is ever loaded; what a crash interrupted is finished or undone first.
"""

import os
import shutil
from pathlib import Path

from harness.distributed.world import World
from harness.run.checkpoint import (
    ASIDE,
    EMA_FILE,
    MANIFEST,
    latest_first,
    put_in_place,
    temporary_of,
)
from harness.run.console import LOGGER
from harness.run.progress import Progress
from harness.run.provenance import GROUPS_FILE, GROUPS_NAMED, PROGRESS_FILE, Checkpoint, as_json, read_checkpoint
from shards.files import sha256, sync, write_durably
from shards.shape import parse_json

FILES = {PROGRESS_FILE, "model.safetensors", GROUPS_FILE, GROUPS_NAMED, "optimizer.pt", EMA_FILE}  # beside the manifest


def latest_valid(run: Path, quiet: bool = False) -> Checkpoint | None:
    """The latest valid checkpoint to continue from, or None; damaged ones are named, unless `quiet`.

    Only for the job that holds the run: saving that a crash interrupted is finished first.

    Raises:
        ValueError: checkpoints are there, and none is valid, or they are of a newer format.
    """
    finish_replacements(run)
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


def finish_replacements(run: Path) -> None:
    """Where a folder of checkpoints is missing or damaged, and one that was to replace it or to be replaced is whole, rename it."""
    leftovers = [(path, path.name[1:-4]) for path in (run / "checkpoints").glob(".*.tmp")]  # the newer ones
    leftovers += [(path, path.name.removesuffix(ASIDE)) for path in (run / "checkpoints").glob(f"*{ASIDE}")]
    for path, name in leftovers:
        folder = path.with_name(name)
        if not find_corruption(folder):
            shutil.rmtree(path)
        elif not find_corruption(path):
            LOGGER.info(
                f"{folder} was being saved when the run was interrupted: {path.name} is whole and takes its name"
            )
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(path, folder)
            sync(folder.parent)


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
    temporary = temporary_of(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(same, temporary, ignore=shutil.ignore_patterns("optimizer.pt", MANIFEST))
    if (temporary / EMA_FILE).is_file():  # the best weights are those that were judged
        os.replace(temporary / EMA_FILE, temporary / "model.safetensors")
    files = sorted(temporary.iterdir())
    for path in files:
        sync(path)
    write_durably(temporary / MANIFEST, as_json({path.name: sha256(path) for path in files}))
    put_in_place(temporary, folder)


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


def refuse_other_copies(folder: Path, world: World) -> None:
    """Collective: each rank sees the checkpoint that rank 0 sees, by its manifest; what it loads has the hashes in there.

    Raises:
        ValueError: naming the ranks that see another one or none, as from a copy of the run folder on one node.
    """
    try:
        seen = sha256(folder / MANIFEST)
    except OSError:
        seen = ""
    everyone = world.all_gather_objects((world.host_pid, str(folder.resolve()), seen))
    world.run_on_main(_refuse_differing, everyone)


def _refuse_differing(everyone: list[tuple[str, str, str]]) -> None:
    first, *_ = everyone
    others = [
        f"rank {rank} ({who}) sees {'another' if seen else 'none'} in {place}"
        for rank, (who, place, seen) in enumerate(everyone)
        if seen != first[2]
    ]
    if others:
        raise ValueError(
            f"The ranks see different checkpoints under one name: rank 0 ({first[0]}) would continue from {first[1]}; "
            f"{'; '.join(others)}. Put the run folder on a disk that all nodes share, or copy rank 0's to the others; then "
            "start the same command again."
        )


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if each has the SHA-256 of the manifest."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        if unknown := sorted(set(manifest) - FILES):  # it may lead anywhere
            return f"its manifest names {unknown[0][:80]!r}"
        for name, digest in manifest.items():
            if sha256(folder / name) != digest:
                return f"{name} is not what was written"
        if not {PROGRESS_FILE, "model.safetensors"} <= set(manifest) or not {GROUPS_FILE, GROUPS_NAMED} & set(manifest):
            return "its manifest is incomplete"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
    return None
