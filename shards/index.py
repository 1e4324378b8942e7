"""What is in a packed dataset: `dataset.json`, `shards.csv`, `left_out.csv` and one table beside each shard.

In: a packed folder, or its URL. Out: a frozen `Dataset`. Invariants: loading costs as much as there are shards, not samples;
each file's SHA-256 stands in a file above it, and `dataset.json` carries its own. A checksum says that nothing was changed
since, not by whom it was made: no file outside the folder is opened, and every number is checked before it is used.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from shards.description import DAMAGED, Description, check_name, parse_description, read_description
from shards.files import sha256
from shards.remote import DEFAULT_ACCESS, Access, RemoteFolder, open_folder
from shards.shard_list import Shard, ShardList, read_shards

NUMBERS = ("key", "offset", "size", "label")  # columns of a shard's table
TABLE_COLUMNS = (*NUMBERS, "group", "image_id")  # of a shard's table, beside those of the source
SHARDS_AT_ONCE = 2048  # rows of shards.csv that are texts at a time


@dataclass(frozen=True)
class Dataset:
    """A packed folder, opened. As text, `folder` is its path, or its URL without what gives access."""

    folder: Path | RemoteFolder
    description: Description
    shards: ShardList

    @property
    def name(self) -> str:
        """The last part of its path or URL."""
        return self.folder.name if isinstance(self.folder, RemoteFolder) else self.folder.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return tuple(self.description.classes)

    @property
    def width(self) -> int:
        """Stored width in pixels."""
        return self.description.size[0]

    @property
    def height(self) -> int:
        """Stored height in pixels."""
        return self.description.size[1]

    @property
    def group_name(self) -> str:
        """What a group is, in the singular: lesion, patient, group."""
        return self.description.group_name

    @property
    def groups_name(self) -> str:
        """What groups are, in the plural: lesions, patients, groups."""
        name = self.group_name
        if name.endswith("s"):  # series
            return name
        return f"{name[:-1]}ies" if name.endswith("y") and name[-2:-1] not in "aeiou" else f"{name}s"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that identifies every byte of the dataset."""
        return self.description.checksum

    def describe_split(self) -> str:
        """The split's protocol and parameters, in one line."""
        protocol = self.description.protocol
        settings = ", ".join(f"{name} {value}" for name, value in protocol.items() if name != "name")
        return f"protocol {protocol['name']} ({settings})"

    def split(self, name: str) -> ShardList:
        """The shards of a split, in order; an alias gives the shards it stands for.

        Raises:
            ValueError: there is no such split.
        """
        real = self.description.aliases.get(name, name)
        shards = self.shards.of_split(real)
        if not shards:
            known = [*self.description.counts, *self.description.aliases]
            raise ValueError(f"The dataset {self.folder} has no split {name!r}. It has: {', '.join(known)}.")
        return shards


def load(place: Path | str, access: Access = DEFAULT_ACCESS) -> Dataset:
    """Open a packed dataset: two small files are read and checked against each other.

    Args:
        place: a folder, or a URL of one. access: how a URL is read.

    Raises:
        FileNotFoundError: no packed dataset there.
        ValueError: a newer format, or an index that was changed after packing, or that no packing would write.
        OSError: a URL that cannot be read, or a cache folder that cannot be written.
    """
    folder = open_folder(place, access)
    if isinstance(folder, RemoteFolder):
        description = parse_description(folder.read("dataset.json"), f"{folder}/dataset.json")
    elif (folder / "dataset.json").is_file():
        description = read_description(folder / "dataset.json")
    else:
        raise FileNotFoundError(
            f"No packed dataset in {folder} (no dataset.json). "
            f"Pack one with `python -m shards pack SOURCE {folder}`, or give its folder as --data.path."
        )
    numbers = {"samples": np.int64, "bytes": np.int64}
    pieces = _read_pieces(folder, "shards.csv", description.files, numbers, SHARDS_AT_ONCE)
    return Dataset(folder, description, read_shards(pieces, description.counts, f"{folder}/shards.csv"))


def load_table(dataset: Dataset, shard: Shard, numbers_only: bool = False) -> pd.DataFrame:
    """One row a sample of one shard: `key, offset, size, label` (integers), `group, image_id`, extras (text).

    `offset` and `size` are the image's bytes in the tar.

    Args:
        numbers_only: leave out the columns of text, which take four fifths of the time.

    Raises:
        ValueError, FileNotFoundError: the table is not what was packed, or missing, or none of that shard.
    """
    path = f"{dataset.folder}/{shard.table}"
    recorded = {shard.table: shard.table_sha256}
    (table,) = _read_pieces(dataset.folder, shard.table, recorded, dict.fromkeys(NUMBERS, np.int64), None, numbers_only)
    if missing := [name for name in (NUMBERS if numbers_only else TABLE_COLUMNS) if name not in table]:
        raise ValueError(f"{path} has no column {missing[0]}. {DAMAGED}")
    if len(table) != shard.samples:
        raise ValueError(f"{path} has {len(table)} rows instead of {shard.samples}. {DAMAGED}")
    ends = {"key": None, "offset": shard.bytes - table["size"], "size": shard.bytes, "label": len(dataset.classes) - 1}
    for name, end in ends.items():
        if (table[name] < 0).any() or (end is not None and (table[name] > end).any()):
            raise ValueError(f"{path} has a {name} that cannot be. {DAMAGED}")
    return table


def verify(place: Path | str, access: Access = DEFAULT_ACCESS) -> list[str]:
    """Check every file of a packed dataset against its recorded SHA-256; behind a URL, past the cache.

    Returns:
        one sentence for each problem; an empty list if there is none.
    """
    try:
        dataset = load(place, access)
    except (OSError, ValueError) as error:
        return [str(error)]
    recorded = dict(dataset.description.files)
    for shard in dataset.shards:
        recorded |= {shard.file: shard.sha256, shard.table: shard.table_sha256}
    problems, folder = [], dataset.folder
    for name, digest in recorded.items():
        try:
            found = folder.sha256(name) if isinstance(folder, RemoteFolder) else sha256(folder / name)
        except FileNotFoundError:
            problems.append(f"{folder}/{name} is missing.")
            continue
        except OSError as error:
            if not isinstance(folder, RemoteFolder):
                raise
            problems.append(str(error))
            continue
        if found != digest:
            problems.append(f"{folder}/{name} differs from what was packed: its SHA-256 is not the recorded one.")
    names = folder.storage.names() if isinstance(folder, RemoteFolder) else {path.name for path in folder.iterdir()}
    extra = (names or set()) - {"dataset.json", *recorded, ""}
    problems += [f"{folder}/{name} does not belong to the dataset." for name in sorted(extra)]
    return problems


def _read_pieces(
    folder: Path | RemoteFolder,
    name: str,
    files: dict[str, str],
    numbers: dict[str, type],
    at_once: int | None,
    numbers_only: bool = False,
) -> Iterator[pd.DataFrame]:
    """A table in pieces of so many rows, or in one, all text but for some columns of whole numbers; without the text, if asked.

    Raises:
        ValueError, OSError: naming the file.
    """
    if isinstance(folder, RemoteFolder):
        check_name(name, str(folder))
        data = folder.read_checked(name, files.get(name, ""))
        head, body = io.BytesIO(data), io.BytesIO(data)
    else:
        head = body = read_listed(folder, name, files)
    try:
        columns = pd.read_csv(head, nrows=0, index_col=False).columns
        types = {column: numbers.get(column, str) for column in columns}
        wanted = [column for column in columns if column in numbers] if numbers_only else None
        read = partial(pd.read_csv, body, dtype=types, keep_default_na=False, index_col=False, usecols=wanted)
        if at_once is None:
            yield read()
        else:
            with read(chunksize=at_once) as pieces:
                yield from pieces
    except (ValueError, OverflowError, TypeError) as error:  # pandas' own are ValueErrors
        raise ValueError(
            f"{folder}/{name} is no table of a dataset ({' '.join(str(error).split())[:200]}). {DAMAGED}"
        ) from error


def read_listed(folder: Path | RemoteFolder, name: str, files: dict[str, str]) -> Path:
    """The path of an index file, or of its copy in the cache, after its SHA-256 was compared with the recorded one.

    Raises:
        FileNotFoundError, ValueError: it is missing, or was changed after packing.
    """
    check_name(name, str(folder))
    if isinstance(folder, RemoteFolder):
        return folder.keep(name, files.get(name, ""))
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Copy the dataset again, or pack it again.")
    if sha256(path) != files.get(name):
        raise ValueError(
            f"{path} was changed after packing: its SHA-256 is not the recorded one. Copy the dataset again."
        )
    return path
