"""ZIP archives that somebody else made, unpacked into a folder that appears whole.

In: an archive and the name of a folder. Out: the folder, and size and CRC-32 of each file. Invariants: nothing is written outside the folder;
a file has the size and the CRC that the archive lists; a kill at any moment leaves no half folder under its name.
"""

import errno
import lzma
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

PIECE = 2**20
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    UnicodeDecodeError,
    NotImplementedError,
    RuntimeError,
)
Listed = dict[str, tuple[int, int]]  # path below the folder, with / -> bytes, CRC-32


def list_archive(archive: Path, folder_name: str) -> Listed:
    """What an archive holds, by its path below the folder; a first folder of the same name is left out of that.

    Raises:
        ValueError: it is no archive, or names a file that may not be unpacked.
    """
    return {path: (member.file_size, member.CRC) for path, member in _members(archive, folder_name).items()}


def unpack(archive: Path, folder: Path, is_ours: bool, progress: Callable[[int], None]) -> Listed:
    """Unpack an archive into `folder`.

    Where there is such a folder, the archive's files come beside what it holds; those that are there already are compared.

    Args:
        is_ours: files that differ may be replaced. progress: is told how many files came.

    Raises:
        ValueError: it is damaged, or names a file that may not be unpacked.
        FileExistsError: other files of these names are there, and may not be replaced.
        OSError: a full disk, among others; nothing is left.
    """
    members = _members(archive, folder.name)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        with zipfile.ZipFile(archive) as opened:
            for number, (path, member) in enumerate(members.items(), 1):
                _extract(opened, member, partial / path)
                progress(number)
        if hasattr(os, "sync"):  # one for all: of thousands of small files each would wait for the disk
            os.sync()
        listed = {path: (member.file_size, member.CRC) for path, member in members.items()}
        _place(partial, folder, listed, is_ours)
    except DAMAGE as error:
        raise ValueError(_damaged(archive, error)) from error
    except OSError as error:
        if type(error) is OSError and error.errno in (None, errno.EINVAL):  # bzip2's; a place before the file's start
            raise ValueError(_damaged(archive, error)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return listed


def crc32(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def _members(archive: Path, folder_name: str) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise ValueError(_damaged(archive, error)) from error
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        _refuse_unsafe(archive, member)
        parts = PurePosixPath(member.filename).parts
        path = "/".join(parts[1:] if len(parts) > 1 and parts[0] == folder_name else parts)
        if path in found:
            raise ValueError(f"{archive} holds {path[:80]!r} twice. Nothing was unpacked; get the archive elsewhere.")
        found[path] = member
    if not found:
        raise ValueError(f"{archive} holds no files. Delete it, and run the same command: it is fetched again.")
    return found


def _refuse_unsafe(archive: Path, member: zipfile.ZipInfo) -> None:
    """Refuse names that lead out of a folder on any system, links, and files behind a password."""
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    parts = name.split("/")
    problem = ""
    if name.startswith("/") or ".." in parts or any(mark in name for mark in ("\\", "\0", ":")):
        problem = "which may lie outside its folder"
    elif not all(part not in ("", ".") for part in parts):
        problem = "which is no plain path"
    elif kind not in (0, stat.S_IFREG):
        problem = "which is no plain file"
    elif member.flag_bits & 1:
        problem = "which needs a password"
    if problem:
        raise ValueError(
            f"{archive} holds {name[:80]!r}, {problem}. Nothing was unpacked. Do not use this archive; get it elsewhere."
        )


def _extract(opened: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one file; zipfile compares the CRC at its end, and takes no more bytes than are listed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(member) as source, open(target, "xb") as out:
        shutil.copyfileobj(source, out, PIECE)
        if out.tell() != member.file_size:
            raise zipfile.BadZipFile(f"{member.filename} has {out.tell()} bytes, and {member.file_size} are listed")


def _place(partial: Path, folder: Path, listed: Listed, is_ours: bool) -> None:
    if not folder.exists():
        os.rename(partial, folder)
        return
    if not is_ours:
        for path, (size, crc) in listed.items():
            there = folder / path
            if there.exists() and not (there.is_file() and there.stat().st_size == size and crc32(there) == crc):
                raise FileExistsError(
                    f"{there} is another file than the one of that name in the archive. Give another folder, or remove {folder} first."
                )
    for path in listed:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / path, folder / path)


def _damaged(archive: Path, error: Exception) -> str:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{archive} is damaged ({said}). Delete it, and run the same command: it is fetched again."
