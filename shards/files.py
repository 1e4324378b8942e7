"""Files that are complete or absent: durable writes, checksums, folders that appear at once.

In: paths and bytes. Out: files that are flushed to disk, and their SHA-256. Invariants: a reader, or a crash at any moment, sees either
the old content or the new one; a file counts as written only when it is on the disk.
"""

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path


def write_durably(path: Path, data: bytes | memoryview) -> str:
    """Write a file and flush it to disk; returns its SHA-256 as hex, computed in parallel by another thread."""
    with ThreadPoolExecutor(1) as pool, open(path, "wb") as file:
        digest = pool.submit(hashlib.sha256, data)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return digest.result().hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that readers, also after a crash, see either the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # a full disk needs the room
            temporary.unlink()
        raise
    sync(path.parent)


def free_name(path: Path) -> Path:
    """The path if nothing is there, or else the first of PATH-2, PATH-3, ... where nothing is."""
    number, free = 2, path
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usable_cores() -> int:
    """Cores of this process's affinity; those of the machine where, as on macOS, there is none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_used_folder(out: Path) -> None:
    """Refuse to write where something is, or where no folder that is complete can take the place of one that is there.

    Raises:
        FileExistsError: `out` exists and is not an empty folder, or is where a disk is mounted, or the current folder.
    """
    if os.path.ismount(out) or out.resolve() == Path.cwd():
        what = "where a disk is mounted" if os.path.ismount(out) else "the folder you are in"
        raise FileExistsError(f"{out} is {what}. Give a new folder inside it.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already. Give another folder, or remove it first: rm -r {out}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends well.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        OSError: a full disk, among others; the partial folder is removed.
    """
    refuse_used_folder(out)
    out = out.resolve()  # of a link, where it leads to
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        os.rename(partial, out)  # takes the place of an empty folder, too
        sync(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"The disk of {out} is full, and no partial output was kept. Free space there, or give another folder."
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
