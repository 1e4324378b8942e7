"""What a run says: one logger, to the terminal and to RUN/console.log.

In: lines by `logging.getLogger("dermharness")`. Out: the same on the terminal, and in the run's folder once there is one.
Invariants: a character that the terminal cannot show is replaced, never an error; progress bars are not torn; only rank 0
writes the file.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from shards.terminal import replace_unprintable

LOGGER = logging.getLogger("dermharness")


class Terminal(logging.Handler):
    """Errors to stderr, all else to stdout, above a progress bar if there is one. Keeps the lines until a file takes them."""

    def __init__(self):
        super().__init__()
        self.setFormatter(_Lines())
        self.early: list[logging.LogRecord] | None = []  # before there is a run folder

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        if self.early is not None:
            self.early.append(record)
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        with tqdm.external_write_mode(file=stream):
            print(self.format(record), file=stream, flush=True)


class _Lines(logging.Formatter):
    """Information as it is; warnings and errors with their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _Dated(_Lines):
    def format(self, record: logging.LogRecord) -> str:
        return f"{self.formatTime(record)} {super().format(record)}"


def start_console() -> None:
    """Log to the terminal from now on; whatever its encoding is, no character is fatal."""
    replace_unprintable()
    if not any(isinstance(handler, Terminal) for handler in LOGGER.handlers):
        LOGGER.addHandler(Terminal())
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False


@contextmanager
def console_log(folder: Path, writes: bool) -> Iterator[None]:
    """Inside, lines also go to FOLDER/console.log, those before it first.

    Args:
        writes: whether this rank writes; elsewhere nothing happens.
    """
    terminals = [handler for handler in LOGGER.handlers if isinstance(handler, Terminal)]
    if not writes or not terminals:
        yield
        return
    file = logging.FileHandler(folder / "console.log", encoding="utf-8", errors="replace")
    file.setFormatter(_Dated())
    for record in terminals[0].early or ():
        file.emit(record)
    terminals[0].early = None
    LOGGER.addHandler(file)
    try:
        yield
    finally:
        LOGGER.removeHandler(file)
        file.close()
