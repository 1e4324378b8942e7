"""Requests to stop: a signal, a file or the clock sets a flag, and the loop looks at it when it is ready.

In: SIGTERM, SIGINT, SIGUSR1, a file `stop` in the run's folder, a time limit, or the end of the launcher. Out: `asked`.
Invariants: a signal interrupts nothing; a second one more than a second later exits immediately (launchers and SLURM
send each twice within milliseconds, which is one request).
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

STOPPED = 75  # exit code of a run that stopped when asked to: EX_TEMPFAIL, "try again"
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]  # Windows has two
PR_SET_PDEATHSIG = 1  # of prctl(2)


class StopRequest:
    """Listens while its block runs."""

    def __init__(self, folder: Path, time_limit_minutes: float = 0.0):
        """`touch FOLDER/stop` asks as a signal does, and so does the clock `time_limit_minutes` after the process's start.

        A job script that may touch it before its processes are there says in JOB_BEGAN when it began (seconds since 1970).
        """
        self.file = Path(folder) / "stop"
        self.reason = ""  # why `asked` said so
        self._first, self._signal = 0.0, ""
        self._previous: dict = {}
        self._began = psutil.Process().create_time()
        self._end = (
            time.monotonic() - (time.time() - self._began) + 60 * time_limit_minutes
            if time_limit_minutes
            else float("inf")
        )
        self._file_counts_from = min(self._began, float(os.environ.get("JOB_BEGAN", "inf")))
        self._looked, self._longest = None, 0.0
        self.saving_s: Callable[[], float] = lambda: 0.0  # that a checkpoint takes, beside the training

    def asked(self) -> bool:
        """Whether somebody asked, or the time is up before the next look.

        The next look is expected after the longest time that ever passed between two. Then the checkpoint of before may still be
        written, and the last one comes after it.
        """
        now = time.monotonic()
        if self._looked is not None:
            self._longest = max(self._longest, now - self._looked)
        self._looked = now
        if self._first:
            self.reason = self._signal
        elif now + self._longest + 2 * self.saving_s() > self._end:
            self.reason = "run.time_limit_minutes"
        elif self.file.exists():
            self.reason = "file"
        return bool(self.reason)

    def forget_old_file(self) -> None:
        """Remove a file that asked a run before this one to stop; one that came since the job or process began is for it."""
        with suppress(FileNotFoundError):
            if self.file.stat().st_mtime < self._file_counts_from:
                self.file.unlink()

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self._first and now - self._first > 1.0:
            os._exit(128 + number)
        self._first, self._signal = self._first or now, signal.Signals(number).name


def exit_code(outcome: str) -> int:
    """The code of a process whose run is `finished` or `stopped`: 0, or `STOPPED`.

    A launcher that restarts what fails must not restart what was asked to stop; it passes no code on, either way.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return 0 if outcome == "finished" or restarts else STOPPED


def follow_launcher() -> None:
    """When the launcher dies, ask to stop: otherwise the run would go on unseen (SIGUSR1 kills a launcher, for one)."""
    if sys.platform != "linux":
        return
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return
    if any("accelerate" in word or "torchrun" in word or "torch.distributed" in word for word in words):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
