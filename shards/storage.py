"""Bytes behind a URL (S3, Google Cloud Storage, Azure, HTTP, Hugging Face, ...), by fsspec.

In: the URL of a folder, and names of files in it. Out: their bytes. Invariants: a read that fails is tried again, with longer and
longer pauses, until no byte has come for `patience` seconds; what was read before a connection broke is not read again, where
the server can range; nothing waits for ever; no error names a password or a signature.
"""

import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from shards.refusals import give_up, refusal_of, refuse

LOGGER = logging.getLogger("dermharness")
CHUNK = 4 * 2**20  # bytes of a request
CONNECTIONS = 64  # to S3, at a time; its library makes 10 by default
LEAST_CHUNK = 2**16  # on a line so slow that more does not come in time
LEAST_RATE = 2**18  # bytes/s of a line on which a file can be sent
PATIENCE_S = 300.0  # without a byte, of what is packed
ATTEMPT_S = 30.0  # a request that takes longer is on a dead connection, or asks for too much
PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0
URL = re.compile(r"([a-z0-9]+::)*[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters at least: C:\ is a drive
WRONG_CALLS = ImportError | TypeError | AttributeError | NameError | AssertionError | NotImplementedError
T = TypeVar("T")


def is_url(place: object) -> bool:
    """Whether data are behind a URL, not in a folder."""
    return isinstance(place, str) and URL.match(place) is not None


def without_secrets(text: str) -> str:
    """A text without what gives access: in each URL, user and password and the query (signatures) are cut out."""

    def clean(found: re.Match) -> str:
        after = re.search(r"[)'>,.;:]*$", found[0])  # of the sentence
        return _without_secrets(found[0]) + (after[0] if after and re.search("[?#]", found[0]) else "")

    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s\"]+", clean, text)


def _without_secrets(url: str) -> str:
    # The user's part ends at the last @ before the path; a password may hold anything.
    url = re.sub(r"^([^/]*//)(?:[^/?#]*@)", r"\1", url)
    return re.sub(r"[?#].*$", "", url, flags=re.DOTALL)


class Storage:
    """The files of one folder behind a URL. Safe to share between threads."""

    def __init__(self, url: str, patience: float):
        """Nothing is read yet.

        Args:
            patience: seconds without a byte after which a read fails.

        Raises:
            ValueError: a kind of URL that is not known, or that needs a package which is not installed.
        """
        self.patience = patience
        self.shown = _without_secrets(url).rstrip("/")
        self.chunk, self._reads, self._lock = CHUNK, 0, threading.Lock()
        if "::" in url:
            raise ValueError(
                f"{self.shown} is a chain of URLs. Give the last one alone: what is read is cached anyway."
            )
        address, self._query = url, ""
        if url.lower().startswith("http"):  # a signature belongs behind the name of each file
            address, mark, rest = url.partition("?")
            self._query = mark + rest
        try:
            from fsspec.core import url_to_fs

            options = _s3_options() if url.lower().startswith("s3") else {}
            self._files, root = url_to_fs(address, use_listings_cache=False, skip_instance_cache=True, **options)
        except ImportError as error:
            hint = 'pip install -e ".[remote]" (gs:// needs gcsfs, too, and az:// adlfs)'
            raise ValueError(
                f"{self.shown} needs a package that is not installed ({error}). Install it: {hint}."
            ) from None
        except ValueError as error:
            raise ValueError(f"{self.shown} cannot be opened ({without_secrets(str(error))}).") from None
        self._root = str(root).rstrip("/")

    @property
    def is_reading(self) -> bool:
        """Whether some thread waits for bytes, which has a limit of its own: `patience`."""
        return self._reads > 0

    def url(self, name: str) -> str:
        """The URL of a file, or of the folder itself, for people."""
        return f"{self.shown}/{name}" if name else self.shown

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        """A file, or its bytes [start, stop): fewer where it ends before.

        Raises:
            FileNotFoundError, PermissionError: it is not there, or may not be read.
            ConnectionError: no byte came for `patience` seconds.
        """
        data = self.insist(name, lambda: self.call("cat_file", self.path(name), start=start, end=stop))
        if start is not None and stop is not None and len(data) > stop - start:  # the server does not range
            return data[start:stop]
        return data

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """A file of `size` bytes, piece by piece; never more, and never fewer.

        Raises:
            as `read`. ValueError: it is shorter.
        """
        position, since = 0, time.monotonic()
        while position < size:
            stop = min(position + self.chunk, size)

            def request(start: int = position, stop: int = stop) -> bytes:
                return self.call("cat_file", self.path(name), start=start, end=stop)

            data = self.insist(name, request)
            if len(data) > stop - position:  # the server does not range: all of the file came
                data = data[position:size]
            if data:
                position, since = position + len(data), time.monotonic()
                yield data
            elif (found := self.size(name)) is not None and found < size:
                raise ValueError(f"{self.url(name)} has {found} bytes instead of {size}. Copy it there again.")
            elif time.monotonic() - since > self.patience:
                give_up(
                    self.url(name),
                    f"{position} of {size} bytes came, and no more for {self.patience:g} s",
                    self.patience,
                )
            else:
                time.sleep(PAUSE_S)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where the server does not say."""
        info = self.insist(name, lambda: self.call("info", self.path(name)))
        return info.get("size")

    def send(self, path: Path, name: str) -> None:
        """Have a file of this machine there, over one of that name: in one piece, or in parts as the library sends large ones.

        Raises:
            FileNotFoundError, PermissionError: there is no such place (bucket), or it may not be written.
            ConnectionError: it could not be sent for `patience` seconds.
        """
        size = path.stat().st_size

        def request() -> None:
            self.call("put_file", str(path), self.path(name), grace=size / LEAST_RATE)

        try:
            self.insist(name, request, "written")
        except NotImplementedError:
            raise ValueError(
                f"{self.shown}: the library of such URLs can only read. Give a folder, or a bucket: s3://BUCKET/NAME."
            ) from None

    def remove(self, *names: str, at_once: int = 500) -> None:
        """Have files no more; they may be gone already.

        Raises:
            PermissionError, ConnectionError: as `send`.
        """
        for start in range(0, len(names), at_once):
            paths = [self.path(name) for name in names[start : start + at_once]]
            with suppress(FileNotFoundError):
                self.insist(names[start], lambda paths=paths: self.call("rm", paths), "written")

    def names(self) -> set[str] | None:
        """Names of the files of the folder; None where it cannot be listed (HTTP)."""
        if self.shown.lower().startswith("http"):
            return None
        entries = self.insist("", lambda: self.call("ls", self._root, detail=False))
        return {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Inside, this thread waits for bytes, maybe by way of another process."""
        with self._lock:
            self._reads += 1
        try:
            yield
        finally:
            with self._lock:
                self._reads -= 1

    def path(self, name: str) -> str:
        """What the library calls a file."""
        return f"{self._root}/{name}{self._query}"

    def insist(self, name: str, request: Callable[[], T], done: str = "read") -> T:
        """What a request returns, at last.

        Args:
            done: what is done to the file, for errors: read, written, listed.

        Raises:
            FileNotFoundError, PermissionError: there is no such place, or no access to it.
            ConnectionError: it failed for `patience` seconds.
        """
        began, pause, said = time.monotonic(), PAUSE_S, False
        while True:
            try:
                with self.waits():
                    return request()
            except (
                Exception
            ) as error:  # of many libraries, each with its own: all but those of a wrong call are tried again
                if isinstance(error, WRONG_CALLS):
                    raise
                refusal, reason = refusal_of(error), _reason(error)
                if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
                    self.chunk = max(LEAST_CHUNK, self.chunk // 2)
            # Outside of `except`: the error that is raised carries none of a library, which may name a secret.
            if refusal is not None:
                refuse(self.url(name), refusal, reason, done)
            if time.monotonic() + pause - began > self.patience:
                give_up(self.url(name), reason, self.patience, done)
            if not said:
                said = True
                LOGGER.warning(f"{self.url(name)}: {reason}; tried again for up to {self.patience:g} s")
            with self.waits():
                time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def call(self, method: str, *words: object, grace: float = 0.0, **options: object) -> Any:
        """Call a method of the file system, for as long as an attempt may take.

        Args:
            grace: seconds more, for what takes its time in one piece.

        Raises:
            TimeoutError: it took longer.
        """
        limit = min(ATTEMPT_S, max(1.0, self.patience / 4)) + grace
        if getattr(self._files, "async_impl", False):
            from fsspec.asyn import sync

            return sync(self._files.loop, getattr(self._files, f"_{method}"), *words, timeout=limit, **options)
        done: SimpleQueue = SimpleQueue()

        def work() -> None:
            try:
                done.put((getattr(self._files, method)(*words, **options), None))
            except BaseException as error:
                done.put((None, error))

        threading.Thread(target=work, name="storage", daemon=True).start()
        try:
            result, error = done.get(timeout=limit)
        except Empty:
            raise TimeoutError(f"no answer within {limit:g} s") from None
        if error is not None:
            raise error
        return result


def _s3_options() -> dict[str, dict]:
    """Enough connections; what the user's fsspec configuration says of them goes first."""
    from fsspec.config import conf

    given = conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"max_pool_connections": CONNECTIONS} | given}


def _reason(error: Exception) -> str:
    """What a library says, in one line and without secrets."""
    words = " ".join(without_secrets(str(error)).split())[:200]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
