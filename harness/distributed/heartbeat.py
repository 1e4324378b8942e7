"""Rank heartbeat: each rank beats once a second; if one dies, hangs or raises, all ranks exit.

In: a key-value store that rank 0 serves. Out: one sentence that names the rank that failed. Invariants: when a
rank dies, hangs or raises, every other rank ends within a bounded time, whatever it waits for. Without this, a collective
that waits for a dead rank returns after many minutes or never, and says nothing of who is missing.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - its documented place

BEAT_S = 1.0
DEAD_S = 60.0  # silent for so long: dead, frozen, or out of reach
SUSPECTED_S = 6.0  # the same, once a collective has failed: somebody must be the cause
GRACE_S = 10.0  # for the main thread to end in good order before the process is ended


class Heartbeat:
    """One rank's part: a thread that beats, and looks whether the others do."""

    def __init__(self, store: TCPStore, rank: int, watched: Iterable[int], who: str):
        """Announce this rank by host and process number (`who`). Rank 0 watches every rank, and every rank watches rank 0."""
        self.failure: dict | None = None  # {"rank", "error"} of the rank that failed first
        self.on_failure: Callable[[dict], None] = lambda cause: None  # told of the cause, once
        self._store, self._rank, self._watched = store, rank, tuple(watched)
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(self._watched, (b"", time.monotonic()))
        self._over, self._known = threading.Event(), threading.Event()
        store.set(f"who/{rank}", who)
        store.add(f"beat/{rank}", 1)
        # Not a daemon: one that is inside the store while Python shuts down would crash it.
        self._thread = threading.Thread(target=self._run, name="watch")

    def start(self) -> None:
        """Begin, once every rank has said who it is."""
        self._names = {rank: self._store.get(f"who/{rank}").decode() for rank in {0, *self._watched}}
        self._thread.start()

    def report(self, error: str) -> None:
        """Tell the others that this rank failed."""
        self._publish({"rank": self._rank, "error": error})
        time.sleep(2 * BEAT_S)  # this may be the rank that serves the store: let the others read it

    def failure_behind_collective(self) -> dict | None:
        """Wait a little for who is to blame, None if nobody else is."""
        with suppress(RuntimeError):  # rank 0 serves the store: if it is gone, the thread will say so
            self._store.set("suspect", "1")
        self._known.wait(SUSPECTED_S + 4 * BEAT_S)
        return self.failure if self.failure and self.failure["rank"] != self._rank else None

    def close(self) -> None:
        """Stop watching, before any rank leaves."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(BEAT_S) and threading.main_thread().is_alive():
            try:
                self._store.add(f"beat/{self._rank}", 1)
                self.failure = self._look()
            except RuntimeError:
                self.failure = {"rank": 0, "error": f"rank 0 ({self._names[0]}) ended without a word"}
            if self.failure:
                self._known.set()
                if self.failure["rank"] != self._rank:
                    self._end(self.failure)
                return

    def _look(self) -> dict | None:
        if self._store.check(["failed"]):
            return json.loads(self._store.get("failed"))
        patience = SUSPECTED_S if self._store.check(["suspect"]) else DEAD_S
        now = time.monotonic()
        for rank in self._watched:
            beat = self._store.get(f"beat/{rank}")
            last, since = self._seen[rank]
            if beat != last:
                self._seen[rank] = (beat, now)
            elif now - since > patience:
                died = f"rank {rank} ({self._names[rank]}) ended without a word, or hangs: no sign of life for {patience:.0f} s"
                return self._publish({"rank": rank, "error": died})
        return None

    def _publish(self, cause: dict) -> dict:
        """Make a cause known, and say which one is: the first."""
        try:
            return json.loads(self._store.compare_set("failed", "", json.dumps(cause)))
        except RuntimeError:
            return cause

    def _end(self, failure: dict) -> None:
        """End this process: by its main thread, or, where that waits for a rank that is gone, here."""
        self.on_failure(failure)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if self._over.wait(0.1) or not threading.main_thread().is_alive():
                return
        print(f"error: {failure['error']}; rank {self._rank} ends, too", file=sys.stderr, flush=True)
        os._exit(1)
