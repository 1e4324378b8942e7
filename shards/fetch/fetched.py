"""`fetched.json`: what was brought into a folder, from where, and how each file was when it was complete.

In: a folder. Out: what its `fetched.json` says, and whether it still holds. Invariants: it names files inside its folder alone; it is written when
what it names is complete, never before.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.fetch.unzip import Listed, crc32
from shards.files import sync, write_durably
from shards.shape import misfit, parse_json

NAME = "fetched.json"
DOWNLOAD = {"url": str, "checksum": str, "etag": str, "is_kept": bool, "files": {str: [int, int]}}
SHAPE = {"release": str, "page": str, "license": str, "citation": str, "downloads": {str: DOWNLOAD}}


@dataclass(frozen=True)
class Download:
    """A file that was downloaded. url: without secrets. checksum: as its server lists it, empty where it lists none. etag: what its server called it. is_kept: an archive
    stays after it was unpacked. files: what it brought, by path in the folder -> bytes, CRC-32.
    """

    url: str
    checksum: str
    etag: str
    is_kept: bool
    files: Listed


@dataclass(frozen=True)
class Fetched:
    """What was fetched into a folder: the name of the release and its page, its terms, and each download by its name."""

    release: str
    page: str
    license: str
    citation: str
    downloads: dict[str, Download] = field(default_factory=dict)

    @property
    def n_files(self) -> int:
        """Files that came."""
        return sum(len(one.files) for one in self.downloads.values())

    def write(self, folder: Path) -> None:
        """Write it into its folder, where one process writes at a time: a kill leaves nothing under another name."""
        partial = folder / f"{NAME}.part"
        write_durably(partial, json.dumps(asdict(self), indent=1, ensure_ascii=False).encode())
        os.replace(partial, folder / NAME)
        sync(folder)


def read_fetched(folder: Path) -> Fetched | None:
    """What was fetched into a folder; None if nothing was.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
        problem = misfit(content, SHAPE)
    except ValueError as error:
        content, problem = {}, str(error)
    downloads = {} if problem else content["downloads"]
    inside = [Path(name) for one in downloads.values() for name in one["files"]]
    outside = [name for name in downloads if name != Path(name).name or not downloads[name]["files"]]
    if problem or outside or any(name.is_absolute() or ".." in name.parts for name in inside):
        raise ValueError(
            f"{path} is damaged ({problem or 'it names files elsewhere'}). Remove it, and run the same command."
        )
    downloads = {
        name: Download(
            one["url"],
            one["checksum"],
            one["etag"],
            one["is_kept"],
            {path: tuple(found) for path, found in one["files"].items()},
        )
        for name, one in content["downloads"].items()
    }
    return Fetched(content["release"], content["page"], content["license"], content["citation"], downloads)


def find_changed(folder: Path, download: Download, by_content: bool) -> list[str]:
    """Files of a download that are missing or changed: of another size, or of other content if that is read."""

    def differs(path: Path, size: int, crc: int) -> bool:
        return not path.is_file() or path.stat().st_size != size or (by_content and crc32(path) != crc)

    return [name for name, (size, crc) in download.files.items() if differs(folder / name, size, crc)]
