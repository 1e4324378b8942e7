"""The shards of a dataset, however many, as columns.

In: the rows of `shards.csv`, piece by piece. Out: a `ShardList`, which makes a `Shard` when it is asked for one. Invariants: a shard takes about
110 bytes, not the kilobyte of an object with its texts; each row is checked before it is kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pandas as pd

from shards.description import DAMAGED, check_name

SHARD_COLUMNS = ("file", "split", "samples", "bytes", "sha256", "table_sha256")
TAR_BLOCK = 512  # bytes; a sample has at least one block for its header and one for its image
DIGEST = 32  # bytes of a SHA-256


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


class ShardList:
    """A sequence of `Shard`.

    samples, bytes: of each shard, (n,) int64, read-only.
    """

    def __init__(
        self, names: bytes, ends: np.ndarray, splits: tuple[str, ...], numbers: np.ndarray, digests: np.ndarray
    ):
        """Take columns.

        Args:
            names: all file names, one behind the other. ends: (n, 2) int64, where each begins and ends in them. splits: names of
            splits. numbers: (n, 3) int64, the place in `splits`, samples and bytes. digests: (n, 64) uint8, SHA-256 of tar and table.
        """
        self._names, self._ends, self._splits, self._numbers, self._digests = names, ends, splits, numbers, digests
        numbers.flags.writeable = False
        self.samples, self.bytes = numbers[:, 1], numbers[:, 2]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> "ShardList": ...
    def __getitem__(self, place: int | slice) -> "Shard | ShardList":
        """One shard, or some of them."""
        if isinstance(place, slice):
            return self._some(place)
        (start, end), (split, samples, size) = self._ends[place].tolist(), self._numbers[place].tolist()
        digests = self._digests[place].tobytes()
        name = self._names[start:end].decode("ascii")
        return Shard(name, self._splits[split], samples, size, digests[:DIGEST].hex(), digests[DIGEST:].hex())

    def __iter__(self) -> Iterator[Shard]:
        return (self[place] for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether the same shards are in the same order."""
        if not isinstance(other, ShardList) or not np.array_equal(self._digests, other._digests):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as of a list

    def of_split(self, name: str) -> "ShardList":
        """The shards of one split; as packing writes them, next to each other, they are a view of this list."""
        if name not in self._splits:
            return self[:0]
        here = np.flatnonzero(self._numbers[:, 0] == self._splits.index(name))
        is_run = len(here) > 0 and here[-1] - here[0] == len(here) - 1
        return self._some(slice(int(here[0]), int(here[-1]) + 1) if is_run else here)

    def _some(self, places: slice | np.ndarray) -> "ShardList":
        return ShardList(self._names, self._ends[places], self._splits, self._numbers[places], self._digests[places])


def read_shards(pieces: Iterable[pd.DataFrame], splits: Iterable[str], table: str) -> ShardList:
    """Check the rows of `shards.csv` and keep them.

    Args:
        pieces: parts of the table, in its order. splits: names that a row may have. table: what errors call it.

    Raises:
        ValueError: other columns, or a row that no packing would write.
    """
    names, digests = bytearray(), bytearray()
    lengths, numbers = [], []
    codes = {name: code for code, name in enumerate(splits)}
    for piece in pieces:
        if tuple(piece) != SHARD_COLUMNS:
            raise ValueError(
                f"{table} has the columns {', '.join(piece)[:200]} instead of {', '.join(SHARD_COLUMNS)}. {DAMAGED}"
            )
        files, of_split, samples, sizes, tars, tables = (piece[name].tolist() for name in SHARD_COLUMNS)
        for file, split, count, size in zip(files, of_split, samples, sizes, strict=True):
            check_name(file, table, ".tar")
            if split not in codes or not 0 < count <= size // (2 * TAR_BLOCK):
                raise ValueError(
                    f"{table}: {file} has {count} samples of split {str(split)[:40]!r} in {size} bytes. {DAMAGED}"
                )
        names += "".join(files).encode("ascii")
        lengths.append(np.fromiter(map(len, files), np.int64, len(files)))
        numbers.append(np.array([list(map(codes.__getitem__, of_split)), samples, sizes], np.int64).T)
        digests += _digests(files, [text for both in zip(tars, tables, strict=True) for text in both], table)
    ends = np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))
    starts = np.concatenate([[0], ends])[:-1]
    return ShardList(
        bytes(names),
        np.stack([starts, ends], axis=1),
        tuple(codes),
        np.concatenate([*numbers, np.zeros((0, 3), np.int64)]),
        np.frombuffer(digests, np.uint8).reshape(-1, 2 * DIGEST),
    )


def _digests(files: list[str], texts: list[str], table: str) -> bytes:
    """Digests of tars and their tables, in turn, from hexadecimal text."""
    whole = "".join(texts)
    try:
        found = bytes.fromhex(whole)
    except ValueError:
        found = b""
    if found.hex() != whole or any(len(text) != 2 * DIGEST for text in texts):
        digits = set("0123456789abcdef")
        wrong = next(n for n, text in enumerate(texts) if len(text) != 2 * DIGEST or not digits.issuperset(text))
        raise ValueError(f"{table}: {files[wrong // 2]} has {texts[wrong][:80]!r} as a SHA-256. {DAMAGED}")
    return found
