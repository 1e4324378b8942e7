"""The shards that come next, fetched before they are needed.

In: which shards a rank needs from which batch on, and how far it is. Out: files in the cache. Invariants: no more than a share of the
cache is fetched ahead of use; nothing is begun beside a shard that the loop waits for, whose bytes would come later; processes of a
machine fetch other shards at the same time; an error here is silent, since whoever needs the shard meets it again; no thread is
waited for.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from shards.plan import Plan, locate_in_order

THREADS = 4
SHARE = 0.5  # of the cache for what is in use and what is ahead
BUSY_S, FAILED_S = 0.2, 5.0  # until a shard is looked at again that another process is at, or that could not be read


@dataclass(frozen=True)
class Need:
    """A shard, by its number in the split, and the first and last batch of an epoch that may take images from it."""

    shard: int
    first: int
    last: int


def training_needs(plan: Plan, epoch: int, start: int, stop: int) -> list[Need]:
    """What a rank needs for an epoch, in the order of need; `start`, `stop`: its positions in each batch, as from `rank_slice`."""
    of_epoch, per_lane = plan.of_epoch(epoch), plan.global_batch // plan.lanes
    found = []
    for lane in range(start // per_lane, -(-stop // per_lane)):
        edges = of_epoch.block_edges(lane)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            first, last = ((place - lane * plan.lane_length) // per_lane for place in (low, high - 1))
            inside = slice(np.searchsorted(of_epoch.ends, low, side="right"), np.searchsorted(of_epoch.starts, high))
            if first < plan.n_batches:
                here = of_epoch.order[inside].tolist()
                found += [Need(shard, first, min(last, plan.n_batches - 1)) for shard in here]
    return sorted(found, key=lambda need: need.first)


def evaluation_needs(shard_sizes: Sequence[int] | np.ndarray, ranges: Sequence[tuple[int, int]]) -> list[Need]:
    """What a rank needs for its batches of a split in stored order, each the samples [start, stop)."""
    found: dict[int, Need] = {}
    edges = np.array(ranges, dtype=np.int64).reshape(-1, 2) - [0, 1]  # (batches, 2): first and last sample
    shards = locate_in_order(shard_sizes, edges.ravel())[0].reshape(-1, 2).tolist()
    for number, (low, high) in enumerate(shards):
        for shard in range(low, high + 1):
            found[shard] = Need(shard, found[shard].first if shard in found else number, number)
    return list(found.values())


class Ahead:
    """Threads that fetch what is needed next, while a loop tells how far it is."""

    def __init__(
        self, needs: list[Need], first: int, fetch: Callable[[int], bool], size: Callable[[int], int], room: float
    ):
        """Begin to fetch.

        Args:
            needs: in the order of need. first: the batch that the loop begins with. fetch: has a shard in the cache, unless another
                process is at it; whether it is there. size: bytes of a shard. room: bytes of the cache.
        """
        self._needs, self._batch = [need for need in needs if need.last >= first], first
        self._fetch, self._size, self._room = fetch, size, SHARE * room
        self._done: set[int] = set()  # places in the list that are fetched, or being fetched
        self._under_way: set[int] = set()  # places that are being fetched
        self._again: dict[int, float] = {}  # place: when to look at it again
        self._start = 0  # place of the first that is not behind the loop
        self._changed, self._over = threading.Condition(), False
        for _ in range(THREADS):
            threading.Thread(target=self._work, name="ahead", daemon=True).start()

    def reach(self, batch: int) -> None:
        """The loop has come to this batch."""
        with self._changed:
            self._batch = batch
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch nothing more; what is being fetched ends by itself."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (place := self._next()) is not None:
            there, pause = False, FAILED_S
            with suppress(OSError, ValueError):  # named where the shard is read
                there, pause = self._fetch(self._needs[place].shard), BUSY_S
            with self._changed:
                self._under_way.discard(place)
                if not there:
                    self._again[place] = time.monotonic() + pause
                    self._done.discard(place)
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The place of the next shard to fetch, once there is one; None at the end."""
        with self._changed:
            while not self._over:
                while self._start < len(self._needs) and self._needs[self._start].last < self._batch:
                    self._start += 1
                ahead, now = 0, time.monotonic()
                is_waited_for = any(self._needs[place].first <= self._batch for place in self._under_way)
                for place in range(self._start, len(self._needs)):
                    need = self._needs[place]
                    ahead += self._size(need.shard)
                    if need.first > self._batch and (ahead > self._room or is_waited_for):
                        break
                    if place not in self._done and self._again.get(place, 0.0) <= now:
                        self._done.add(place)
                        self._under_way.add(place)
                        return place
                self._changed.wait(BUSY_S if self._again else None)
            return None
