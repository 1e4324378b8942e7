"""Where packed files are put: a folder, or what is behind a URL, with the same few verbs.

In: names and bytes, or finished files. Out: files there. Invariants: under its name a file is whole or absent, however the process that puts
it ends; of two that put the same one, either is there; a file behind a URL counts as put once the storage gives its size.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from shards.files import sha256, sync, write_durably
from shards.storage import Storage, is_url


class FolderPlace:
    """A folder of a disk, of this machine or shared."""

    def __init__(self, folder: Path):
        """Nothing is made yet."""
        self.folder = folder

    def __str__(self) -> str:
        """Its path."""
        return str(self.folder)

    def names(self) -> set[str]:
        """Names of its files; none where there is no such folder."""
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        """A file."""
        return (self.folder / name).read_bytes()

    def take(self, path: Path, name: str) -> None:
        """Have a file of the same disk, which leaves its place.

        Raises:
            FileNotFoundError: the folder is gone.
        """
        sync(path)
        os.replace(path, self.folder / name)
        sync(self.folder)

    def fetch(self, name: str, scratch: Path) -> Path:
        """A path of this machine that leads to a file; `scratch` is for what has to be copied for that."""
        return self.folder / name

    def sha256(self, name: str, size: int) -> str | None:
        """SHA-256 of a file; None where it is missing or has another size."""
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
        return sha256(path)

    def remove(self, name: str) -> None:
        """Have a file no more, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def clear(self, but: Collection[str] = ()) -> None:
        """Have nothing any more, but these; without any, no folder either."""
        if not but:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in self.names() - {*but}:
            if (path := self.folder / name).is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class UrlPlace:
    """A folder behind a URL."""

    def __init__(self, url: str, patience: float):
        """Nothing is asked yet.

        Raises:
            ValueError: a kind of URL that is not known, or that needs a package which is not installed.
        """
        self.storage = Storage(url, patience)

    def __str__(self) -> str:
        """Its URL, for people."""
        return self.storage.shown

    def names(self) -> set[str]:
        """Names of its files; none where there is no such folder.

        Raises:
            ConnectionError, PermissionError: as of `Storage.read`.
        """
        try:
            return (self.storage.names() or set()) - {""}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        """A file."""
        return self.storage.read(name)

    def take(self, path: Path, name: str) -> None:
        """Have a file of this machine, which leaves its place once it is there. Its size is compared; its bytes on the way are the library's care.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: it cannot be written.
        """
        size = path.stat().st_size
        self.storage.send(path, name)
        if (found := self.storage.size(name)) not in (size, None):
            raise OSError(
                errno.EIO, f"{self.storage.url(name)} has {found} bytes instead of {size}: start the same command again"
            )
        path.unlink()

    def fetch(self, name: str, scratch: Path) -> Path:
        """A path of this machine that leads to a copy of a file, in the folder `scratch`."""
        path, size = scratch / f"fetched-{name}", self.storage.size(name)
        with open(path, "wb") as file:
            for data in self.storage.stream(name, size) if size is not None else [self.storage.read(name)]:
                file.write(data)
        return path

    def sha256(self, name: str, size: int) -> str | None:
        """SHA-256 of a file, which is read for that; None where it is missing or has another size."""
        try:
            if self.storage.size(name) != size:
                return None
            sha = hashlib.sha256()
            for data in self.storage.stream(name, size):
                sha.update(data)
            return sha.hexdigest()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Have a file no more, if it is there."""
        self.storage.remove(name)

    def clear(self, but: Collection[str] = ()) -> None:
        """Have nothing any more, but these."""
        self.storage.remove(*self.names() - {*but})


Place = FolderPlace | UrlPlace


def open_place(place: Path | str, patience: float) -> Place:
    """The place of a path or a URL."""
    return UrlPlace(str(place), patience) if is_url(place) else FolderPlace(Path(place))


def write(place: Place, name: str, data: bytes, scratch: Path) -> str:
    """Put a small file; its SHA-256. It is written in the folder `scratch` first.

    Raises:
        as `take`.
    """
    path = scratch / name
    digest = write_durably(path, data)
    place.take(path, name)
    return digest
