"""Every state in which a kill can leave a folder, recorded while a process works in it.

That is what is in the folder before each operation on its files, as Python's audit events tell them: what is still in a process's own
buffers is lost. A write is also seen empty and cut in its middle. Equal states are kept once.
"""

import os
import pickle
import threading
from pathlib import Path

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")  # and open, for writing
State = dict[str, bytes | None]  # contents by path; None for a folder


class Recorder:
    """An audit hook: Python calls it before it does what an event names. A place is such an event, or a write before it."""

    def __init__(self, folder: Path):
        self.folder, self.places = folder, 0
        self.states: dict[bytes, str] = {}  # each with the place that it was first seen at
        found = contents(folder)
        self._before = {number: found[path] for path, number in self._numbers(found).items()}  # contents by inode
        self._looking, self._lock = False, threading.RLock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in EVENTS or isinstance(arguments[0], int):  # a descriptor: of a lock, which is emptied
            return
        place = f"{event} {os.path.basename(os.fspath(arguments[0]))}"
        with self._lock:
            if not self._looking and "lock." not in place:
                self._looking = True
                self.look(place)
                self._looking = False

    def look(self, place: str) -> None:
        """Keep what is there, and what was there in the middle of what was written since the last look."""
        now = contents(self.folder)
        numbers = self._numbers(now)
        for path, data in now.items():
            before = self._before.get(numbers.get(path), b"")
            if data and data != before:
                begun = len(before) if data.startswith(before) else 0  # else it was emptied first
                for end in {begun, begun + (len(data) - begun) // 2}:
                    self._keep(now | {path: data[:end]}, f"write of {path}, before {place}")
        self._keep(now, place)
        self._before = {number: now[path] for path, number in numbers.items()}

    def _numbers(self, found: State) -> dict[str, int]:
        """Inodes of files: one that was moved has kept it."""
        return {path: (self.folder / path).stat().st_ino for path, data in found.items() if data is not None}

    def _keep(self, found: State, place: str) -> None:
        self.places += 1
        self.states.setdefault(pickle.dumps(sorted(found.items())), place)


def contents(folder: Path) -> State:
    """What is in a folder, without its lock."""
    found = {}
    for path in folder.rglob("*"):
        if not path.name.startswith((".lock", "lock.json")):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def put(found: State, folder: Path) -> None:
    """Make a folder with these contents."""
    folder.mkdir(parents=True)
    for path, data in sorted(found.items()):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
