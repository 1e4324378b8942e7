"""Checks of the places that a run reads and writes: one run folder for all, room for checkpoints and for a cache.

In: settings, a `World`, opened `Data`. Out: `Check`s, each with what fixes it. Invariants: a file that a check makes is removed by it.
"""

import time
import uuid
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryFile

import torch

from harness.config import Config
from harness.distributed.world import World
from harness.model.optim import checkpoint_bytes, weight_bytes
from harness.run.writer import saved_in
from harness.training.check import Check
from harness.training.state import Data
from shards.remote import GB, RemoteFolder

SHARED_S = 10.0  # until a file that one machine made is seen by another


def check_shared(folder: str, world: World) -> list[Check]:
    """Collective: whether every process sees one run folder: each looks for a file that rank 0 makes there, and removes again.

    All read checkpoints and the best weights from it. A folder that is yet to be made is judged by the one that it will be in.
    """
    if world.size == 1:
        return []
    name = f".seen-by-all-{uuid.uuid4().hex}.tmp"  # a new name: a network file system remembers old ones for a while
    made = world.run_on_main(_make_token, folder, name)
    if made is None:  # whatever writes there will say so
        return []
    levels, name = made
    here = (Path(folder).absolute(), *Path(folder).absolute().parents)[levels]
    try:
        seen = world.all_gather_objects((world.host_pid, _comes(here / name)))
    finally:
        world.run_on_main((here / name).unlink)
    blind = [f"rank {rank} ({who})" for rank, (who, sees) in enumerate(seen) if not sees]
    if not blind:
        return [Check("ok", "run folder", f"all processes see {folder}")]
    text = f"the run folder {Path(folder).absolute()} of rank 0 ({seen[0][0]}) is not the one of {', '.join(blind[:4])}"
    fix = "name a --run.folder on a file system that all machines share, by a path that is the same on each"
    return [Check("fail", "run folder", text + (", ..." if len(blind) > 4 else ""), fix)]


def _make_token(folder: str, name: str) -> tuple[int, str] | None:
    """Make an empty file in a folder, or in the nearest one above it that is there.

    Returns:
        how many levels above the folder it is, and its name; None where it may not be made.
    """
    place = existing_folder(folder)
    try:
        (place / name).touch()
    except OSError:
        return None
    return len(Path(folder).absolute().parts) - len(place.parts), name


def _comes(file: Path) -> bool:
    """Whether a file is there, or comes within the seconds that a network file system may take."""
    deadline = time.monotonic() + SHARED_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def existing_folder(place: str) -> Path:
    """A folder, or the nearest one above it that is there."""
    path = Path(place).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def why_not_writable(place: str) -> str:
    """What keeps a folder from being made, or files from being written in it; nothing where neither is so."""
    path = Path(place).absolute()
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            return f"{part} is no folder"
    try:
        with TemporaryFile(dir=existing_folder(place)):
            return ""
    except OSError as error:
        return f"{existing_folder(place)}: {error.strerror}"


def check_disk(config: Config, model: torch.nn.Module) -> list[Check]:
    """The places of a run's files can be written, and have room for its checkpoints."""
    weights, whole = weight_bytes(model), checkpoint_bytes(model, config.optim)
    found = []
    run, local = config.run.folder, config.run.checkpoint_dir
    places = [(run, Path(run), "run.folder")]
    places += [(local, saved_in(Path(run), local), "run.checkpoint_dir")] if local else []
    for place, folder, setting in places:
        if problem := why_not_writable(place):
            fix = f"name a folder that can be written as --{setting}"
            found.append(Check("fail", "disk", f"{setting} {place} cannot be written: {problem}", fix))
            continue
        needed = required_bytes(folder, weights, whole, config.run.keep_checkpoints)
        free = disk_usage(existing_folder(place)).free
        text = f"{place}: {free / 1e6:.0f} MB free, and checkpoints of {config.model.name} need up to {needed / 1e6:.0f} MB"
        if free < needed:
            fix = f"make room, name another --{setting}, or lower --run.keep_checkpoints (now {config.run.keep_checkpoints})"
            found.append(Check("fail", "disk", text, fix))
        else:
            found.append(Check("ok", "disk", text))
    return found


def required_bytes(run: Path, weights: int, whole: int, keep: int) -> int:
    """Bytes that the run's checkpoints will need beside what is there already.

    Args:
        weights: bytes of the weights. whole: bytes of a checkpoint that continues a run. keep: latest checkpoints kept.
            Beside them stand one that is being written and two sets of best weights.
    """
    there = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    return max((keep + 1) * whole + 2 * weights - there, whole + weights)


def check_cache(data: Data) -> list[Check]:
    """Of remote data: the cache has room for what is read at a time, and the disk for the cache."""
    folder = data.dataset.folder
    if not isinstance(folder, RemoteFolder) or folder.cache is None:
        return []
    cache, plan = folder.cache, data.plan
    largest = int(data.train.shards.bytes.max())
    at_a_time = min(plan.lanes * (plan.shuffle_block_shards or len(plan.shard_sizes)), len(plan.shard_sizes))
    whole = int(data.dataset.shards.bytes.sum())
    needed = min(at_a_time * largest, int(data.train.shards.bytes.sum()))
    if needed > cache.limit:
        text = (
            f"samples are shuffled within {at_a_time} shards at a time ({needed / GB:.3g} GB), and the cache {cache.folder} holds "
            f"{cache.limit / GB:.3g} GB: each shard would be downloaded again and again"
        )
        few = max(1, int(cache.limit / largest / plan.lanes / 2))
        fix = f"raise --data.cache_gb to {1.1 * needed / GB:.3g}, or set --data.shuffle_block_shards {few}"
        return [Check("warn", "cache", text, fix)]
    free, used = disk_usage(cache.folder).free, cache.used()
    text = f"{cache.folder}: {used / GB:.3g} of {cache.limit / GB:.3g} GB used, {free / GB:.3g} GB free on the disk"
    if used + free < min(cache.limit, whole):
        fix = f"name a --data.cache_dir on a larger disk, or lower --data.cache_gb to {(used + free) * 0.9 / GB:.3g}"
        return [Check("warn", "cache", text, fix)]
    return [Check("ok", "cache", text)]
