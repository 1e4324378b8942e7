"""Groups (lesions, patients) of a split as sorted 64-bit hashes: few of them in memory, many in their file, read in pieces.

In: group names, or a dataset's files of hashes. Out: `Groups`, and how many two of them share. Invariants: what is compared is sorted,
each hash once, and has the recorded SHA-256; memory is a piece's, however many groups there are.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.description import DAMAGED, check_name
from shards.index import Dataset, read_listed

IN_MEMORY = 2**20  # hashes, 8 MiB: of more, the file is named instead
PIECE = 2**20  # hashes read at a time
HEADER = 128  # bytes of a NumPy file of one dimension


@dataclass(frozen=True)
class GroupFile:
    """More than IN_MEMORY hashes, in a file like `train.groups.npy`: its path, its SHA-256 and their number."""

    path: Path
    sha256: str
    count: int

    def __len__(self) -> int:
        return self.count


Groups = np.ndarray | GroupFile  # as from `group_hashes`


def group_hashes(groups: Iterable[str]) -> np.ndarray:
    """Groups as sorted 64-bit hashes (the start of their SHA-256), each once: enough to find shared ones, 8 bytes each."""
    hashes = [int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "little") for group in set(groups)]
    return np.sort(np.array(hashes, dtype=np.uint64))


def load_groups(dataset: Dataset, split: str) -> Groups:
    """The groups of a split. Of a large file, the content is compared with its SHA-256 when it is read.

    Raises:
        ValueError, FileNotFoundError: there is no such split, or the file is damaged or missing.
    """
    name = f"{dataset.split(split)[0].split}.groups.npy"
    folder, recorded = dataset.folder, dataset.description.files
    check_name(name, str(folder))
    path = folder / name if isinstance(folder, Path) else read_listed(folder, name, recorded)
    if name in recorded and path.is_file() and path.stat().st_size > HEADER + 8 * IN_MEMORY:
        with open(path, "rb") as file:
            return GroupFile(path.resolve(), recorded[name], _read_header(file, path))
    return read_hashes(read_listed(dataset.folder, name, recorded))


def read_hashes(path: Path) -> np.ndarray:
    """A file of group hashes, as from `group_hashes`. No pickle is loaded, and no more memory taken than the file has bytes.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        _read_header(file, path)
        return np.fromfile(file, np.uint64)


def pieces(groups: Groups) -> Iterator[np.ndarray]:
    """Sorted hashes in pieces of at most PIECE, none of them empty; a file's SHA-256 is compared at its end.

    Raises:
        FileNotFoundError: the file is not there. ValueError: it was changed, or holds no sorted hashes.
    """
    if isinstance(groups, np.ndarray):
        yield from (groups[first : first + PIECE] for first in range(0, len(groups), PIECE))
        return
    path = groups.path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, the list of the {groups.count} training groups. Put the train.groups.npy of the training dataset "
            f"there or into the run's folder (SHA-256 {groups.sha256}), or give that dataset."
        )
    with open(path, "rb") as file:
        _read_header(file, path)
        start = file.tell()
        file.seek(0)
        digest, last = hashlib.sha256(file.read(start)), -1
        while len(data := file.read(PIECE * 8)):
            piece = np.frombuffer(data, np.uint64)
            digest.update(data)
            if int(piece[0]) <= last or not (piece[1:] > piece[:-1]).all():
                raise ValueError(f"{path} is not a list of sorted group hashes. {DAMAGED}")
            last = int(piece[-1])
            yield piece
    if digest.hexdigest() != groups.sha256:
        raise ValueError(f"{path} has another SHA-256 than the recorded {groups.sha256}. {DAMAGED}")


def count_shared(groups: Groups, *others: Groups) -> int:
    """How many groups of the first are also in one or more of the others.

    Raises:
        FileNotFoundError, ValueError: as `pieces`.
    """
    union = reduce(_union, map(pieces, others))
    return sum(len(np.intersect1d(a, b, assume_unique=True)) for a, b in _in_step(pieces(groups), union))


def _union(first: Iterator[np.ndarray], second: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Sorted hashes in pieces: those of either of two such, each once."""
    return (np.union1d(a, b) for a, b in _in_step(first, second))


def _in_step(first: Iterator[np.ndarray], second: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two sorted lists, both to their ends, cut so that the parts of a pair cover the same range; one of them may be empty."""
    none = np.empty(0, np.uint64)
    a, b = next(first, none), next(second, none)
    while len(a) or len(b):
        last = min(part[-1] for part in (a, b) if len(part))
        n, m = np.searchsorted(a, last, "right"), np.searchsorted(b, last, "right")
        yield a[:n], b[:m]
        a = a[n:] if n < len(a) else next(first, none)
        b = b[m:] if m < len(b) else next(second, none)


def _read_header(file: BinaryIO, path: Path) -> int:
    """The number of hashes in a file that is opened at its start; it is left where they begin.

    Raises:
        ValueError: it is no list of hashes.
    """
    size = path.stat().st_size
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1 of the format")
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # its header is Python, which has many ways to be wrong
        raise ValueError(f"{path} is no NumPy file of group hashes ({error}). {DAMAGED}") from error
    if kind != np.uint64 or len(shape) != 1 or shape[0] * kind.itemsize != size - file.tell():
        raise ValueError(f"{path} holds {shape} of {kind} instead of a list of group hashes. {DAMAGED}")
    return shape[0]
