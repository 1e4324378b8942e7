"""Whole files of remote storage on a local disk, named by their SHA-256, shared by all processes of a machine.

In: a folder, a bound in bytes, digests, and functions that download. Out: open files. Invariants: a file has its name only once its
size and SHA-256 were compared with what was asked for, and it is on the disk; one that was written to since, or cut off, is
compared again; one process downloads a file while the others wait; the least recently used files leave first, and none that a
living process reads; locks are the kernel's, so a process that dies holds none, and what it left is removed by the next.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from shards.locks import HAS_LOCKS, alone, lock, open_alone, remove_idle

PART, LOCK = ".part", "lock"
POLL_S = 0.05  # between two looks at what other processes do
USED_S = 1.0  # a use is noted once within so long
DIGEST_CHARS = 64


@dataclass(frozen=True)
class Wanted:
    """A file: its SHA-256 as hex, its bytes, what people call it, and where it comes from, piece by piece."""

    digest: str
    size: int
    title: str
    download: Callable[[], Iterable[bytes]]


class Cache:
    """A folder of files named by their SHA-256, of at most `limit` bytes. Safe to share between threads and processes."""

    def __init__(self, folder: Path, limit: int, patience: float):
        """Make the folder, and remove what processes that died have left in it.

        Args:
            limit: bytes of all files. patience: seconds without progress after which waiting for others fails.

        Raises:
            OSError: the folder cannot be written, or its file system has no locks.
        """
        self.folder, self.limit, self._patience = folder, limit, patience
        self._noted: dict[str, float] = {}  # digest: when its use was noted
        if not HAS_LOCKS:
            raise OSError("A cache of remote shards needs file locks, which Windows has not. Set --data.cache_gb 0.")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with alone(self.folder / LOCK):
                self._remove_left_over()
        except OSError as error:
            raise OSError(
                f"The cache folder {folder} cannot be used ({error.strerror}). Name another by --data.cache_dir, on a disk of "
                "this machine, or set --data.cache_gb 0."
            ) from error

    def open(self, digest: str) -> int | None:
        """A descriptor of a file, which nobody removes until it is closed; None if the file is not here."""
        path = self.folder / digest
        while True:
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            try:
                lock(file, shared=True)
                status = os.fstat(file)
                if status.st_nlink and (status.st_mtime_ns == seal(digest) or self._is_right(file, digest)):
                    self._note_use(file, digest)
                    return file
            except BaseException:
                os.close(file)
                raise
            if status.st_nlink:
                with suppress(FileNotFoundError):  # damaged; another process may have seen it, too
                    path.unlink()
            os.close(file)

    def fetch(self, wanted: Wanted, waits: bool = True) -> int | None:
        """The same, downloaded if it is not here.

        Args:
            waits: for another process that downloads it, and for room; otherwise None is returned.

        Raises:
            ValueError: what comes is not the file that was asked for.
            OSError: it cannot be read, written, or waited for.
        """
        part, since, seen = self.folder / (wanted.digest + PART), time.monotonic(), None
        while True:
            if (file := self.open(wanted.digest)) is not None:
                return file
            own = open_alone(part)
            if own is not None:
                try:
                    if self._fill(own, part, wanted):
                        continue
                finally:
                    os.close(own)
            if not waits:
                return None
            if (now := self._progress(part)) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > 2 * self._patience:
                raise TimeoutError(self._describe_wait(wanted))
            time.sleep(POLL_S)

    def used(self) -> int:
        """Bytes of all files, with those that are being downloaded."""
        return sum(status.st_size for _, status in self._entries())

    def _fill(self, own: int, part: Path, wanted: Wanted) -> bool:
        """Download into the part that this process has locked; False if there is no room for now.

        Raises:
            as `fetch`.
        """
        is_kept = False
        try:
            if (here := self.open(wanted.digest)) is not None:  # finished by another process meanwhile
                os.close(here)
                return True
            if not self._make_room(own, wanted):
                return False
            for attempt in (1, 2):
                digest, n_bytes = self._write(own, wanted)
                if (digest, n_bytes) == (wanted.digest, wanted.size):
                    break
                if attempt == 2:
                    raise ValueError(
                        f"{wanted.title} is not what was packed: its SHA-256 is {digest[:12]} instead of {wanted.digest[:12]} "
                        f"({n_bytes} bytes of {wanted.size}), also when read again. Was it changed since the dataset was packed? "
                        "Copy it there again."
                    )
            os.utime(own, ns=(time.time_ns(), seal(wanted.digest)))
            os.fsync(own)
            os.rename(part, self.folder / wanted.digest)
            is_kept = True
            return True
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = f"The disk of the cache folder {self.folder} is full, and {wanted.title} was not kept"
            raise OSError(
                f"{full}. Free space there, lower --data.cache_gb, or name another --data.cache_dir."
            ) from error
        finally:
            if not is_kept:
                with suppress(FileNotFoundError):
                    part.unlink()

    def _write(self, own: int, wanted: Wanted) -> tuple[str, int]:
        """Write what comes; its SHA-256 and its bytes."""
        sha, position = hashlib.sha256(), 0
        for data in wanted.download():
            sha.update(data)
            view = memoryview(data)
            while view:
                written = os.pwrite(own, view, position)
                view, position = view[written:], position + written
        return sha.hexdigest(), position

    def _make_room(self, own: int, wanted: Wanted) -> bool:
        """Reserve room for a file, by removing others that nobody reads; False if they are all being read.

        Raises:
            ValueError, OSError: there will never be room.
        """
        if wanted.size > self.limit:
            raise ValueError(
                f"{wanted.title} has {wanted.size / 1e9:.3g} GB, and the cache holds {self.limit / 1e9:.3g}. Raise --data.cache_gb."
            )
        with alone(self.folder / LOCK):
            self._remove_left_over()
            inode = os.fstat(own).st_ino
            entries = [(path, status) for path, status in self._entries() if status.st_ino != inode]
            used = sum(status.st_size for _, status in entries)
            lacking = max(used + wanted.size - self.limit, wanted.size - disk_usage(self.folder).free)
            for path, status in sorted(entries, key=lambda entry: entry[1].st_atime_ns):
                if lacking <= 0:
                    break
                if path.suffix != PART and remove_idle(path):
                    lacking -= status.st_size
                    used -= status.st_size
            if lacking <= 0:
                os.ftruncate(own, wanted.size)  # others count it from now on
                return True
        if used == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    def _remove_left_over(self) -> None:
        """Remove parts of files that nobody downloads any more."""
        for path, _ in list(self._entries()):
            if path.suffix == PART:
                remove_idle(path)

    def _note_use(self, file: int, digest: str) -> None:
        """Say that a file is used now, by its time of access. (The file system's own is late by up to a day.)"""
        now = time.monotonic()
        if now - self._noted.get(digest, -USED_S) >= USED_S:
            self._noted[digest] = now
            os.utime(file, ns=(time.time_ns(), seal(digest)))

    def _is_right(self, file: int, digest: str) -> bool:
        """Whether a file that was changed since it was written has the bytes of its name all the same; then it is sealed again."""
        with os.fdopen(os.dup(file), "rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != digest:
                return False
        self._noted.pop(digest, None)
        return True

    def _progress(self, part: Path) -> tuple[int, int]:
        """What changes while another process downloads a file, or makes room."""
        try:
            status = part.stat()
            return status.st_mtime_ns, status.st_size
        except FileNotFoundError:
            return 0, 0

    def _describe_wait(self, wanted: Wanted) -> str:
        text = f"{wanted.title} was waited for, without progress, for {2 * self._patience:g} s: another process of this machine downloads it, "
        room = f"or all {self.used() / 1e9:.3g} of {self.limit / 1e9:.3g} GB of the cache {self.folder} are being read"
        return f"{text}{room}. End that process, or raise --data.cache_gb."

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for entry in os.scandir(self.folder):
            if len(entry.name.removesuffix(PART)) == DIGEST_CHARS:
                with suppress(FileNotFoundError):
                    yield Path(entry.path), entry.stat()


def seal(digest: str) -> int:
    """The time of modification (ns since 1970) of a file that was compared with its SHA-256: any write gives it another one.

    Whole seconds, and even ones, as the coarsest file systems keep them; in the past, so that no clock comes to it.
    """
    return 2_000_000_000 * (1 + int(digest[:6], 16))
