"""What a run records: `log.jsonl`, TensorBoard, a progress bar, and the verdict on what limits it.

In: numbers with their step. Out: the same, human- and machine-readable. Invariants: no step stands twice, since continuing from
a checkpoint first removes what came after it; only rank 0 writes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from shards.files import write_atomically
from shards.shape import parse_json

RESULT = "result"  # kind of the entry of the final evaluation


class Log:
    """The log of one run, open for writing on rank 0 from `start` on; elsewhere its methods do nothing."""

    def __init__(self):
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._bar: tqdm | None = None
        self._track: Callable | None = None

    def start(self, folder: Path, step: int, writes: bool, board: bool = True, track: Callable | None = None) -> "Log":
        """Continue after `step`: entries of later steps are removed.

        Args:
            writes: whether this rank writes. board: write for TensorBoard, too. track: called with {kind/name: number} and
                the step of each entry.
        """
        self._track = track
        if not writes:
            return self
        path = Path(folder) / "log.jsonl"
        if path.is_file():
            write_atomically(path, b"".join(line for line in path.read_bytes().splitlines(True) if _until(line, step)))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the log is
        if board:
            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1)
        return self

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self.end_bar()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def write(self, kind: str, step: int, numbers: dict) -> None:
        """Append an entry and show its numbers as `kind/name`; the report stage shows a result in TensorBoard."""
        if not self._file:
            return
        self._file.write(json.dumps({"kind": kind, "step": step} | numbers) + "\n")
        figures = {f"{kind}/{name}": value for name, value in numbers.items() if isinstance(value, int | float)}
        if self._track:
            self._track(figures, step)
        if self._board and kind != RESULT:
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring everything to disk, before a checkpoint relies on it.

        Raises:
            OSError: the disk is full, or away.
        """
        if self._file:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                if self._board:
                    self._board.flush()
            except OSError as error:
                raise OSError(
                    f"Cannot write {self._file.name} ({error.strerror}). Make room or repair the disk, then start the same "
                    "command again."
                ) from error

    def begin_bar(self, title: str, total: int, done: int) -> None:
        """Show a progress bar of an epoch, where there is a terminal to show it on."""
        if self._file:
            self._bar = tqdm(total=total, initial=done, desc=title, unit=" images", leave=False, disable=None)

    def move_bar(self, images: int, **numbers: str) -> None:
        """Advance the bar; numbers stand behind it."""
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update(images)

    def end_bar(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def verdict(waited: float, first: float, threads: int, cores: int) -> str:
    """What limits a run, and what to change.

    Args:
        waited: share of the training time that the loop waited for data, 0 to 1.
        first: the part of it for the first batch of each epoch, when nothing is decoded yet.
        threads: decoding threads of the process. cores: cores that it may use.
    """
    if waited - first < 0.02:
        for_first = f" ({first:.1%} for the first batch of each epoch)" if waited >= 0.02 else ""
        return f"compute-bound: {waited:.1%} of the time waiting for data{for_first}; more decoding would not help"
    more = f"raise data.threads to {cores}" if threads < cores else "give the process more cores"
    return (
        f"input-bound: {waited:.0%} of the time waiting for data; {more} or pack smaller (python -m shards pack --size)"
    )


def _until(line: bytes, step: int) -> bool:
    try:
        entry = parse_json(line)
        return entry["step"] <= step and entry["kind"] != RESULT  # a run that continues is evaluated again
    except (ValueError, KeyError, TypeError):
        return False  # a line cut off by a crash
