"""Read stored images by shard, offset and size, from many threads.

In: a `Dataset`, here or behind a URL, and shard numbers of one split. Out: the JPEG's bytes and the rows of the shard's table. Invariants:
tables are read when their shard is first used; the rows of tables in memory and the number of open files are bounded.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.ahead import Ahead, Need
from shards.image import decode_into
from shards.index import Dataset, load_table
from shards.remote import OpenShard, RemoteFolder

OPEN_FILES = 64
TABLE_ROWS = 8_000_000  # of all tables that are kept: 256 MB
HAS_PREAD = hasattr(os, "pread")  # not on Windows


@dataclass(frozen=True)
class Table:
    """The numbers of one shard's table, each (samples,) int64."""

    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray


class ImageReader(Protocol):
    """Images of one size with a key and a label, addressed by (shard number, row). Safe to share between threads."""

    @property
    def title(self) -> str:
        """What they are, on a progress bar."""
        ...

    @property
    def height(self) -> int:
        """In pixels."""
        ...

    @property
    def width(self) -> int:
        """In pixels."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """What the labels number."""
        ...

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Images in each shard."""
        ...

    @property
    def is_reading(self) -> bool:
        """Whether some thread waits for a download, which has a limit of its own."""
        ...

    def fetch_ahead(self, needs: Callable[[], list[Need]], first: int) -> Ahead | None:
        """Begin to download what is needed from batch `first` on; None where everything is here."""
        ...

    def keys(self) -> np.ndarray:
        """The keys of all images, (N,) int64."""
        ...

    def read(self, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """The place of an image among those requested, and its bytes."""
        ...

    def decode(self, shard: int, row: int, data: bytes, out: np.ndarray) -> None:
        """Decode an image's bytes into `out`, (H, W, 3) uint8; a ValueError names it."""
        ...

    def labels_and_keys(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and keys, both (n,) int64."""
        ...


class SplitReader:
    """The samples of one split (or its alias), addressed by (shard number, row). Safe to share between threads."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.dataset = dataset
        self.classes, self.height, self.width = dataset.classes, dataset.height, dataset.width
        self.shards = dataset.split(split)
        self.title = self.shards[0].split
        self.shard_sizes = tuple(self.shards.samples.tolist())
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._rows_kept = 0
        self._lock = threading.Lock()

    def table(self, shard: int) -> Table:
        """Keys, offsets, sizes and labels of one shard."""
        with self._lock:
            if (known := self._tables.get(shard)) is not None:
                self._tables.move_to_end(shard)
                return known
        # Outside the lock: others read meanwhile. Two threads that read the same one at the same time cost a little more.
        frame = load_table(self.dataset, self.shards[shard], numbers_only=True)
        loaded = Table(*(frame[name].to_numpy() for name in ("key", "offset", "size", "label")))
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = loaded
                self._rows_kept += len(loaded.key)
            while self._rows_kept > TABLE_ROWS and len(self._tables) > 1:
                self._rows_kept -= len(self._tables.popitem(last=False)[1].key)
        return loaded

    @property
    def is_reading(self) -> bool:
        """Whether some thread waits for a download, which has a limit of its own."""
        return isinstance(self.dataset.folder, RemoteFolder) and self.dataset.folder.storage.is_reading

    def fetch_ahead(self, needs: Callable[[], list[Need]], first: int) -> Ahead | None:
        """Begin to download what is needed from batch `first` on; None for a local dataset, or without a cache."""
        folder = self.dataset.folder
        if not isinstance(folder, RemoteFolder) or folder.cache is None:
            return None

        def fetch(number: int) -> bool:
            shard = self.shards[number]
            table = folder.fetch(shard.table, shard.table_sha256)
            return folder.fetch(shard.file, shard.sha256, shard.bytes) and table

        return Ahead(needs(), first, fetch, lambda number: self.shards[number].bytes, folder.cache.limit)

    def keys(self) -> np.ndarray:
        """The keys of all samples, (N,) int64; every table is read."""
        return np.concatenate([self.table(shard).key for shard in range(len(self.shards))])

    def read(self, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Read many images, shard by shard: a lock and a table look-up for each shard, not for each image.

        Args:
            shards, rows: (n,) int64.

        Yields:
            the place of an image among those requested, and its bytes; fewer bytes than its size if the shard is cut off.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a shard's size differs from what was packed.
        """
        for shard in np.unique(shards).tolist():
            table, file = self.table(shard), self._open(shard)
            places = np.flatnonzero(shards == shard)
            wanted = rows[places]
            spans = zip(places.tolist(), table.size[wanted].tolist(), table.offset[wanted].tolist(), strict=True)
            for place, size, offset in spans:
                yield place, file.read(size, offset)
            del file  # before another is waited for: the cache keeps what is being read

    def labels_and_keys(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels and keys, both (n,) int64, of many samples."""
        labels, keys = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for shard in np.unique(shards).tolist():
            here, table = shards == shard, self.table(shard)
            labels[here], keys[here] = table.label[rows[here]], table.key[rows[here]]
        return labels, keys

    def decode(self, shard: int, row: int, data: bytes, out: np.ndarray) -> None:
        """Decode the bytes of a sample into `out`, (H, W, 3) uint8.

        Raises:
            ValueError: they are damaged, or of another size; naming the sample's key, shard and offset.
        """
        try:
            decode_into(data, out)
        except ValueError as error:
            table, path = self.table(shard), f"{self.dataset.folder}/{self.shards[shard].file}"
            raise ValueError(
                f"Cannot decode sample {table.key[row]:08d} of {path} (byte {table.offset[row]}): {error}. The shard was damaged "
                f"after packing: `python -m shards verify {self.dataset.folder}` lists what to copy again."
            ) from error

    def _open(self, shard: int) -> "_File | OpenShard":
        described, folder = self.shards[shard], self.dataset.folder
        if isinstance(folder, RemoteFolder):
            return folder.open_shard(described.file, described.sha256, described.bytes)
        with self._lock:
            file = self._files.pop(shard, None) or _File(folder / described.file, described.bytes)
            self._files[shard] = file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)  # closed when the last thread that reads from it lets go
            return file


class _File:
    """A file descriptor that is closed when its last user lets go of it."""

    def __init__(self, path: Path, size: int) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # O_BINARY: of Windows
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The shard {path} is missing. Copy it again, or pack the dataset again."
            ) from error
        found = os.fstat(self.descriptor).st_size
        if found != size:
            raise ValueError(
                f"The shard {path} has {found} bytes instead of the {size} that were packed. Copy it again."
            )
        self._lock = threading.Lock()

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of the file; fewer, if it was cut off since. Safe to share between threads."""
        if HAS_PREAD:
            return os.pread(self.descriptor, size, offset)
        with self._lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.read(self.descriptor, size)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
