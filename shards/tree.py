"""Sources behind a URL: files and folders as paths, from one listing, with the verbs of `pathlib.Path` that readers of sources use.

In: a path, or the URL of a folder or a table. Out: a `Path` or a `RemotePath`. Invariants: what lies below a source is listed once, and no
file is asked for before it is read; a file is read with the size that was listed, or it is an error; as text, a path is its URL without
what gives access; nothing takes a URL for a path of this machine.
"""

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from shards.storage import ATTEMPT_S, PATIENCE_S, Storage, is_url, without_secrets

VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")  # of libraries


class Tree:
    """What lies below a URL, as far as it was listed. Paths in it have no slash at their ends; the URL itself is the empty one."""

    def __init__(self, url: str, patience: float):
        """Nothing is asked yet.

        Raises:
            ValueError: a kind of URL that is not known, or that needs a package which is not installed.
        """
        self._url, self._patience = url.rstrip("/"), patience
        self.storage = Storage(self._url, patience)
        self.files: dict[str, tuple[int, str]] = {}  # path: bytes, and what changes when the file is replaced
        self.folders: set[str] = set()
        self._listed: set[str] = set()
        self._is_whole = False

    @cached_property
    def parent(self) -> "Tree":
        """That of the folder above; of a bucket, itself."""
        above = self._url.rpartition("/")[0]
        return self if above.endswith("/") else Tree(above, self._patience)

    def look(self, folder: str) -> None:
        """Know what is in a folder, itself included.

        Raises:
            PermissionError, ConnectionError: as `Storage.read`.
        """
        if not self._is_whole and folder not in self._listed and not folder.startswith("/"):
            self._list("ls", folder)
            self._listed.add(folder)

    def look_through(self) -> None:
        """Know all that lies below the URL.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: as `Storage.read`.
        """
        if not self._is_whole:
            self._list("find", "")
            self._is_whole = True

    def _list(self, method: str, folder: str) -> None:
        place, grace = self.storage.path(folder).rstrip("/"), [0.0]

        def request() -> Any:
            seconds, grace[0] = grace[0], 2 * grace[0] + ATTEMPT_S  # a list of very many files takes its time
            return self.storage.call(method, place, detail=True, grace=min(seconds, self._patience))

        try:
            found = self.storage.insist(folder, request, "listed")
        except FileNotFoundError:
            if method == "find":
                raise
            return
        for info in found.values() if isinstance(found, Mapping) else found:
            self._add(info["name"], info)

    def _add(self, name: str, info: Mapping[str, Any]) -> None:
        at = f"{name.rstrip('/')}/".removeprefix(self.storage.path("")).rstrip("/")
        if info.get("type") == "directory" or name.endswith(
            "/"
        ):  # with a slash: an empty file that S3 shows as a folder
            self.folders.add(at)
        else:
            version = next((str(info[name]) for name in VERSIONS if info.get(name)), "")
            self.files[at] = (int(info.get("size") or 0), version)
        while at:
            at = at.rpartition("/")[0]
            self.folders.add(at)


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or a folder of a tree. It is no `os.PathLike`: what opens files of this machine refuses it."""

    tree: Tree
    at: str = ""

    def __str__(self) -> str:
        """Its URL, for people."""
        return self.tree.storage.url(self.at)

    def __truediv__(self, name: str) -> "RemotePath":
        tree, at = self.tree, posixpath.normpath(posixpath.join(self.at, name))
        while at == ".." or at.startswith("../"):
            tree, at = tree.parent, at[3:]
        return RemotePath(tree, "" if at == "." else at)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its name without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in."""
        return RemotePath(self.tree, self.at.rpartition("/")[0]) if self.at else RemotePath(self.tree.parent)

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        """The way to it from a folder above."""
        assert self.tree is other.tree
        return PurePosixPath(self.at).relative_to(other.at)

    def resolve(self) -> "RemotePath":
        """Itself: nothing leads elsewhere."""
        return self

    def is_file(self) -> bool:
        """Whether there is such a file."""
        self.tree.look(self.at.rpartition("/")[0])
        return self.at in self.tree.files

    def is_dir(self) -> bool:
        """Whether anything lies below it."""
        self.tree.look(self.at.rpartition("/")[0])
        return self.at in self.tree.folders

    def iterdir(self) -> list["RemotePath"]:
        """The files and folders in it, sorted."""
        self.tree.look(self.at)
        inside = [at for at in [*self.tree.files, *self.tree.folders] if at and at.rpartition("/")[0] == self.at]
        return [RemotePath(self.tree, at) for at in sorted(inside)]

    def walk(self) -> list["RemotePath"]:
        """All files below it, sorted."""
        self.tree.look_through()
        below = f"{self.at}/" if self.at else ""
        inside = [at for at in self.tree.files if at.startswith(below) and at]
        return [RemotePath(self.tree, at) for at in sorted(inside, key=lambda at: at.split("/"))]

    @property
    def listed(self) -> tuple[int, str]:
        """Its bytes, and what changes when it is replaced, as they were listed.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not self.is_file():
            raise FileNotFoundError(f"The file {self} does not exist. Copy it there, or correct the URL.")
        return self.tree.files[self.at]

    def read_bytes(self) -> bytes:
        """The file, as long as it was listed.

        Raises:
            FileNotFoundError, PermissionError: it is gone, or may not be read.
            ConnectionError: no byte came for the patience of the source, or it has another size than it was listed with.
        """
        size, found = self.listed[0], 0
        for _ in range(2):  # what was cut off on its way comes whole the second time
            try:
                data = self._read(size) if size else b""
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"The file {self} was there when the source was listed, and is gone. Copy it there again, or start the same command again."
                ) from None
            if (found := len(data)) == size:
                return data
        raise ConnectionError(
            f"The file {self} has {found} bytes, and had {size} when the source was listed: it was replaced, or is cut off on its way. "
            "Start the same command again."
        )

    def _read(self, size: int) -> bytes:
        """The file, or one byte more than `size` where it has grown. In smaller and smaller pieces, where a line is too slow for all that is read."""
        storage, data, asked = self.tree.storage, b"", [0]

        def request() -> bytes:
            stop = len(data) + storage.chunk
            asked[0] = (size + 1 if stop >= size else stop) - len(data)
            return storage.call("cat_file", storage.path(self.at), start=len(data), end=len(data) + asked[0])

        while len(data) < size:
            piece = storage.insist(self.at, request)
            data += piece
            if len(piece) < asked[0]:
                break
        return data

    def read_start(self, n_bytes: int) -> bytes:
        """The first bytes of the file."""
        return self.tree.storage.read(self.at, 0, min(n_bytes, self.listed[0])) if self.listed[0] else b""


SourcePath = Path | RemotePath


def open_source(place: Path | str | RemotePath, patience: float = PATIENCE_S) -> SourcePath:
    """The path of a source, or of its images. A folder behind a URL is listed, with all that lies below.

    Args:
        patience: seconds without a byte after which reading behind a URL fails.

    Raises:
        ValueError: a URL of a kind that cannot be listed, or is not known.
        FileNotFoundError, PermissionError, ConnectionError: it cannot be listed.
    """
    if isinstance(place, RemotePath):
        return place
    if not is_url(place):
        return Path(place).absolute()  # what lies beside it is looked for, and it has a name, from wherever it is given
    url = str(place).rstrip("/")
    _refuse(url)
    tree = Tree(url, patience)
    tree.look_through()
    path = RemotePath(tree)
    return path.parent / path.name if path.is_file() else path


def relative(path: SourcePath, root: SourcePath) -> PurePath:
    """The way to a path from a folder above it, both of one kind."""
    if isinstance(path, RemotePath):
        assert isinstance(root, RemotePath)
        return path.relative_to(root)
    assert isinstance(root, Path)
    return path.relative_to(root)


def of_cell(cell: str | RemotePath) -> SourcePath:
    """Where an image of a catalogue is, from its column `path`."""
    return cell if isinstance(cell, RemotePath) else Path(cell)


def to_cell(path: SourcePath) -> str | RemotePath:
    """What the column `path` of a catalogue holds: text, of an image of this machine."""
    return path if isinstance(path, RemotePath) else str(path)


def size_and_version(path: SourcePath) -> tuple[int, str]:
    """Bytes of a file, and what changes when it is replaced: its time, or what its storage says of it (ETag).

    Raises:
        FileNotFoundError: there is no such file.
    """
    if isinstance(path, RemotePath):
        return path.listed
    found = path.stat()
    return found.st_size, str(found.st_mtime_ns)


def read_start(path: SourcePath, n_bytes: int) -> bytes:
    """The first bytes of a file; fewer where it ends before."""
    if isinstance(path, RemotePath):
        return path.read_start(n_bytes)
    with open(path, "rb") as file:
        return file.read(n_bytes)


def _refuse(url: str) -> None:
    shown, scheme = without_secrets(url), url.partition(":")[0].lower()
    if "::" in url:
        raise ValueError(f"{shown} is a chain of URLs. Give the last one alone: s3://BUCKET/SOURCE.")
    if scheme in ("http", "https"):
        raise ValueError(
            f"{shown}: a web server does not list its files. Give a folder of a bucket (s3://BUCKET/SOURCE), or download the source and "
            "give its folder."
        )
    if scheme == "file":
        raise ValueError(f"{shown} is a folder of this machine. Give its path.")
