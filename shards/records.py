"""What tasks that pack one dataset leave for each other, in files beside it, until it is complete.

In: finished shards and tasks. Out: who has done what, for any task, on any machine, at any time later. Invariants: a record is written when
all files of its shard are in their place; a task is done when all of its shards have records, and says so after that; packings of
different sources, splits or settings never share a place.
"""

import base64
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from shards.catalogue import Catalogue
from shards.grouping import Split
from shards.places import Place, write
from shards.tasks import Cut, Task
from shards.tree import of_cell, size_and_version


@dataclass(frozen=True)
class Record:
    """A finished shard.

    first_key: the key of its first sample. samples: their number; 0 where no image could be read, and there is no shard.
    bad: place among the shard's rows -> what is wrong with that image. notes: what was done to how many images.
    digests: SHA-256 of the originals in the shard, 32 bytes each, in base64. originals: what says whether an original was changed
    since. files: of each output, the size of the tar, and SHA-256 of the tar and of its table.
    """

    first_key: int
    samples: int
    bad: dict[int, str]
    notes: dict[str, int]
    digests: str
    originals: str
    files: tuple[tuple[int, str, str], ...]

    def of_originals(self) -> list[bytes]:
        """SHA-256 of each original that is in the shard."""
        data = base64.b64decode(self.digests)
        return [data[start : start + 32] for start in range(0, len(data), 32)]

    def to_bytes(self) -> bytes:
        """As it is written."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()


def read_record(data: bytes) -> Record:
    """A record from its file's bytes."""
    content = json.loads(data)
    bad = {int(place): problem for place, problem in content["bad"].items()}
    files = tuple((size, tar, table) for size, tar, table in content["files"])
    return Record(**content | {"bad": bad, "files": files})


def join_digests(digests: list[bytes]) -> str:
    """SHA-256 of originals, as a record holds them."""
    return base64.b64encode(b"".join(digests)).decode()


def state_of_originals(members: pd.DataFrame) -> str:
    """What changes when an image file is replaced: a hash of the sizes and times (behind a URL: ETags) of all files of a shard."""
    sha = hashlib.sha256()
    for path in members["path"]:
        sha.update("{} {}\n".format(*size_and_version(of_cell(path))).encode())
    return sha.hexdigest()


def identity(catalogue: Catalogue, split: Split, settings: dict) -> dict:
    """What must be the same for all tasks of one packing, in a form that can be compared line by line."""
    about = {name: value for name, value in vars(catalogue).items() if name not in ("images", "what")}
    images, rows = hashlib.sha256(), hashlib.sha256()
    images.update(json.dumps(about, default=str).encode())
    images.update(catalogue.images.drop(columns="path").to_csv(index=False).encode())
    for name, members in split.rows.items():
        rows.update(name.encode() + np.ascontiguousarray(members, dtype="<i8").tobytes())
    rest = replace(split, rows={})
    rows.update(json.dumps(vars(rest), default=str).encode())
    return settings | {
        "source": images.hexdigest(),
        "protocol": json.loads(json.dumps(split.protocol, default=str)),
        "split": rows.hexdigest(),
    }


class Records:
    """The records of one packing, in the place beside its first output."""

    def __init__(self, place: Place, scratch: Path):
        """Nothing is read yet. scratch: a folder for files that are being written."""
        self.place, self._scratch = place, scratch
        self._samples: dict[int, int] = {}  # by the place of a shard

    def begin(self, plan: dict) -> None:
        """Say what is packed here; another packing is refused.

        It looks, writes and looks again: of two that begin at once, at least one sees the other.

        Raises:
            ValueError: somebody packs, or packed, something else here.
        """
        data = json.dumps(plan, indent=1, ensure_ascii=False).encode()
        own = f"plan-{hashlib.sha256(data).hexdigest()[:16]}.json"
        self._refuse_others(own, plan)
        write(self.place, own, data, self._scratch)
        self._refuse_others(own, plan)

    def _refuse_others(self, own: str, plan: dict) -> None:
        if not (others := plans(self.place.names()) - {own}):
            return
        there = json.loads(self.place.read(min(others)))
        differences = [
            f"{name} {_short(there.get(name))} there, {_short(plan.get(name))} here"
            for name in dict.fromkeys([*plan, *there])
            if there.get(name) != plan.get(name)
        ]
        raise ValueError(
            f"{self.place} is of another packing that is not complete ({'; '.join(differences)}). Give the same command, "
            f"source and number of tasks to go on with that one, or give another place, or remove what it left: {self.place} and the "
            "unfinished dataset beside it."
        )

    def write(self, cut: Cut, record: Record) -> None:
        """A shard is complete, and all of its files are in their place."""
        write(self.place, f"{cut.name}.json", record.to_bytes(), self._scratch)
        self._samples[cut.place] = record.samples

    def read(self, cut: Cut) -> Record | None:
        """The record of a shard, if there is one."""
        try:
            return read_record(self.place.read(f"{cut.name}.json"))
        except FileNotFoundError:
            return None

    def first_key(self, cut: Cut, cuts: list[Cut]) -> int:
        """The first key of a shard, as far as the shards before it are known: of others, every image counts as readable."""
        names = self.place.names()
        for other in cuts[: cut.place]:
            if other.place not in self._samples and f"{other.name}.json" in names and (found := self.read(other)):
                self._samples[other.place] = found.samples
        return sum(self._samples.get(other.place, len(other.rows)) for other in cuts[: cut.place])

    def sign(self, task: Task, error: str = "") -> None:
        """A task has done all of its shards, or has failed."""
        write(self.place, f"task-{task.rank}.json", json.dumps({"error": error}).encode(), self._scratch)

    def unsign(self, task: Task) -> None:
        """A task is at work: nobody completes the dataset before it is done."""
        self.place.remove(f"task-{task.rank}.json")

    def unfinished(self, task: Task) -> dict[int, str]:
        """Tasks that are not done, each with its error if it said one."""
        names, found = self.place.names(), dict[int, str]()
        for rank in range(task.size):
            error = ""
            if (name := f"task-{rank}.json") in names:
                error = json.loads(self.place.read(name))["error"]
                if not error:
                    continue
            found[rank] = error
        return found


def plans(names: set[str]) -> set[str]:
    """Names of files that say what is packed."""
    return {name for name in names if name.startswith("plan-") and name.endswith(".json")}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text
