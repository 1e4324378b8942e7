"""One file of a web server, whole and checked, whatever happens on the way.

In: an address, and what is known of the file: size, checksum. Out: the file under its name. Invariants: a file has its name only when its
size and checksum are right and it is on the disk; what came before a broken connection or a kill lies in NAME.part and is not
asked for again, unless the server's file is another one since; nothing waits for ever; no credentials are sent, and no
error names a signature.

Python's own HTTP client does it, so that the base installation suffices, and since what reads data behind URLs (`storage.py`, by fsspec)
cannot ask for "the rest, if the file is still the same" (If-Range).
"""

import hashlib
import http.client
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.fetch.web import BrokenError, Patience, length_of, open_url
from shards.files import sync
from shards.storage import without_secrets

PIECE = 2**18  # bytes read at once, at most


@dataclass(frozen=True)
class PublicFile:
    """A file as its server describes it.

    name: under which it is kept. size: in bytes; None where the server does not say. checksum: an algorithm of hashlib and the digest in hex;
    None where none is published. etag: what the server calls this edition of the file, where it was asked.
    """

    name: str
    url: str
    size: int | None = None
    checksum: tuple[str, str] | None = None
    etag: str = ""


def download(file: PublicFile, path: Path, seconds: float, progress: Callable[[int], None]) -> None:
    """Bring a file to `path`, from where an earlier call stopped.

    Args:
        seconds: without a new byte, until it is given up. progress: is told how many bytes are there.

    Raises:
        FileNotFoundError, PermissionError: the server has no such file, or refuses it.
        ConnectionError: nothing came for too long.
        ValueError: the file is not the one that the server lists; what came is removed.
        OSError: a full disk, among others; what came is kept.
    """
    part, patience = path.with_name(path.name + ".part"), Patience(file.url, seconds)
    patience.progress(_size(part))
    while True:
        try:
            if _receive(file, part, patience, progress):
                break
            reason = "the connection ended early"
        except BrokenError as error:
            reason = str(error)
        patience.wait(reason)
    try:
        check(part, file)
    except ValueError:
        discard(part)
        raise
    sync(part)
    os.replace(part, path)
    discard(part)
    sync(path.parent)


def check(path: Path, file: PublicFile) -> None:
    """Compare a file with what its server says of it.

    Raises:
        ValueError: another size or checksum, and what to do.
    """
    found = path.stat().st_size
    if file.size is not None and found != file.size:
        problem = f"{found} bytes instead of {file.size}"
    elif file.checksum is not None:
        kind, wanted = file.checksum
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, kind).hexdigest()
        problem = f"the {kind.upper()} {digest} instead of {wanted}" if digest != wanted.lower() else ""
    else:
        problem = ""
    if problem:
        raise ValueError(
            f"{file.name} from {without_secrets(file.url)} has {problem}, which the server lists: it was damaged on the way, or was changed "
            f"there. Delete {path} if it is still there, and run the same command: it is fetched again. If it happens twice, the "
            "server's own copy is damaged."
        )


def discard(part: Path) -> None:
    """Remove what there is of a file. The note goes last: a part without one may be of any file."""
    for path in (part, _note(part)):
        with suppress(FileNotFoundError):
            path.unlink()


def _receive(file: PublicFile, part: Path, patience: Patience, progress: Callable[[int], None]) -> bool:
    """Ask once for what is missing; whether all is there then.

    Raises:
        BrokenError: asking again may help. ValueError: the server sends a file of another size than it lists.
    """
    have, etag = _size(part), _known_etag(part)
    if have and ((file.size is not None and have > file.size) or (not etag and file.checksum is None)):
        discard(part)  # it may be of another file, and nothing would tell
        have = 0
    if have and have == file.size:
        return True
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and etag:
        headers["If-Range"] = etag
    with open_url(file.url, patience.timeout, headers) as answer:
        start, end, whole = _range(answer)
        found = answer.headers.get("ETag", "")
        if start not in (0, have) or (start and etag and found and found != etag):
            discard(part)  # a server that goes its own way, or has another file by now
            return False
        if file.size is not None and whole is not None and whole != file.size:
            discard(part)
            raise ValueError(
                f"{without_secrets(file.url)} sends {whole} bytes, and {file.size} are listed: the file was changed there. Run the same "
                "command again; if it says so again, the server contradicts itself: use another one, by --server."
            )
        if not start:
            with open(part, "wb"):
                pass  # the old bytes go before the new note comes
            _note(part).write_text(json.dumps({"etag": found}), encoding="utf-8")  # half of it is none
        position = start
        with open(part, "r+b") as stream:
            stream.seek(start)
            for piece in _pieces(answer):
                stream.write(piece)
                position += len(piece)
                patience.progress(position)
                progress(position)
    wanted = next((size for size in (file.size, whole, end) if size is not None), position)
    return position == wanted


def _pieces(answer: Any) -> Iterator[bytes]:
    """The body of an answer, as it comes."""
    while True:
        try:
            piece = answer.read1(PIECE)
        except (OSError, http.client.HTTPException) as error:
            raise BrokenError(str(error) or type(error).__name__) from None
        if not piece:
            return
        yield piece


def _range(answer: Any) -> tuple[int, int | None, int | None]:
    """Where an answer's bytes begin and end in the file, and the size of the file: -1 for the start where nothing may be taken."""
    length = length_of(answer.headers.get("Content-Length"))
    if answer.status == http.client.OK:
        return 0, length, length
    if answer.status == http.client.PARTIAL_CONTENT:
        unit, _, rest = answer.headers.get("Content-Range", "").partition(" ")
        where, _, whole = rest.partition("/")
        first, _, last = where.partition("-")
        if unit == "bytes" and first.isdigit() and last.isdigit():
            return int(first), int(last) + 1, length_of(whole)
    return -1, None, None


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _known_etag(part: Path) -> str:
    """The ETag that the bytes of a part came with; only strong ones say that bytes are the same."""
    try:
        etag = json.loads(_note(part).read_bytes())["etag"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    return etag if isinstance(etag, str) and etag.startswith('"') and etag.isprintable() else ""
