"""A dataset in the making: where it goes, and how images are stored in it.

In: a path or a URL. Out: places for its files, and for what tasks tell each other. Invariants: a folder appears whole or not at all; behind a
URL, where nothing can be renamed, `dataset.json` goes last, and without it there is no dataset. What is there already is never overwritten.
"""

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.description import Description, parse_description
from shards.files import refuse_used_folder, sync
from shards.image import FITS
from shards.locks import refused_twice
from shards.places import FolderPlace, Place, open_place
from shards.records import plans
from shards.storage import PATIENCE_S, is_url, without_secrets
from shards.tasks import Task

MARK = "dataset.json"


@dataclass(frozen=True)
class Packing:
    """How images are stored.

    size: stored (width, height) in pixels. fit: cover, contain or squeeze. quality: JPEG quality, 1 to 100.
    shard_samples: at most this many samples in one shard.
    """

    size: tuple[int, int] = (341, 256)
    fit: str = "cover"
    quality: int = 90
    shard_samples: int = 1000

    def __post_init__(self):
        """Check the values."""
        if min(self.size) < 8 or max(self.size) > 65500:
            raise ValueError(f"The 'size' of stored images must be 8x8 to 65500x65500 pixels. Got {self.size} instead.")
        if self.fit not in FITS:
            raise ValueError(f"The 'fit' of stored images must be one of {', '.join(FITS)}. Got {self.fit!r} instead.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"The JPEG 'quality' must be 1 to 100. Got {self.quality} instead.")
        if self.shard_samples < 1:
            raise ValueError(f"'shard_samples' must be at least 1. Got {self.shard_samples} instead.")


class Output:
    """One dataset that is packed. `OUT.packing` beside it holds what the tasks tell each other, until it is complete."""

    def __init__(self, out: Path | str, packing: Packing, patience: float = PATIENCE_S):
        """Nothing is made yet.

        Raises:
            ValueError: a kind of URL that is not known or cannot be written.
        """
        self.packing, self.shown, self.scratch = packing, without_secrets(str(out)), Path()
        self._patience, self.is_local = patience, not is_url(out)
        self.out = Path(out).resolve() if self.is_local else str(out).rstrip("/")  # of a link, where it leads to
        if not self.is_local:
            _refuse_url(str(self.out))

    @property
    def identity(self) -> list:
        """What must be the same where another task goes on with it."""
        place = str(self.out.resolve()) if isinstance(self.out, Path) else self.shown
        return [place, list(self.packing.size), self.packing.fit, self.packing.quality, self.packing.shard_samples]

    @cached_property
    def final(self) -> Place:
        """Where the dataset is at last."""
        return open_place(self.out, self._patience)

    @property
    def files(self) -> Place:
        """Where its files are put: of a folder, beside it until it is complete."""
        if isinstance(self.out, Path) and (self.has_partial or not self.is_complete):
            return FolderPlace(self._beside("partial"))
        return self.final

    @cached_property
    def work(self) -> Place:
        """What tasks tell each other, and files of a folder that are being written."""
        return open_place(self._beside("packing") if self.is_local else f"{self.out}.packing", self._patience)

    @property
    def is_complete(self) -> bool:
        """Whether the dataset is there."""
        return MARK in self.final.names()

    @property
    def is_used(self) -> bool:
        """Whether anything is where the dataset is to be."""
        return bool(self.final.names()) or (isinstance(self.out, Path) and self.out.is_file())

    @property
    def has_partial(self) -> bool:
        """Whether a folder beside it waits to be completed."""
        return isinstance(self.out, Path) and self._beside("partial").exists()

    def refuse_used(self) -> None:
        """Refuse to pack where something is, be it a dataset or not.

        Raises:
            FileExistsError: naming what to do.
        """
        if isinstance(self.out, Path):
            refuse_used_folder(self.out)
        elif names := self.final.names():
            what = "is a dataset" if MARK in names else f"holds other files ({min(names)})"
            raise FileExistsError(f"{self.shown} {what} already. Give another URL, or remove what is there first.")

    def lock(self, task: Task, stack: ExitStack) -> None:
        """Until `stack` ends, no other process on this machine packs this task's share of it.

        Raises:
            BlockingIOError: one does.
        """
        if isinstance(self.out, Path):
            error = (
                f"Another process packs {self.shown} as task {task.rank} at this moment. Let it end. If a launcher started both, start "
                "them with srun or torchrun, which number their tasks."
            )
            stack.enter_context(refused_twice(self.out.with_name(f".lock-{self.out.name}-{task.rank}"), error))

    def open(self, task: Task, stack: ExitStack) -> None:
        """Make its folders. Files are written in `scratch` first, on the same disk or, of a URL, on one of this machine; it goes with `stack`."""
        if isinstance(self.work, FolderPlace):
            self.work.folder.mkdir(parents=True, exist_ok=True)
            self.scratch = Path(tempfile.mkdtemp(prefix=f"scratch-{task.rank}-", dir=self.work.folder))
        else:
            self.scratch = Path(tempfile.mkdtemp(prefix="shards-"))
        stack.callback(shutil.rmtree, self.scratch, ignore_errors=True)

    def make(self, task: Task) -> None:
        """Make the folder that files are put into; remove what was being written when this task was killed."""
        if isinstance(self.files, FolderPlace):
            self.files.folder.mkdir(exist_ok=True)
        if isinstance(self.work, FolderPlace):
            for left in self.work.folder.glob(f"scratch-{task.rank}-*"):
                if left != self.scratch:
                    shutil.rmtree(left, ignore_errors=True)

    def appear(self) -> None:
        """The folder takes its name; behind a URL, the dataset is there already.

        Raises:
            FileNotFoundError: another task was faster.
        """
        if isinstance(self.files, FolderPlace) and isinstance(self.out, Path) and self.files.folder != self.out:
            sync(self.files.folder)
            os.rename(self.files.folder, self.out)  # takes the place of an empty folder, too
            sync(self.out.parent)

    def discard(self) -> None:
        """Of a folder that is not complete, keep nothing."""
        if isinstance(self.out, Path):
            shutil.rmtree(self._beside("partial"), ignore_errors=True)
            self.work.clear()

    def tidy(self) -> None:
        """Remove what tasks told each other. What was packed is said until the end: who is started again knows that it was this."""
        self.work.clear(but=plans(self.work.names()))
        self.work.clear()

    def read_description(self) -> Description:
        """What the complete dataset says of itself."""
        return parse_description(self.final.read(MARK), f"{self.shown}/{MARK}")

    def _beside(self, ending: str) -> Path:
        assert isinstance(self.out, Path)
        return self.out.with_name(f"{self.out.name}.{ending}")


def refuse_used(outputs: list[Output]) -> None:
    """Refuse outputs where something is, unless a packing is under way there.

    Raises:
        FileExistsError: naming what to do.
    """
    if not plans(outputs[0].work.names()):
        for output in outputs:
            output.refuse_used()


def clear_way(outputs: list[Output], plan: dict, task: Task) -> None:
    """Refuse outputs that are in use by anything but a packing that this one may go on with.

    What a killed process left that packed alone into folders is removed where it packed something else.

    Raises:
        FileExistsError: naming what is there and what to do.
    """
    partial = [
        output for output in outputs if output.has_partial
    ]  # looked at first: tasks say what they pack before they make it
    found = plans((work := outputs[0].work).names())
    if found:
        there = json.loads(work.read(min(found)))
        if there == plan:
            return
        if all(
            output.is_complete for output in outputs
        ):  # and whoever completed them was killed before it had tidied up
            outputs[0].refuse_used()
        is_ours = task.is_alone and there.get("tasks") == 1 and all(output.is_local for output in outputs)
        if not is_ours or any(output.is_complete for output in outputs):
            return  # refused by who reads the plan
        partial = outputs
    refuse_used(outputs)
    for output in partial:
        if not task.is_alone:
            raise FileExistsError(
                f"{output.shown}.partial was left by something else. Remove it: rm -r {output.shown}.partial"
            )
        output.discard()


def _refuse_url(url: str) -> None:
    shown = without_secrets(url)
    if url.lower().startswith("http"):
        raise ValueError(
            f"{shown}: nothing can be packed to a web server. Give a folder, or a bucket: s3://BUCKET/NAME."
        )
    if url.lower().startswith("file:"):
        raise ValueError(f"{shown} is a folder of this machine. Give its path.")
    if "/" not in url.partition("://")[2]:
        raise ValueError(f"{shown} is a whole bucket. Give a folder in it: {shown}/NAME.")
