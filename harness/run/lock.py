"""One job at a time writes a run folder.

In: a run folder. Out: `RUN/lock.json` with host, process and a heartbeat. Invariants: a lock outlives its owner by
less than a minute. On the owner's machine, and since its last boot, a dead process is seen at once. Elsewhere the heartbeat is
watched: clocks of two machines are never compared, and two of them may have one name.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from harness.run.console import LOGGER
from shards.shape import parse_json

BEAT_S = 5.0
WATCHED_S = 30.0  # a heartbeat that stands still for so long has stopped
SAME_START_S = 10.0  # the system counts a process's start from its boot, which its clock's corrections move


class RunLock:
    """A lock that is held from `acquire` to the end of the block."""

    def __init__(self, folder: Path):
        self.file = Path(folder) / "lock.json"
        self._owner = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "namespace": _process_namespace(),
            "process": os.getpid(),
            "started": psutil.Process().create_time(),
        }
        self._held, self._over, self._beats = False, threading.Event(), 0
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error) -> None:
        if self._held:
            self._over.set()
            self._thread.join()
            if self._is_ours():
                self.file.unlink(missing_ok=True)
            self._held = False

    def acquire(self) -> None:
        """Take the lock; wait for a heartbeat if nothing else tells whether its owner lives.

        Raises:
            BlockingIOError: another job holds it.
        """
        found = _read(self.file)
        if found and not self._is_ours():
            who = f"process {found.get('process')} on {found.get('host')}"
            if self._lives(found, who):
                raise BlockingIOError(
                    f"{self.file.parent} is in use by {who}. Let it end or stop it (touch {self.file.parent / 'stop'}), "
                    "or name another --run.folder."
                )
            LOGGER.info(f"{self.file} was left by {who}, which is gone")
        self._write()
        time.sleep(0.05)
        if not self._is_ours():  # another job took it in the same moment; one of the two wins
            raise BlockingIOError(f"{self.file.parent} was just taken by another job. Name another --run.folder.")
        self._held = True
        self._thread.start()

    def check(self) -> None:
        """Before anything is written: the lock is still held.

        Raises:
            BlockingIOError: another job took it, since this one gave no sign of life (it was frozen, or the disk away).
        """
        if self._held and not self._is_ours():
            raise BlockingIOError(
                f"Another job took over {self.file.parent} while this one stood still. This one ends; the other goes on."
            )

    def _lives(self, found: dict, who: str) -> bool:
        if all(found.get(key) == self._owner[key] for key in ("host", "boot", "namespace")):
            try:
                process = psutil.Process(found["process"])
                if process.status() in (
                    psutil.STATUS_ZOMBIE,
                    psutil.STATUS_DEAD,
                ):  # killed, and its parent has not asked yet
                    return False
                started = process.create_time()
                return abs(started - found["started"]) < SAME_START_S  # else the number went to another process since
            except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):  # none, or no number of one
                return False
        LOGGER.info(f"{self.file.parent} was last used by {who}; watching for {WATCHED_S:.0f} s whether it still runs")
        deadline = time.monotonic() + WATCHED_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, WATCHED_S / 10))
            now = _read(self.file)
            if now is None:
                return False  # it ended and gave the lock back
            if now != found:
                return True
        return False

    def _is_ours(self) -> bool:
        found = _read(self.file)
        return found is not None and all(found.get(key) == value for key, value in self._owner.items())

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if not self._is_ours():
                    return  # taken over: `check` says so before the next checkpoint
                self._write()
            except OSError:
                continue  # the disk may come back; if it does not, saving will say so

    def _write(self) -> None:
        self._beats += 1
        temporary = self.file.with_name(f".lock.{self._owner['process']}.tmp")
        temporary.write_text(json.dumps(self._owner | {"beats": self._beats}) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)


def _read(file: Path) -> dict | None:
    """The content of a lock, None where there is none; a damaged one is nobody's, and empty."""
    try:
        found = parse_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    process, started = found.get("process"), found.get("started")
    is_whole = isinstance(process, int) and 0 < process < 2**31 and isinstance(started, int | float)
    return found if is_whole else {}


def _boot() -> str:
    """What tells machines of one name apart, and the boots of one machine; nothing where the system has no such number."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _process_namespace() -> str:
    """Process numbers mean the same only inside one: two containers on one host may share its name."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
