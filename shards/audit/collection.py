"""What an audit compares: the images of packed datasets, or of a source before it is packed.

In: folders and tables. Out: a `Collection`. Invariants: every image of the dataset is in it once, with its split, group and label;
nothing but the images' bytes is read later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from shards.catalogue import REQUIRED, Catalogue
from shards.index import TABLE_COLUMNS, Dataset, load, load_table
from shards.public_data import Columns
from shards.reader import SplitReader
from shards.remote import DEFAULT_ACCESS, Access
from shards.sources import read_source
from shards.tree import RemotePath

CORE = ("data", "split", "image_id", "group", "label")


@dataclass(frozen=True)
class Collection:
    """Images to compare.

    table: one row an image, all text: `data` (which folder), `split` (empty before packing), `image_id, group, label`, then what else
        is known of it. read: the bytes of an image file, by row. versions: for each image, what changes when its bytes do.
    fingerprints: folder -> fingerprint of a packed dataset.
    """

    table: pd.DataFrame
    read: Callable[[int], bytes]
    versions: list[str]
    fingerprints: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Of the images, for people."""
        return (self.table["data"] + "/" + self.table["image_id"]).tolist()

    @property
    def group_keys(self) -> np.ndarray:
        """What images must share not to be compared, (n,) text: two folders may name their groups alike."""
        return (self.table["data"] + "/" + self.table["group"]).to_numpy()


def open_collection(path: Path | str, columns: Columns, access: Access = DEFAULT_ACCESS) -> Collection:
    """The images of a packed dataset, or of a source as `pack` reads it.

    Args:
        path: a folder, a table, or the URL of a packed dataset, which is read as `access` says.

    Raises:
        FileNotFoundError, ValueError: as `index.load` and `sources.read_source`.
    """
    if isinstance(path, str) or (path / "dataset.json").is_file():
        dataset = _load(path, access)
        return _packed(str(dataset.folder), dataset)
    return _unpacked(path, read_source(path, columns))


def join(first: Collection, second: Collection) -> Collection:
    """Both, to be compared with each other, too.

    Raises:
        ValueError: one is the other.
    """
    if set(first.table["data"]) & set(second.table["data"]) or (
        set(first.fingerprints.values()) & set(second.fingerprints.values())
    ):
        raise ValueError("Both are the same dataset. Give one of them alone, or two different ones.")
    n = len(first.table)
    table = pd.concat([first.table, second.table], ignore_index=True).fillna("")
    return Collection(
        table,
        lambda row: first.read(row) if row < n else second.read(row - n),
        first.versions + second.versions,
        first.fingerprints | second.fingerprints,
    )


def _load(path: Path | str, access: Access) -> Dataset:
    try:
        return load(path, access)
    except FileNotFoundError as error:
        if isinstance(path, Path):
            raise
        raise FileNotFoundError(f"{error} A source is packed before it is audited behind a URL.") from None


def _packed(name: str, dataset: Dataset) -> Collection:
    tables, readers, places = [], {}, []
    for split in dataset.description.counts:
        readers[split] = SplitReader(dataset, split)
        for number, shard in enumerate(readers[split].shards):
            rows = load_table(dataset, shard)
            labels = rows["label"].map(dict(enumerate(dataset.classes)))
            known = rows.drop(columns=[name for name in TABLE_COLUMNS if name not in ("image_id", "group")])
            tables.append(known.assign(data=name, split=split, label=labels))
            places += [(split, number, row) for row in range(len(rows))]

    def read(row: int) -> bytes:
        split, number, within = places[row]
        return next(readers[split].read(np.array([number]), np.array([within])))[1]

    table = _in_order(pd.concat(tables, ignore_index=True))
    versions = (f"{dataset.fingerprint} {split} {number} {row}" for split, number, row in places)
    return Collection(table, read, list(versions), {name: dataset.fingerprint})


def _unpacked(path: Path, source: Catalogue) -> Collection:
    images = source.images
    known = images.drop(columns=[name for name in REQUIRED if name == "path"])
    if "split" in known and source.split_column != "split":
        known = known.drop(columns="split")
    split = known.get("split", "")
    table = _in_order(known.assign(data=str(path), split=split).reset_index(drop=True))
    if any(isinstance(name, RemotePath) for name in images["path"]):
        raise ValueError(f"The images of {path} are behind a URL. Pack them, and audit the packed dataset's URL.")
    paths = [Path(name).resolve() for name in images["path"]]
    versions = [f"{file} {(found := file.stat()).st_size} {found.st_mtime_ns}" for file in paths]
    return Collection(table, lambda row: paths[row].read_bytes(), versions, {})


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    return table[[*CORE, *(name for name in table if name not in CORE)]]
