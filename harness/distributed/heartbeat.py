"""Rank heartbeat: if a rank dies, freezes, stands still or raises, all ranks exit, and the one at fault is named.

In: a key-value store that rank 0 serves; the points of the program that each rank's main thread passes. Out: one sentence that
names the rank that failed. Invariants: when a rank dies, freezes, stands still while others wait for it, or raises, every rank
ends within a bounded time, whatever it waits for. Without this, a collective that waits for a dead rank returns after many
minutes or never, and says nothing of who is missing.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - its documented place

LOGGER = logging.getLogger("dermharness")
BEAT_S = 1.0
DEAD_S = 60.0  # silent for so long: dead, frozen, or out of reach
STUCK_S = 60.0  # waited for by others for so long, without a sign of work
SUSPECTED_S = 6.0  # both, once a collective has failed: somebody must be the cause
GRACE_S = 10.0  # for the main thread to end in good order before the process is ended
TURN_S = 300.0  # rank 0's work while the others wait: said after so long, and again


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life.

    number: of this sign. passed: points of the program that its main thread has passed; each rank passes the same ones in the
    same order. place: the last of them. work: signs of work between points. is_long: it said that its work will be long.
    """

    number: int
    passed: int
    place: str
    work: int
    is_long: bool

    def to_json(self) -> str:
        """For the store."""
        return json.dumps([self.number, self.passed, self.place, self.work, self.is_long])


class Lag:
    """Who stands still while others wait for it: what one watcher sees over time."""

    def __init__(self):
        self._since: dict[
            int, tuple[tuple[int, int], float]
        ] = {}  # rank: (passed, work), since when others wait for it

    def find_stuck(self, beats: dict[int, Beat], now: float, patience: float) -> int | None:
        """The rank that others have waited for, for longer than this, without a sign of work from it; None if there is none.

        Args:
            beats: the last one of each rank. now, patience: seconds.
        """
        first = max(beat.passed for beat in beats.values())
        waited_for = {}
        for rank, beat in beats.items():
            if beat.passed == first or beat.is_long:
                continue  # at the place where the others are: whether it works or waits, nobody waits for it alone
            signs = (beat.passed, beat.work)
            before, since = self._since.get(rank, (signs, now))
            waited_for[rank] = (signs, since if before == signs else now)
        self._since = waited_for
        waits = {rank: now - since for rank, (_, since) in waited_for.items()}
        longest = max(waits, key=lambda rank: (waits[rank], -beats[rank].passed), default=None)
        return longest if longest is not None and waits[longest] > patience else None


class Heartbeat:
    """One rank's part: a thread that beats and looks whether the others do, and one that looks whether the first is blocked."""

    def __init__(self, store: Store, rank: int, watched: Iterable[int], who: str):
        """Announce this rank by host and process number (`who`). Rank 0 watches every rank, and every rank watches rank 0.

        Who sees all ranks sees which is stuck; who sees one has nothing to compare it with.
        """
        self.failure: dict | None = None  # {"rank", "error"} of the rank that failed first
        self.on_failure: Callable[[dict], None] = lambda cause: None  # told of the cause, once
        self.is_long = False  # what the main thread is at will be long: nobody shall take it for stuck
        self._store, self._rank = store, rank
        self._watched = tuple(watched)
        self._names: dict[int, str] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        self._lag, self._passed, self._place, self._work, self._beats = Lag(), 0, "start", 0, 0
        self._asked: float | None = None  # when the question that the store has not answered yet was put
        self._turn = ("", 0.0)  # rank 0's work that the others wait for, and since when
        self._said_turns, self._own_report = 0, False
        self._over, self._known = threading.Event(), threading.Event()
        store.set(f"who/{rank}", who)
        self._beat()
        # Not daemons: one that is inside the store while Python shuts down would crash it.
        self._threads = [threading.Thread(target=run, name=run.__name__) for run in (self._run, self._guard)]

    def start(self) -> None:
        """Begin, once every rank has said who it is."""
        self._names = {rank: self._store.get(f"who/{rank}").decode() for rank in {0, *self._watched}}
        self._seen = dict.fromkeys(self._watched, (0, time.monotonic()))
        for thread in self._threads:
            thread.start()

    def passes(self, place: str) -> None:
        """The main thread comes to a point of the program where ranks wait for each other."""
        self._place, self._passed = place, self._passed + 1

    def works(self) -> None:
        """A sign of work between two points, from any thread: what takes long is not stuck."""
        self._work += 1

    def begin_turn(self, work: str) -> None:
        """Rank 0 begins some work that the others wait for."""
        self._turn = (work, time.monotonic())

    def wait_for_turn(self, number: int) -> None:
        """Wait until rank 0 is done with its work `number`, however long that takes.

        Not in a collective, which has a limit, and on a GPU blocks the device.

        Raises:
            RuntimeError: a rank failed meanwhile, or rank 0 is gone.
        """
        pause = 0.001
        while int(self._store.get("turn")) < number:
            if self.failure:
                raise RuntimeError("a rank failed while this one waited for rank 0")
            time.sleep(pause)
            pause = min(0.2, 2 * pause)

    def end_turn(self, number: int) -> None:
        """Rank 0 is done with its work `number`."""
        self._turn = ("", 0.0)
        self._store.set("turn", str(number))

    def report(self, error: str) -> None:
        """Tell the others that this rank failed."""
        self._own_report = True
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
        for thread in self._threads:
            thread.join()

    def _is_over(self) -> bool:
        return self._over.wait(BEAT_S) or not threading.main_thread().is_alive()

    def _run(self) -> None:
        while not self._is_over():
            self._asked = time.monotonic()
            try:
                self._beat()
                self.failure = self._look()
            except RuntimeError:
                self.failure = {"rank": 0, "error": f"rank 0 ({self._names[0]}) ended without a word"}
            self._asked = None
            self._say_long_turn()
            if self.failure:
                self._known.set()
                if not self._own_report:
                    self._end(self.failure)
                return

    def _guard(self) -> None:
        """Whether the store answers: the thread that asks it has no limit of its own, and nor has the main thread."""
        while not self._is_over():
            asked = self._asked
            if self.failure or asked is None or time.monotonic() - asked < DEAD_S:
                continue
            error = f"rank 0 ({self._names[0]}) hangs, or is out of reach: no answer for {DEAD_S:.0f} s"
            self.failure = {"rank": 0, "error": error}
            self._known.set()
            self._end(self.failure)
            return

    def _say_long_turn(self) -> None:
        work, began = self._turn
        minutes = (time.monotonic() - began) / 60
        if work and 60 * minutes > TURN_S * (self._said_turns + 1):
            self._said_turns += 1
            LOGGER.info(f"rank 0 has been at '{work}' for {minutes:.0f} minutes; the others wait")
        elif not work:
            self._said_turns = 0

    def _beat(self) -> None:
        self._beats += 1
        beat = Beat(self._beats, self._passed, self._place, self._work, self.is_long)
        self._store.set(f"beat/{self._rank}", beat.to_json())

    def _look(self) -> dict | None:
        if self._store.check(["failed"]):
            return json.loads(self._store.get("failed"))
        suspected = self._store.check(["suspect"])
        patience = SUSPECTED_S if suspected else DEAD_S
        now, beats = time.monotonic(), {}
        for rank in self._watched:
            beats[rank] = beat = Beat(*json.loads(self._store.get(f"beat/{rank}")))
            last, since = self._seen[rank]
            if beat.number != last:
                self._seen[rank] = (beat.number, now)
            elif now - since > patience:
                died = f"rank {rank} ({self._names[rank]}) ended without a word, or hangs: no sign of life for {patience:.0f} s"
                return self._publish({"rank": rank, "error": died})
        patience = SUSPECTED_S if suspected else STUCK_S
        if (stuck := self._lag.find_stuck(beats, now, patience)) is not None:
            ahead = max(beats.values(), key=lambda beat: beat.passed).place
            error = (
                f"rank {stuck} ({self._names[stuck]}) is stuck: it has stood still for {patience:.0f} s after "
                f"'{beats[stuck].place}', while others wait for it at '{ahead}'"
            )
            return self._publish({"rank": stuck, "error": error})
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
        too = "" if failure["rank"] == self._rank else f"; rank {self._rank} ends, too"
        print(f"error: {failure['error']}{too}", file=sys.stderr, flush=True)
        os._exit(1)
