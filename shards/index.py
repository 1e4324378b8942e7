"""What is in a packed dataset: `dataset.json`, `shards.csv`, `left_out.csv` and one table beside each shard.

In: a packed folder. Out: a frozen `Dataset`. Invariants: loading costs as much as there are shards, not samples;
each file's SHA-256 stands in a file above it, and `dataset.json` carries its own.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from shards.files import sha256

FORMAT = 2
ADDED_IN_FORMAT = {"group_name": 2, "citation": 2, "license": 2}  # the format that a field of `dataset.json` came with
SHARD_COLUMNS = ("file", "split", "samples", "bytes", "sha256", "table_sha256")


@dataclass(frozen=True)
class Shard:
    """One tar: file name, split, number of samples, bytes, SHA-256 of the tar and of its table."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str
    table_sha256: str

    @property
    def table(self) -> str:
        """Name of the CSV with one row a sample."""
        return Path(self.file).with_suffix(".csv").name


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says.

    classes: class names, a label is a place in them. size: stored (width, height) in pixels.
    protocol: name and parameters of the split. aliases: split names that mean another split.
    counts: split -> class -> images. left_out: number of source images stored nowhere.
    warnings: what a reader of a score must be told. source: name, number of images, fingerprint (SHA-256 over ids,
    labels, groups and original bytes). files: name -> SHA-256 of the index files.
    group_name: what a group is, in the singular. citation, license: of the images, empty where unknown. (Since format 2.)
    """

    format: int
    classes: list[str]
    size: list[int]
    fit: str
    quality: int
    protocol: dict
    aliases: dict[str, str]
    counts: dict[str, dict[str, int]]
    left_out: int
    warnings: list[str]
    source: dict
    files: dict[str, str]
    group_name: str = "group"
    citation: str = ""
    license: str = ""

    def to_bytes(self) -> bytes:
        """The bytes of `dataset.json`, with a checksum of everything else in them."""
        content = self._content() | {"checksum": self.checksum}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def checksum(self) -> str:
        """SHA-256 over the content; since it covers every file's SHA-256, it identifies the whole dataset."""
        return hashlib.sha256(json.dumps(self._content(), ensure_ascii=False).encode()).hexdigest()

    def _content(self) -> dict:
        """The fields that the dataset's format has: an older dataset keeps its bytes and its checksum."""
        return {name: value for name, value in asdict(self).items() if ADDED_IN_FORMAT.get(name, 1) <= self.format}


@dataclass(frozen=True)
class Dataset:
    """A packed folder, opened."""

    folder: Path
    description: Description
    shards: tuple[Shard, ...]

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

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of a split, in order; an alias gives the shards it stands for.

        Raises:
            ValueError: there is no such split.
        """
        real = self.description.aliases.get(name, name)
        shards = tuple(shard for shard in self.shards if shard.split == real)
        if not shards:
            known = [*self.description.counts, *self.description.aliases]
            raise ValueError(f"The dataset {self.folder} has no split {name!r}. It has: {', '.join(known)}.")
        return shards


def load(folder: Path | str) -> Dataset:
    """Open a packed dataset: two small files are read and checked against each other.

    Raises:
        FileNotFoundError: no packed dataset there.
        ValueError: a newer format, or an index that was changed after packing.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").is_file():
        raise FileNotFoundError(
            f"No packed dataset in {folder} (no dataset.json). "
            f"Pack one with `python -m shards pack SOURCE {folder}`, or give its folder as --data.path."
        )
    description = _load_description(folder / "dataset.json")
    table = read_listed(folder, "shards.csv", description.files)
    rows = pd.read_csv(table, dtype={"file": str, "split": str}).itertuples(index=False)
    return Dataset(folder, description, tuple(Shard(*row) for row in rows))


def load_table(dataset: Dataset, shard: Shard) -> pd.DataFrame:
    """One row a sample of one shard: `key, offset, size, label` (integers), `group, image_id`, extras (text).

    `offset` and `size` are the image's bytes in the tar.

    Raises:
        ValueError, FileNotFoundError: the table is not what was packed, or missing.
    """
    path = read_listed(dataset.folder, shard.table, {shard.table: shard.table_sha256})
    numbers = {"key": np.int64, "offset": np.int64, "size": np.int64, "label": np.int64}
    columns = pd.read_csv(path, nrows=0).columns
    types = {column: numbers.get(column, str) for column in columns}
    return pd.read_csv(path, dtype=types, keep_default_na=False)


def verify(folder: Path | str) -> list[str]:
    """Check every file of a packed dataset against its recorded SHA-256.

    Returns:
        one sentence for each problem; an empty list if there is none.
    """
    folder = Path(folder)
    try:
        dataset = load(folder)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    recorded = dict(dataset.description.files)
    for shard in dataset.shards:
        recorded |= {shard.file: shard.sha256, shard.table: shard.table_sha256}
    problems = []
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            problems.append(f"{folder / name} is missing.")
        elif sha256(folder / name) != digest:
            problems.append(f"{folder / name} differs from what was packed: its SHA-256 is not the recorded one.")
    extra = {path.name for path in folder.iterdir()} - {"dataset.json", *recorded}
    problems += [f"{folder / name} does not belong to the dataset." for name in sorted(extra)]
    return problems


def _load_description(path: Path) -> Description:
    advice = "Copy the dataset again, or pack it again."
    data = path.read_bytes()
    try:
        content = json.loads(data)
        found = int(content["format"])
        content.pop("checksum")
        description = Description(**content) if found <= FORMAT else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {advice}") from error
    if description is None:
        raise ValueError(f"{path} has format {found}; this version reads up to {FORMAT}. Update dermharness.")
    if description.to_bytes() != data:
        raise ValueError(f"{path} was changed after packing: its checksum does not match its content. {advice}")
    return description


def read_listed(folder: Path, name: str, files: dict[str, str]) -> Path:
    """The path of an index file, after its SHA-256 was compared with the recorded one.

    Raises:
        FileNotFoundError, ValueError: it is missing, or was changed after packing.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. Copy the dataset again, or pack it again.")
    if sha256(path) != files.get(name):
        raise ValueError(
            f"{path} was changed after packing: its SHA-256 is not the recorded one. Copy the dataset again."
        )
    return path
