"""Originals read by threads, in order: as many as there are cores, and more where each waits for a network.

In: paths of a source. Out: what is made of each file. Invariants: a bounded number is under way, so that memory does not depend on how many
there are; the order is that of the paths.
"""

import filecmp
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from shards.files import sha256, usable_cores
from shards.storage import CONNECTIONS
from shards.tree import RemotePath, SourcePath

READS_PER_CORE = 16  # under way behind a URL: a core decodes about 200 images/s, and an answer takes 0.03 to 0.1 s
T = TypeVar("T")
U = TypeVar("U")


def n_readers(paths: Iterable[object], threads: int) -> int:
    """Threads that read and decode; `threads` of them have work for a core at a time."""
    is_remote = any(isinstance(path, RemotePath) for path in paths)
    return threads + min(CONNECTIONS, READS_PER_CORE * threads) if is_remote else threads


@contextmanager
def threads_of(n: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads. After an error, or Ctrl-C, nobody waits for those that still wait for an answer."""
    pool = ThreadPoolExecutor(n)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def in_order(pool: ThreadPoolExecutor, work: Callable[[T], U], items: Iterable[T], most: int) -> Iterator[U]:
    """What `work` makes of each item, in order; at most so many are under way or wait to be taken."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def digests(paths: Iterable[SourcePath]) -> Iterator[str]:
    """SHA-256 of each file, as hex.

    Raises:
        OSError: as `RemotePath.read_bytes`.
    """
    return _of_each(list(paths), _digest)


def are_same(pairs: list[tuple[SourcePath, SourcePath]]) -> Iterator[bool]:
    """Whether the files of a pair are the same bytes, of each pair.

    Raises:
        OSError: as `digests`.
    """
    return _of_each(pairs, _is_same)


def _of_each(items: list[T], work: Callable[[T], U]) -> Iterator[U]:
    firsts = (item[0] if isinstance(item, tuple) else item for item in items)
    threads = n_readers(firsts, usable_cores())
    with threads_of(threads) as pool:
        yield from in_order(pool, work, items, 2 * threads)


def _digest(path: SourcePath) -> str:
    return sha256(path) if isinstance(path, Path) else hashlib.sha256(path.read_bytes()).hexdigest()


def _is_same(pair: tuple[SourcePath, SourcePath]) -> bool:
    first, other = pair
    if isinstance(first, Path) and isinstance(other, Path):
        return filecmp.cmp(first, other, shallow=False)
    return first.read_bytes() == other.read_bytes()
