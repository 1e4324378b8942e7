"""Checkpoints that are whole or not there.

In: tensors, or snapshots of them, and a `Progress`. Out: folders `RUN/checkpoints/step-00000123` and `RUN/checkpoints/best-00000100`. Invariants: a folder takes its name only when every byte is on disk; its manifest holds the SHA-256 of each file;
nothing is deleted or loses its name before what replaces it is safe; a damaged checkpoint is named and the one before it is used.
"""

import hashlib
import io
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load, save
from torch import nn

from harness.run.progress import Progress
from harness.run.provenance import (
    GROUPS_FILE,
    GROUPS_NAMED,
    PROGRESS_FILE,
    Checkpoint,
    Provenance,
    as_json,
    groups_json,
    progress_json,
    weights_metadata,
)
from shards.files import sync, write_durably
from shards.groups import GroupFile
from shards.shape import misfit, parse_json

MANIFEST, EMA_FILE = "manifest.json", "ema.safetensors"
ASIDE = ".old"  # behind the name of a folder that is about to be replaced


class Stateful(Protocol):
    """A model, an optimizer, a loss scaler, or a snapshot of one."""

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by name."""
        ...


class Snapshot:
    """A copy on the host of something's state, that no later step changes. It is saved in its place."""

    def __init__(self, source: Stateful, before: "Snapshot | None" = None):
        """Copy into the memory of a snapshot of before, which is spoilt. On a GPU the copy has only begun."""
        self._state: Any = _on_host(source.state_dict(), before and before._state)

    def state_dict(self) -> dict[str, Any]:
        """The copies by name."""
        return self._state


def snapshots(sources: Sequence[Stateful | None], before: Sequence[Snapshot | None] = ()) -> list[Snapshot | None]:
    """Copies of all at this moment; None stays None. (Device sync.)

    Args:
        before: earlier ones of the same, whose memory is used again; or none.
    """
    before = before or [None] * len(sources)
    taken = [
        None if source is None else Snapshot(source, earlier) for source, earlier in zip(sources, before, strict=True)
    ]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return taken


def _on_host(value, before):
    """Dictionaries, lists and tensors in them, copied; anything else as it is. before: an earlier copy of the same, or None."""
    if isinstance(value, torch.Tensor):
        fits = isinstance(before, torch.Tensor) and before.dtype == value.dtype
        if not fits or before.shape != value.shape or before.stride() != value.stride():
            before = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return before.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        before = before if isinstance(before, dict) else {}
        return {name: _on_host(item, before.get(name)) for name, item in value.items()}
    if isinstance(value, list):
        before = before if isinstance(before, list) and len(before) == len(value) else [None] * len(value)
        return [_on_host(*pair) for pair in zip(value, before, strict=True)]
    return value


def save_step(
    run: Path,
    progress: Progress,
    provenance: Provenance,
    model: Stateful,
    optimizer: Stateful,
    scaler: Stateful | None,
    keep: int,
    ema: Stateful | None = None,
) -> None:
    """Save all that continues a run, then remove all but the newest `keep` checkpoints and the best weights.

    Args:
        ema: the exponential moving average of the weights, if there is one.
    """
    state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
    saved = run / "checkpoints" / f"step-{progress.step:08d}"
    _save(saved, progress, provenance, model, state, ema)
    steps = latest_first(run, "step-")
    later = steps.index(saved)  # damaged ones: this run continued from one before them
    for folder in steps[:later] + steps[later + keep :]:
        shutil.rmtree(folder)
    # Each checkpoint that is kept may be the one to continue from: the best weights that it names stay, too.
    named = {f"best-{_best_step(folder):08d}" for folder in latest_first(run, "step-")}
    for folder in latest_first(run, "best-"):
        if folder.name not in named:
            shutil.rmtree(folder)
    for name in (".*.tmp", f"*{ASIDE}"):  # left by a process that was killed while it saved
        for leftover in (run / "checkpoints").glob(name):
            shutil.rmtree(leftover)


def save_best(run: Path, progress: Progress, provenance: Provenance, model: Stateful) -> None:
    """Save the best weights so far; the ones before are removed by the next `save_step`, which points to these."""
    _save(run / "checkpoints" / f"best-{progress.best_step:08d}", progress, provenance, model)


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, scaler, ema: nn.Module | None = None
) -> None:
    """Load weights, optimizer, loss scaler and EMA in place, on every rank.

    An EMA that was not kept (the run went on with another `optim.ema`) starts from the weights. The optimizer keeps its settings
    (decay, scales of rates), which may have changed since.

    Raises:
        ValueError: what this rank reads is not what was written, or is of an optimizer with other groups of weights.
    """
    load_model(checkpoint, model)
    if ema is not None:
        kept = (checkpoint.folder / EMA_FILE).is_file()
        data = _read(checkpoint.folder, EMA_FILE) if kept else b""
        with _named(checkpoint.folder / EMA_FILE):
            ema.load_state_dict(load(data) if kept else model.state_dict())
    optimizer_pt = io.BytesIO(_read(checkpoint.folder, "optimizer.pt"))
    with _named(checkpoint.folder / "optimizer.pt"):
        state = torch.load(optimizer_pt, map_location="cpu", weights_only=True)
        saved, now = state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"]
        is_other = [group["params"] for group in saved] != [group["params"] for group in now]
        is_other |= ["betas" in group for group in saved] != [
            "betas" in group for group in now
        ]  # Adam's, and no other's
    if is_other:
        raise ValueError(
            f"{checkpoint.folder} is of another optimizer: 'optim.name' or 'optim.layer_decay' was another. Give that of before to "
            "continue, or name another --run.folder."
        )
    with _named(checkpoint.folder / "optimizer.pt"):
        state["optimizer"]["param_groups"] = now
        optimizer.load_state_dict(state["optimizer"])
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load weights in place; every tensor must be there.

    Raises:
        ValueError: what this rank reads is not what was written, or does not fit.
    """
    data = _read(checkpoint.folder, "model.safetensors")
    with _named(checkpoint.folder / "model.safetensors"):
        model.load_state_dict(load(data))


def _read(folder: Path, name: str) -> bytes:
    """A file of a checkpoint, with the SHA-256 of the manifest: each rank may read another copy of it."""
    data = (folder / name).read_bytes()
    manifest = parse_json((folder / MANIFEST).read_bytes())
    if misfit(manifest, {name: str}) or hashlib.sha256(data).hexdigest() != manifest[name]:
        raise ValueError(
            f"{folder / name} is not what was written, as read by process {os.getpid()} on {socket.gethostname()}. Remove "
            f"{folder} there, or copy it again from the machine of rank 0; then start the same command again."
        )
    return data


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside, whatever a file's content makes safetensors, pickle, zipfile or torch raise becomes a ValueError that names it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} cannot be loaded ({type(error).__name__}: {reason}). Restore a copy.") from error


def _save(
    folder: Path,
    progress: Progress,
    provenance: Provenance,
    model: Stateful,
    state: dict | None = None,
    ema: Stateful | None = None,
) -> None:
    """Write a checkpoint beside its place and then give it its name.

    Raises:
        OSError: the disk is full, or away; what was there before is untouched.
    """
    temporary = temporary_of(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = _files(progress, provenance, model, state, ema)
        manifest = {name: write_durably(temporary / name, data) for name, data in files}
        write_durably(temporary / MANIFEST, as_json(manifest))
        put_in_place(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"Cannot save the checkpoint {folder} ({error.strerror or error}). Those before it are whole. Make room or repair "
            "the disk, then start the same command again."
        ) from error


def temporary_of(folder: Path) -> Path:
    """Where a folder is filled before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def put_in_place(temporary: Path, folder: Path) -> None:
    """Give a folder that is filled its name. The one that had it has another until this one is safe.

    The same step is saved again after a stop at the end of an epoch: validated then. Where a crash or an error leaves only the
    other name, `recovery.finish_replacements` gives it back.

    Raises:
        OSError: it could not be renamed; what was there before has its name.
    """
    aside = folder.with_name(folder.name + ASIDE)
    sync(temporary)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        with suppress(OSError):
            os.rename(aside, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _files(
    progress: Progress, provenance: Provenance, model: Stateful, state: dict | None, ema: Stateful | None
) -> Iterator[tuple[str, bytes | memoryview]]:
    """Names and contents of a checkpoint's files, one at a time."""
    for name, weights in (("model.safetensors", model), (EMA_FILE, ema)):
        if weights is not None:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.state_dict().items()}
            yield name, save(tensors, metadata=weights_metadata(provenance))
    if state is not None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield "optimizer.pt", buffer.getbuffer()
    if isinstance(provenance.train_groups, GroupFile):
        yield GROUPS_NAMED, groups_json(provenance.train_groups)
    else:
        buffer = io.BytesIO()
        np.save(buffer, provenance.train_groups)
        yield GROUPS_FILE, buffer.getbuffer()
    yield PROGRESS_FILE, progress_json(progress, provenance)


def _best_step(folder: Path) -> int:
    """The step of the best weights that a checkpoint names; -1 if it is too damaged to name any."""
    try:
        return int(parse_json((folder / PROGRESS_FILE).read_bytes())["progress"]["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def latest_first(run: Path, prefix: str) -> list[Path]:
    """Folders of checkpoints (step-) or best weights (best-), the latest first."""
    found = (run / "checkpoints").glob(f"{prefix}*")
    return sorted((folder for folder in found if not folder.name.endswith(ASIDE)), reverse=True)
