"""Locks on open files: the kernel's, so that a process that dies holds none.

In: paths and descriptors. Out: descriptors that are locked until they are closed. Invariants: a locked file still has its name, since a
file may be renamed or removed between the two calls of opening and locking it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HAS_LOCKS = fcntl is not None


def lock(file: int, shared: bool = False, waits: bool = True) -> None:
    """Lock an open file until it is closed, or its process ends.

    Raises:
        BlockingIOError: it is locked, and this is not to wait.
    """
    assert fcntl is not None  # whoever needs a lock asks HAS_LOCKS first
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind if waits else kind | fcntl.LOCK_NB)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process or thread is inside with the same file, which is made if it is not there."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock(file)
        yield
    finally:
        os.close(file)


def open_alone(path: Path) -> int | None:
    """A descriptor of a file, made empty, which no other process or thread has until it is closed; None if another one has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock(file, waits=False)
            if path.stat().st_ino == os.fstat(file).st_ino:
                os.ftruncate(file, 0)
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass  # finished, or removed, between the two calls
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextmanager
def refused_twice(path: Path, error: str) -> Iterator[None]:
    """Inside, no other process or thread of this machine is inside with the same file, which is gone afterwards.

    Raises:
        BlockingIOError: with that error; another one is inside.
    """
    if not HAS_LOCKS:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_alone(path)
    if file is None:
        raise BlockingIOError(error)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def remove_idle(path: Path) -> bool:
    """Remove a file unless a process has it open, or does something with it."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        lock(file, waits=False)
        if os.fstat(file).st_ino == path.stat().st_ino:  # not renamed meanwhile
            path.unlink()
        return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
