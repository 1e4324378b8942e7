"""Checkpoints are written while training goes on; where there is a fast local disk, there first, and then copied to the run folder.

In: a run folder, perhaps a local one, and what writes a checkpoint. Out: the same checkpoints in both. Invariants: one is written
at a time, in the order asked for; what goes wrong is raised before the next one, or at the end. A copy counts only when its files
have the SHA-256 of its manifest, so a run folder on a disk whose renames and flushes promise little (a mounted Drive) is safe;
nothing is removed from it before what replaces it has arrived.
"""

import re
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from harness.run.checkpoint import ASIDE, Snapshot, put_in_place, temporary_of
from harness.run.console import LOGGER
from harness.run.provenance import Checkpoint
from harness.run.recovery import find_corruption, latest_valid
from shards.files import write_atomically

NAME = re.compile(rb"[0-9a-f]{16}")  # of a run, in RUN/id


class CheckpointWriter:
    """Where a run saves, its own folder or a local one that is copied there, and the thread that does it."""

    def __init__(self, run: Path, local: str):
        """`run` is the run's folder, `local` is `run.checkpoint_dir`: empty to save in the run's folder."""
        self.run, self.local = run, Path(local) if local else None
        self.snapshots: list[Snapshot | None] = []  # of the checkpoint that was written last: its memory is used again
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._longest = 0.0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *error) -> None:
        self._pool.shutdown()
        if self._writing and (
            lost := self._writing.exception()
        ):  # nobody waited for it: something else failed meanwhile
            LOGGER.error(str(lost))

    def directory(self) -> Path:
        """The folder that checkpoints are saved to."""
        return self.local / _identity(self.run) if self.local else self.run

    def sync_on_start(self) -> None:
        """At a start: what is newest in one place comes to the other. A lost machine has lost its local folder."""
        if not self.local:
            return
        place = self.directory()
        here, there = _latest(place), _latest(self.run)
        if here and (not there or here.progress.step > there.progress.step):
            _mirror(place, self.run, check=True)
        elif there and (not here or there.progress.step > here.progress.step):
            _mirror(self.run, place, check=True)

    def start(self, write: Callable[[], None]) -> None:
        """Have a checkpoint written, and then copied. Waits for the one before, and raises what went wrong with it."""
        self.wait()
        self._writing = self._pool.submit(self._write_and_copy, write)

    def wait(self) -> None:
        """Wait until all is written and copied.

        Raises:
            OSError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def longest_s(self) -> float:
        """The most seconds that a checkpoint took so far, to be written and copied."""
        return self._longest

    def _write_and_copy(self, write: Callable[[], None]) -> None:
        began = time.monotonic()
        write()
        if self.local:
            self._copy()
        self._longest = max(self._longest, time.monotonic() - began)

    def _copy(self) -> None:
        try:
            _mirror(self.directory(), self.run)
        except OSError as error:
            raise OSError(
                f"Cannot copy checkpoints to {self.run} ({error}). They are whole in {self.directory()}. Repair the disk, "
                "then start the same command again."
            ) from error


def _mirror(source: Path, target: Path, check: bool = False) -> None:
    """Make the checkpoints of `target` those of `source`, and remove none before all have arrived.

    Args:
        check: read the copies that are there; otherwise an equal manifest is enough.
    """
    found = sorted((source / "checkpoints").iterdir())
    folders = [path for path in found if not path.name.startswith(".") and not path.name.endswith(ASIDE)]
    for folder in folders:
        copy = target / "checkpoints" / folder.name
        if _manifest(copy) != _manifest(folder) or (check and find_corruption(copy)):
            temporary = temporary_of(copy)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(folder, temporary)
            put_in_place(temporary, copy)
    more = {path.name for path in (target / "checkpoints").iterdir()} - {path.name for path in folders}
    for old in sorted(more, reverse=True):  # steps before the best weights that they name
        shutil.rmtree(target / "checkpoints" / old)


def _manifest(folder: Path) -> bytes | None:
    """The manifest of a checkpoint, None where there is none."""
    path = folder / "manifest.json"
    return path.read_bytes() if path.is_file() else None


def _latest(place: Path) -> Checkpoint | None:
    try:
        return latest_valid(place, quiet=True)
    except ValueError:  # none is whole here
        return None


def saved_in(run: Path, local: str) -> Path:
    """Where the checkpoints of a run with this `run.checkpoint_dir` lie; writes nothing, so a run without a name has none yet."""
    path = run / "id"
    name = path.read_bytes() if path.is_file() else b""
    return Path(local) / name.decode() if NAME.fullmatch(name) else Path(local)


def _identity(run: Path) -> str:
    """A name for the run that its folder keeps: another run with the same local folder must not be taken for it.

    Anything else than what was written here may name a folder of somebody else's. It is replaced: under a new name no copy
    is found, so nothing is overwritten, and the run goes on from the checkpoints in its own folder.
    """
    path = run / "id"
    found = path.read_bytes() if path.is_file() else b""
    if NAME.fullmatch(found):
        return found.decode()
    if found:
        LOGGER.warning(f"{path} is damaged: written anew, and copies in run.checkpoint_dir are not looked for")
    name = uuid.uuid4().hex[:16]
    write_atomically(path, name.encode())
    return name
