"""Requests to a web server, with patience.

In: a URL. Out: an open answer, or a short one whole. Invariants: nothing waits for ever; what asking again does not change is an error at
once; no credentials are sent, no error names a signature, and nobody leads from HTTPS to something less.
"""

import http.client
import json
import logging
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from shards.refusals import REFUSED
from shards.storage import ATTEMPT_S, LONGEST_PAUSE_S, PAUSE_S, without_secrets

LOGGER = logging.getLogger("dermharness")
CERTIFICATE = -1  # in place of a status: a certificate that is not trusted
LONGEST_TEXT = 2**24  # bytes of an answer that is no file
# Harvard's firewall refuses the names under which HTTP libraries introduce themselves.
AGENT = "dermharness (python -m shards fetch)"


class BrokenError(Exception):
    """A request failed in a way that asking again may mend."""


class Patience:
    """How long a server may send nothing new."""

    def __init__(self, url: str, seconds: float):
        """Args: url: what errors name. seconds: without a new byte, until it is given up."""
        self.shown, self.seconds = without_secrets(url), seconds
        self.timeout = min(ATTEMPT_S, max(1.0, seconds / 4))
        self._best, self._since, self._pause, self._said = 0, time.monotonic(), PAUSE_S, False

    def progress(self, position: int) -> None:
        """So many bytes are there; only what never was there before is progress."""
        if position > self._best:
            self._best, self._since, self._pause = position, time.monotonic(), PAUSE_S

    def wait(self, reason: str) -> None:
        """Wait before the next request.

        Raises:
            ConnectionError: nothing new came for too long.
        """
        if time.monotonic() + self._pause - self._since > self.seconds:
            raise ConnectionError(
                f"{self.shown}: nothing came for {self.seconds:g} s ({reason}). Is this machine connected? The same command continues "
                "where it stopped; --patience waits longer."
            )
        if not self._said:
            self._said = True
            LOGGER.warning(f"{self.shown}: {reason}; tried again for up to {self.seconds:g} s")
        time.sleep(self._pause * random.uniform(0.5, 1.0))
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)


def read_text(url: str, seconds: float) -> bytes:
    """A short answer, as of an API.

    Raises:
        as `open_url`, and ConnectionError after too long without an answer.
    """
    return _insist(url, seconds, _whole)


def read_size(url: str, seconds: float) -> tuple[int | None, str]:
    """The size of a file in bytes, None where the server does not say, and its ETag; by HEAD.

    Raises:
        as `open_url`, and ConnectionError after too long without an answer.
    """

    def read(answer: Any) -> tuple[int | None, str]:
        return length_of(answer.headers.get("Content-Length")), answer.headers.get("ETag", "")

    return _insist(url, seconds, read, method="HEAD")


def open_url(url: str, timeout: float, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """Ask for a URL. The answer is open; its status is 200, 206 or 416.

    Raises:
        BrokenError: asking again may help.
        FileNotFoundError, PermissionError, ConnectionError: it does not.
    """
    request = urllib.request.Request(url, headers={"User-Agent": AGENT, **(headers or {})}, method=method)
    try:
        answer = OPENER.open(request, timeout=timeout)
        if answer.status in (http.client.OK, http.client.PARTIAL_CONTENT):
            return answer
        answer.close()
        status, reason = answer.status, f"HTTP {answer.status}: no file, but a question to a browser, it may be"
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error
        status, reason = error.code, _server_says(error)
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        status, reason = 0, " ".join(without_secrets(str(cause)).split())[:200] or type(cause).__name__
        if isinstance(cause, ssl.SSLCertVerificationError | PermissionError):
            status = CERTIFICATE if isinstance(cause, ssl.SSLCertVerificationError) else http.client.FORBIDDEN
    # Outside of `except`: the error that is raised carries none that may name a signature.
    if status in REFUSED or status == CERTIFICATE or http.client.OK < status < http.client.MULTIPLE_CHOICES:
        _refuse(without_secrets(url), status, reason)
    raise BrokenError(reason)


def _whole(answer: Any) -> bytes:
    data, length = answer.read(LONGEST_TEXT), length_of(answer.headers.get("Content-Length"))
    if length is not None and len(data) < length:
        raise BrokenError(f"{len(data)} of {length} bytes came")
    return data


def _insist(url: str, seconds: float, read: Callable[[Any], Any], method: str = "GET") -> Any:
    patience = Patience(url, seconds)
    while True:
        try:
            with open_url(url, patience.timeout, method=method) as answer:
                return read(answer)
        except (BrokenError, OSError, http.client.HTTPException) as error:
            if isinstance(error, FileNotFoundError | PermissionError) or type(error) is ConnectionError:
                raise  # refused: `open_url` has said what to do
            reason = str(error) or type(error).__name__
        patience.wait(reason)


def length_of(text: str | None) -> int | None:
    """The number of a header such as Content-Length; None where it has none."""
    return int(text) if text and text.isascii() and text.isdigit() else None


def _server_says(error: urllib.error.HTTPError) -> str:
    """The status, and the reason that an API gives in JSON."""
    said = ""
    with suppress(OSError, ValueError, TypeError, KeyError, http.client.HTTPException):
        said = str(json.loads(error.read(2**16))["message"])
    error.close()
    return f"HTTP {error.code}" + (f": {' '.join(without_secrets(said).split())[:300]}" if said else "")


def _refuse(shown: str, status: int, reason: str) -> NoReturn:
    if status in (404, 410):
        raise FileNotFoundError(
            f"{shown} is not there ({reason}). Was it moved? A copy elsewhere can be named by --server."
        )
    if status == CERTIFICATE:
        raise ConnectionError(
            f"{shown}: its certificate is not trusted ({reason}). Correct this machine's date and certificates."
        )
    raise PermissionError(
        f"{shown} is refused ({reason}). Download it with a browser, and unpack it where `python -m shards pack` finds it."
    )


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to where the bytes lie (Dataverse: S3), but never from HTTPS to something that anyone on the way may change."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """The request of the new address.

        Raises:
            PermissionError: it is not as safe as the old one.
        """
        allowed = ("https://",) if req.full_url.lower().startswith("https://") else ("https://", "http://")
        if not newurl.lower().startswith(allowed):
            raise PermissionError(f"the server redirects to {without_secrets(newurl)}, which is not HTTPS")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


OPENER = urllib.request.build_opener(_SafeRedirects)
