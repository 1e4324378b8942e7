"""A packed dataset becomes complete: from the records of all of its shards, by any one task.

In: records, and what every task has read. Out: index files, and `dataset.json` last. Invariants: it is the same dataset, byte for byte,
however many tasks packed it, whichever of them completes it, and if two do.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from shards.catalogue import Catalogue
from shards.description import FORMAT, Description
from shards.files import sha256
from shards.grouping import Split
from shards.groups import group_hashes
from shards.outputs import MARK, Output
from shards.places import write
from shards.records import Record, Records
from shards.shard_list import SHARD_COLUMNS, Shard
from shards.tars import renumber, sample_table, table_bytes
from shards.tasks import Cut, Task
from shards.unreadable import without


@dataclass(frozen=True)
class Whole:
    """All records of a packing as one: the source's fingerprint, row -> what is wrong with its image, notes, each output's shards."""

    fingerprint: str
    bad: dict[int, str]
    notes: dict[str, int]
    shards: list[list[Shard]]


def commit(
    catalogue: Catalogue, split: Split, cuts: list[Cut], outputs: list[Output], records: Records, task: Task
) -> list[Description]:
    """Make datasets complete whose tasks are all done.

    Raises:
        ValueError: a split without an image that can be read.
        FileNotFoundError: a file is gone that a record names, or another task was faster.
    """
    whole = _gather(catalogue, cuts, outputs, records, task)
    split = without(split, whole.bad, catalogue.images["label"], catalogue.images["group"])
    found = [
        _write_index(output, catalogue, split, shards, whole)
        for output, shards in zip(outputs, whole.shards, strict=True)
    ]
    for output in reversed(outputs):  # the first one, beside which the records are, goes last
        output.appear()
    return found


def _gather(catalogue: Catalogue, cuts: list[Cut], outputs: list[Output], records: Records, task: Task) -> Whole:
    source, bad, notes = hashlib.sha256(), dict[int, str](), Counter[str]()
    shards: list[list[Shard]] = [[] for _ in outputs]
    there = [output.files.names() for output in outputs]
    first_key = 0
    for cut in cuts:
        record, again = records.read(cut), f"Start task {cut.place % task.size} of {task.size} again"
        if record is None:
            raise FileNotFoundError(f"The record of {cut.name} is gone from {records.place}. {again}.")
        bad |= {int(cut.rows[place]): problem for place, problem in record.bad.items()}
        members = readable_members(catalogue, cut, record.bad)
        rows = zip(members["image_id"], members["label"], members["group"], record.of_originals(), strict=True)
        for image_id, label, group, digest in rows:
            source.update(f"{image_id}\t{label}\t{group}\t".encode() + digest)
        notes.update(record.notes)
        if not record.samples:
            continue
        for output, names in zip(outputs, there, strict=True):
            if missing := {f"{cut.name}.tar", f"{cut.name}.csv"} - names:
                raise FileNotFoundError(f"{output.files}/{min(missing)} is gone. {again}.")
        if record.first_key != first_key:
            record = _renumber(cut, record, first_key, members, catalogue, outputs)
            records.write(cut, record)
        for found, (size, *digests) in zip(shards, record.files, strict=True):
            found.append(Shard(f"{cut.name}.tar", cut.split, record.samples, size, *digests))
        first_key += record.samples
    return Whole(source.hexdigest(), bad, dict(sorted(notes.items())), shards)


def readable_members(catalogue: Catalogue, cut: Cut, bad: dict[int, str]) -> pd.DataFrame:
    """The rows of a shard whose images are in it."""
    members = catalogue.images.iloc[cut.rows]
    return members.drop(members.index[list(bad)])


def _renumber(
    cut: Cut, record: Record, first_key: int, members: pd.DataFrame, catalogue: Catalogue, outputs: list[Output]
) -> Record:
    """Give a shard other keys: images before it were found to be unreadable after it had been packed.

    What a killed task left of this, or another one is doing, makes no difference: each file is replaced at once, by the same bytes.
    """
    files = []
    for output, (_, digest, _) in zip(outputs, record.files, strict=True):
        name = f"{cut.name}.tar"
        old, new = output.files.fetch(name, output.scratch), output.scratch / name
        renumber(old, new, first_key)
        table, size, digests = sample_table(new, members, catalogue), new.stat().st_size, (sha256(old), sha256(new))
        if digests[0] not in (digest, digests[1]):
            raise ValueError(
                f"{output.files}/{name} was changed after it was packed. Remove it, and start the task that packed it again."
            )
        if old.parent == output.scratch:
            old.unlink()
        output.files.take(new, name)
        files.append((size, digests[1], write(output.files, f"{cut.name}.csv", table, output.scratch)))
    return replace(record, first_key=first_key, files=tuple(files))


def _write_index(output: Output, catalogue: Catalogue, split: Split, shards: list[Shard], whole: Whole) -> Description:
    """Write the index files; `dataset.json`, which marks a complete dataset, goes last."""
    images, packing = catalogue.images, output.packing
    reasons = [(images["image_id"].iloc[row], why) for row, why in sorted(split.left_out.items())]
    put = partial(write, output.files, scratch=output.scratch)
    files = {
        "shards.csv": put("shards.csv", table_bytes(pd.DataFrame(shards, columns=SHARD_COLUMNS))),
        "left_out.csv": put("left_out.csv", table_bytes(pd.DataFrame(reasons, columns=["image_id", "reason"]))),
    }
    for name, rows in split.rows.items():
        hashes = io.BytesIO()
        np.save(hashes, group_hashes(images["group"].iloc[rows]))
        files[f"{name}.groups.npy"] = put(f"{name}.groups.npy", hashes.getvalue())
    description = Description(
        format=FORMAT,
        classes=list(catalogue.classes),
        size=list(packing.size),
        fit=packing.fit,
        quality=packing.quality,
        protocol=split.protocol,
        aliases=split.aliases,
        counts={name: _class_counts(catalogue, rows) for name, rows in split.rows.items()},
        left_out=len(split.left_out),
        warnings=[*catalogue.warnings, *split.warnings],
        source={"name": catalogue.name, "images": len(images), "fingerprint": whole.fingerprint} | whole.notes,
        files=files,
        group_name=catalogue.group_name,
        citation=catalogue.citation,
        license=catalogue.license,
    )
    put(MARK, description.to_bytes())
    return description


def _class_counts(catalogue: Catalogue, rows: Sequence[int] | np.ndarray) -> dict[str, int]:
    counts = Counter(catalogue.images["label"].iloc[rows])
    return {name: counts[name] for name in catalogue.classes}
