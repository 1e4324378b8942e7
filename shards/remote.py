"""A packed dataset behind a URL: its files through the local cache, or by ranges without one.

In: a URL, and where and how much may be kept. Out: bytes of files whose SHA-256 was compared with the recorded one, and open shards.
Invariants: `dataset.json` is read anew each time; without a cache no file is written, and of a shard only the bytes asked for are read.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from shards.cache import Cache, Wanted
from shards.storage import Storage, is_url

GB = 1e9


@dataclass(frozen=True)
class Access:
    """How remote data are read; of a local folder, nothing of this applies.

    cache_dir: folder of the cache, on a disk of this machine; empty for the user's cache directory.
    cache_gb: its bound, in 10^9 bytes; 0 for none: images are read by ranges. patience_s: seconds without a byte until a read fails.
    """

    cache_dir: str = ""
    cache_gb: float = 20.0
    patience_s: float = 300.0

    @property
    def folder(self) -> Path:
        """The folder of the cache.

        Raises:
            OSError: it is to be in the user's home, and there is none, as in some containers.
        """
        try:
            if self.cache_dir:
                return Path(self.cache_dir).expanduser()
            return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dermharness"
        except RuntimeError as error:
            raise OSError(
                f"The cache of remote data has no folder ({error}). Give one as data.cache_dir, or as --cache-dir."
            ) from error


DEFAULT_ACCESS = Access()


class OpenShard(Protocol):
    """A shard that is being read; it is let go with the object."""

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of it; fewer, if it was cut off."""
        ...


class CachedShard:
    """A shard in the cache, which stays there until this object is gone."""

    def __init__(self, descriptor: int):
        """Take over a descriptor, as from `Cache.open`."""
        self._descriptor = descriptor

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of it."""
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


class RangedShard:
    """A shard of which only the bytes asked for are read, each time."""

    def __init__(self, storage: Storage, name: str):
        """Nothing is read yet."""
        self._storage, self._name = storage, name

    def read(self, size: int, offset: int) -> bytes:
        """Bytes of it, from the network."""
        return self._storage.read(self._name, offset, offset + size)


class RemoteFolder:
    """A folder behind a URL. As text it is its URL, without what gives access. Safe to share between threads."""

    def __init__(self, url: str, access: Access = DEFAULT_ACCESS):
        """Open the cache; nothing is read yet.

        Raises:
            ValueError: a kind of URL that is not known, or a package that is missing.
            OSError: the cache folder cannot be written.
        """
        self.storage = Storage(url, access.patience_s)
        self.cache = Cache(access.folder, int(access.cache_gb * GB), access.patience_s) if access.cache_gb else None
        self._kept: dict[str, BinaryIO | CachedShard] = {}  # digest: an index file in use by its path
        self._ranged: set[str] = set()  # shards whose size was compared

    def __str__(self) -> str:
        """Its URL, for people."""
        return self.storage.shown

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.storage.shown.rpartition("/")[2]

    def read(self, name: str) -> bytes:
        """A file, read anew."""
        return self.storage.read(name)

    def read_checked(self, name: str, digest: str) -> bytes:
        """An index file.

        Raises:
            ValueError: its SHA-256 is another one.
            OSError: it cannot be read.
        """
        if self.cache is None:
            data = self.storage.read(name)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(
                    f"{self.storage.url(name)} was changed after packing: its SHA-256 is not the recorded one."
                )
            return data
        file = self._open_cached(name, digest, None, waits=True)
        assert file is not None
        with os.fdopen(file, "rb") as data:
            return data.read()

    def keep(self, name: str, digest: str) -> Path:
        """A path of an index file, which leads to it as long as this object lives.

        Raises:
            as `read_checked`.
        """
        if self.cache is not None:
            file = self._open_cached(name, digest, None, waits=True)
            assert file is not None
            self._kept.setdefault(digest, CachedShard(file))
            return self.cache.folder / digest
        if digest not in self._kept:  # a file without a name, so that nothing is left behind
            kept = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as this object lives
            kept.write(self.read_checked(name, digest))
            kept.flush()
            self._kept[digest] = kept
        kept = self._kept[digest]
        assert not isinstance(kept, CachedShard)
        return Path(f"/dev/fd/{kept.fileno()}")

    def open_shard(self, name: str, digest: str, size: int) -> OpenShard:
        """A shard, to be read: it is downloaded if it is not in the cache.

        Raises:
            ValueError: it has other bytes than those that were packed.
            OSError: it cannot be read.
        """
        if self.cache is not None:
            file = self._open_cached(name, digest, size, waits=True)
            assert file is not None
            return CachedShard(file)
        if name not in self._ranged:
            found = self.storage.size(name)
            if found not in (None, size):
                raise ValueError(
                    f"The shard {self.storage.url(name)} has {found} bytes instead of the {size} that were packed."
                )
            self._ranged.add(name)
        return RangedShard(self.storage, name)

    def fetch(self, name: str, digest: str, size: int | None = None) -> bool:
        """Have a file in the cache, unless another process is at it or there is no room; whether it is there."""
        assert self.cache is not None
        file = self._open_cached(name, digest, size, waits=False)
        if file is not None:
            os.close(file)
        return file is not None

    def sha256(self, name: str) -> str:
        """SHA-256 of a file as it is in the storage, past the cache."""
        sha, size = hashlib.sha256(), self.storage.size(name)
        for data in self.storage.stream(name, size) if size is not None else [self.storage.read(name)]:
            sha.update(data)
        return sha.hexdigest()

    def _open_cached(self, name: str, digest: str, size: int | None, waits: bool) -> int | None:
        assert self.cache is not None
        if (file := self.cache.open(digest)) is not None:
            return file
        whole = None
        if size is None and (size := self.storage.size(name)) is None:  # a server that says no size
            whole = self.storage.read(name)
            size = len(whole)
        wanted = Wanted(
            digest, size, self.storage.url(name), lambda: self.storage.stream(name, size) if whole is None else [whole]
        )
        if not waits:
            return self.cache.fetch(wanted, waits=False)
        with self.storage.waits():
            return self.cache.fetch(wanted)


def open_folder(place: Path | str, access: Access = DEFAULT_ACCESS) -> "Path | RemoteFolder":
    """A folder of this machine, or one behind a URL.

    Raises:
        as `RemoteFolder`.
    """
    return RemoteFolder(str(place), access) if is_url(place) else Path(place)
