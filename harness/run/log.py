"""What a run records: `log.jsonl`, TensorBoard, a progress bar, and the verdict on what limits it.

In: numbers with their step. Out: the same, human- and machine-readable. Invariants: no step stands twice, since continuing from
a checkpoint first removes what came after it; only rank 0 writes.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from harness.run.state import writing
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

    def start(
        self,
        folder: Path,
        step: int,
        writes: bool,
        board: bool = True,
        track: Callable | None = None,
        in_epoch: bool = False,
    ) -> "Log":
        """Continue after `step`: entries of later steps are removed.

        Args:
            writes: whether this rank writes. board: write for TensorBoard, too. track: called with {kind/name: number} and
                the step of each entry. in_epoch: the epoch of `step` is not validated yet, so that its entries are removed, too.
        """
        self._track = track
        if not writes:
            return self
        path = Path(folder) / "log.jsonl"
        kept = [entry for entry in read_json_lines(path) if _stays(entry, step, in_epoch)]
        if path.is_file():
            write_atomically(path, "".join(f"{json.dumps(entry)}\n" for entry in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the log is
        if board:
            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + (not in_epoch))
            for entry in kept if in_epoch else ():  # TensorBoard forgets all of a step or nothing
                if entry["step"] == step:
                    self._show(entry["kind"], step, entry)
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
        if self._track:
            self._track(_figures(kind, numbers), step)
        self._show(kind, step, numbers)

    def _show(self, kind: str, step: int, numbers: dict) -> None:
        if self._board and kind != RESULT:
            for name, value in _figures(kind, numbers).items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Bring everything to disk, before a checkpoint relies on it.

        Raises:
            OSError: the disk is full, or away.
        """
        if self._file:
            with writing(Path(self._file.name)):
                self._file.flush()
                os.fsync(self._file.fileno())
                if self._board:
                    self._board.flush()

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


def _stays(entry: dict, step: int, in_epoch: bool) -> bool:
    """Whether an entry is from before the step that a run continues after; what is evaluated again is not."""
    kind, at = entry.get("kind"), entry.get("step")
    return isinstance(at, int) and at <= step and kind != RESULT and not (in_epoch and at == step and kind != "train")


def _figures(kind: str, numbers: dict) -> dict[str, float]:
    return {
        f"{kind}/{name}": value
        for name, value in numbers.items()
        if isinstance(value, int | float) and name not in ("kind", "step")
    }


def read_json_lines(path: Path) -> list[dict]:
    """The entries of a file with one in each line, empty where there is none; lines that a crash has torn are left out."""
    entries = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entries.append(parse_json(line))
    return [entry for entry in entries if isinstance(entry, dict)]
