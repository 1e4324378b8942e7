"""Requests to stop: a signal or a file sets a flag, and the loop looks at it when it is ready.

In: SIGTERM, SIGINT, SIGUSR1, or a file `stop` in the run's folder. Out: `requested`. What stays true: a signal
interrupts nothing; a second one more than a second later leaves at once (launchers and SLURM send each twice within
milliseconds, which is one request).
"""

import os
import signal
import time
from pathlib import Path

STOPPED = 75  # exit code of a run that stopped when asked to: EX_TEMPFAIL, "try again"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Listens while its block runs."""

    def __init__(self, folder: Path):
        """`folder` is the run's; `touch FOLDER/stop` asks as a signal does."""
        self.file = Path(folder) / "stop"
        self._first = 0.0
        self._previous: dict = {}

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return bool(self._first) or self.file.exists()

    def __enter__(self) -> "StopRequest":
        """Take over the signals."""
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        now = time.monotonic()
        if self._first and now - self._first > 1.0:
            os._exit(128 + number)
        self._first = self._first or now
