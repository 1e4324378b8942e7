"""One shard of a WebDataset: its tar, and the table of where its images lie.

In: encoded samples in order. Out: a tar and a table. Invariants: the same samples under the same keys are the same bytes; keys are
consecutive numbers, and a tar that got other ones is the same tar under new names.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from shards.catalogue import Catalogue

Sample = tuple[list[bytes], bytes, list[str]]  # the JPEG of each output, SHA-256 of the original, notes


@dataclass
class Written:
    """What went into a shard: place -> problem of what did not, SHA-256 of the originals of what did, and counted notes."""

    bad: dict[int, str] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def write_tars(
    paths: list[Path],
    samples: Iterable[Sample | str],
    members: pd.DataFrame,
    catalogue: Catalogue,
    first_key: int,
    count: Callable[[], object],
) -> Written:
    """Write one shard of each output; `count` is called after each sample."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds: only packing pays for it

    rows, written = members.drop(columns=["path", "label"]).to_dict("records"), Written()
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        tars = [stack.enter_context(TarWriter(file, encoder=False, mtime=0)) for file in files]
        for place, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            count()
            if isinstance(sample, str):
                written.bad[place] = sample
                continue
            (jpegs, digest, noted), name = sample, members["label"].iloc[place]
            label = catalogue.classes.index(name)
            text = json.dumps(row | {"label": label, "class": name}, ensure_ascii=False, sort_keys=True).encode()
            key = _key(first_key + len(written.digests))
            for tar, jpeg in zip(tars, jpegs, strict=True):
                tar.write({"__key__": key, "jpg": jpeg, "cls": str(label).encode(), "json": text})
            written.digests.append(digest)
            written.notes.update(noted)
    return written


def renumber(source: Path, target: Path, first_key: int) -> None:
    """Write a shard again, under other keys: the bytes that it would have had from the start."""
    from webdataset.writer import TarWriter

    with tarfile.open(source) as tar, open(target, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        number, key, parts = first_key, "", dict[str, bytes]()
        for member in tar:
            name, _, ending = member.name.partition(".")
            if parts and name != key:
                writer.write({"__key__": _key(number)} | parts)
                number, parts = number + 1, {}
            content = tar.extractfile(member)
            assert content is not None
            key, parts[ending] = name, content.read()
        writer.write({"__key__": _key(number)} | parts)


def _key(number: int) -> str:
    return f"{number:08d}"


def sample_table(path: Path, members: pd.DataFrame, catalogue: Catalogue) -> bytes:
    """A CSV of one row a sample of a tar that was just written: where its image lies, and the source's columns."""
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
    table = pd.DataFrame(
        {
            "key": [member.name.removesuffix(".jpg") for member in images],
            "offset": [member.offset_data for member in images],
            "size": [member.size for member in images],
            "label": members["label"].map(catalogue.classes.index).to_numpy(),
        }
    )
    extras = members[["group", "image_id", *catalogue.extra_columns]].reset_index(drop=True)
    return table_bytes(pd.concat([table, extras], axis=1))


def table_bytes(table: pd.DataFrame) -> bytes:
    """A table as the CSV that datasets have."""
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, lineterminator="\n")
    return buffer.getvalue().encode()
