"""What a run says of itself: state.json, starts.jsonl, changes.json and errors/, for people and job scripts.

In: a status, a `Progress`, errors. Out: small files of the run's folder. Invariants: `state.json` says `running | stopped |
finished | failed` and how far, `failed` on a full disk, too; the first rank to fail is the cause.
"""

import json
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.distributed.world import World
from harness.run.progress import Progress
from shards.files import write_atomically
from shards.shape import misfit, parse_json

WRITES = threading.RLock()  # of state.json: the thread that writes checkpoints does, too
CHANGES, STATE = "changes.json", "state.json"
ROOM = 4096  # bytes that state.json takes: on a full disk, word of a failure is written over it


def changes(folder: Path) -> list[str]:
    """Settings that were changed while the run went on, as `key: OLD is now NEW`.

    Raises:
        ValueError: their file is damaged.
    """
    path = folder / CHANGES
    if not path.is_file():
        return []
    try:
        found = parse_json(path.read_bytes())
        problem = misfit(found, [str])
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}). Restore a copy: results must tell of those changes.")
    return found


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run with its results."""
    return _read_state(folder).get("status") == "finished" and (folder / "metrics.json").is_file()


def write_state(folder: Path, status: str, progress: Progress, reason: str = "") -> None:
    """Say how the run fares: status and why, epochs and steps done, samples of the current epoch."""
    state = {"status": status} | _reached(progress) | ({"reason": reason} if reason else {})
    with WRITES, writing(folder / STATE):
        write_atomically(folder / STATE, _padded(state))


def note_saved(folder: Path, progress: Progress) -> None:
    """Say how far the checkpoint is that was just written; whatever else is said stays: the run may have failed meanwhile."""
    with WRITES, writing(folder / STATE):
        state = {"status": "running"} | _read_state(folder) | _reached(progress)
        write_atomically(folder / STATE, _padded(state))


def _reached(progress: Progress) -> dict[str, int]:
    return {"epoch": progress.epoch, "step": progress.step, "samples_seen": progress.samples_seen}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an error of the disk becomes a sentence.

    Raises:
        OSError: what cannot be written, why, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Cannot write {path} ({error.strerror or error}). Make room or repair the disk, then start the same command again."
        ) from error


def note_start(folder: Path, facts: dict) -> None:
    """Append a line to starts.jsonl: that the run started, or went on, and where."""
    path = folder / "starts.jsonl"
    with writing(path), open(path, "a+b") as file:
        if file.tell():  # a line that a crash has torn spoils no other
            file.seek(-1, os.SEEK_END)
        line = json.dumps(facts).encode() + b"\n"
        file.write(line if file.read(1) in (b"", b"\n") else b"\n" + line)


@contextmanager
def failure_noted(folder: Path, world: World) -> Iterator[None]:
    """Leave word of an error: errors/rank-N.txt has the traceback, state.json says `failed`, which rank, and why.

    The first rank to fail is the cause: what others say after it follows from that.

    Raises:
        ConnectionError: in place of a failed exchange between ranks, naming the rank that is the cause.
    """

    def note(cause: dict) -> None:
        with suppress(OSError, ValueError), WRITES:  # a full disk must not hide the error itself
            state = _read_state(folder)
            if state.get("status") not in ("failed", "finished"):
                _write_failure(folder, state | {"status": "failed"} | cause)

    heartbeat = world.heartbeat
    if heartbeat:
        heartbeat.on_failure = note
    try:
        yield
    except Exception as error:
        blamed = heartbeat.failure_behind_collective() if heartbeat and isinstance(error, RuntimeError) else None
        with suppress(OSError):
            (folder / "errors").mkdir(exist_ok=True)
            (folder / "errors" / f"rank-{world.rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if blamed:
            note(blamed)
            raise ConnectionError(f"{blamed['error']}. This run failed; the same command continues it.") from error
        note({"rank": world.rank, "error": f"{type(error).__name__}: {error}"})
        if heartbeat:
            heartbeat.report(f"rank {world.rank} ({world.host_pid}) failed: {type(error).__name__}: {error}")
        raise


def _padded(state: dict) -> bytes:
    return json.dumps(state).encode().ljust(ROOM - 1) + b"\n"


def _write_failure(folder: Path, state: dict) -> None:
    try:
        write_atomically(folder / STATE, _padded(state))
    except OSError:  # no room for a new file: over the old one, with an error that fits in
        with open(folder / STATE, "r+b") as file:
            file.write(_padded(state | {"error": state["error"][:500]}))
            file.truncate()


def _read_state(folder: Path) -> dict:
    try:
        return dict(parse_json((folder / STATE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # damaged: it only tells, so nothing is lost
        return {}
