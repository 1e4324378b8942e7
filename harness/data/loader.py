"""Batches on the device, decoded by threads ahead of time.

In: a `Store`, positions, and where each position is stored. Out: `Batch`es in the order asked for. What stays true: a
whole batch is one task (but for the first ones, which would come late), so threads rarely meet; the number of batches in
memory is bounded; a sample that cannot be decoded is named and fails the batch (or, where asked, counts for nothing); leaving
the loop early, for whatever reason, leaves no thread behind.
"""

import time
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from queue import Empty, SimpleQueue

import numpy as np
import torch

from harness.distributed.hardware import set_thread_device
from shards.image import decode_into
from shards.plan import Plan, evaluation_ranges, locate_in_order, rank_slice
from shards.reader import SplitReader


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    images: (b, 3, H, W) uint8, channels last in memory. labels: (b,) int64, -1 where skipped. positions: (b,) int64, places in the
    epoch's stream (training) or in the split (evaluation). keys: (b,) int64, the samples' keys.
    waited: seconds that the loop stood still for this batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    waited: float


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are read: decoding threads, batches under way, the device they go to, what to do with bad samples.

    skip: list that keys of samples that cannot be decoded are appended to, in place of failing; None means to fail.
    """

    threads: int
    prefetch: int
    device: torch.device
    skip: list | None = None


def training_batches(
    reader: SplitReader,
    plan: Plan,
    epoch: int,
    first: int,
    rank: int,
    world: int,
    options: LoaderOptions,
    group_size: int = 1,
) -> Iterator[Batch]:
    """A rank's share of the epoch's batches, from batch number `first` on; skipping costs nothing.

    Args:
        together: so many neighbours are on one rank, as in `plan.share`.
    """
    start, stop = rank_slice(plan.global_batch, rank, world, group_size)
    wanted = (
        np.arange(number * plan.global_batch + start, number * plan.global_batch + stop)
        for number in range(first, plan.n_batches)
    )
    return _load(reader, wanted, partial(plan.locate, epoch), options)


def evaluation_batches(
    reader: SplitReader, unit: int, rank: int, world: int, options: LoaderOptions
) -> Iterator[Batch]:
    """A rank's units of a split, each at most `unit` samples, in stored order; a bad sample always fails."""
    units = evaluation_ranges(sum(reader.shard_sizes), unit, rank, world)
    wanted = (np.arange(start, stop) for start, stop in units)
    return _load(reader, wanted, partial(locate_in_order, reader.shard_sizes), replace(options, skip=None))


def _load(
    reader: SplitReader, wanted: Iterable[np.ndarray], locate: Callable, options: LoaderOptions
) -> Iterator[Batch]:
    """Batches in order; on a GPU the next one is copied while the loop works on this one."""
    device, cuda = options.device, options.device.type == "cuda"
    stream = _copy_stream(device) if cuda else None
    under_way, copying, buffers = deque(), deque(), _Buffers()
    wanted = enumerate(wanted, start=1)
    decode = partial(_decode, reader, locate, options.skip is not None)
    pool = _Pool(options.threads, device)
    try:
        while True:
            while len(under_way) < max(options.prefetch, options.threads) and (entry := next(wanted, None)) is not None:
                number, positions = entry
                shape = (len(positions), reader.dataset.height, reader.dataset.width, 3)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if cuda else buffers.take(shape)
                # All threads share the first batches, so that these come soon: a half of them the second, a third ...
                parts = min(options.threads // number, len(positions) // 8)
                under_way.append(_begin(pool, decode, images, positions, max(1, parts)))
            waited = 0.0
            while under_way and (not copying or (cuda and len(copying) < 2 and under_way[0].is_decoded())):
                began = time.perf_counter()
                loaded = _finish(under_way.popleft(), options.skip)
                waited += time.perf_counter() - began
                with torch.cuda.stream(stream):  # does nothing without a GPU
                    moved = [tensor.to(device, non_blocking=True) for tensor in loaded]
                    copying.append((moved, stream.record_event() if cuda else None))
            if not copying:
                return
            (images, *numbers), copied = copying.popleft()
            if cuda:
                torch.cuda.current_stream(device).wait_event(copied)
                for tensor in (images, *numbers):
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield Batch(images.permute(0, 3, 1, 2), *numbers, waited)
    finally:
        pool.close()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to this GPU: torch keeps the memory of each stream apart, so a new one for each epoch took
    another 100 MB each time (batches of 64, 341x256), up to the 32 streams that torch hands out in turn."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _UnderWay:
    """A batch that threads decode: images (b, H, W, 3) uint8, positions (b,), and what will tell of each part of it."""

    images: torch.Tensor
    positions: np.ndarray
    parts: list[SimpleQueue]

    def is_decoded(self) -> bool:
        return not any(part.empty() for part in self.parts)


def _begin(pool: "_Pool", decode: Callable, images: torch.Tensor, positions: np.ndarray, parts: int) -> _UnderWay:
    """Have a batch decoded, in so many parts."""
    edges, pictures = np.linspace(0, len(positions), parts + 1).astype(int), images.numpy()
    tasks = [partial(decode, positions[start:stop], pictures[start:stop]) for start, stop in pairwise(edges)]
    return _UnderWay(images, positions, [pool.submit(task) for task in tasks])


def _finish(batch: _UnderWay, skip: list | None) -> tuple[torch.Tensor, ...]:
    """Wait for a batch: images (b, H, W, 3) uint8, labels, positions, keys.

    A skipped sample keeps its place, with the label -1 and a copy of a good picture of the batch (black if there is
    none), so that shapes, positions and the batch's statistics stay what they should be.
    """
    found = []
    for part in batch.parts:
        result, error = part.get()
        if error is not None:
            raise error
        found.append(result)
    labels, keys, is_bad = map(np.concatenate, zip(*found, strict=True))
    if is_bad.any():
        pictures = batch.images.numpy()
        pictures[is_bad] = 0 if is_bad.all() else pictures[np.argmin(is_bad)]
        labels[is_bad] = -1
        skip.extend(keys[is_bad].tolist())
    return batch.images, torch.from_numpy(labels), torch.from_numpy(batch.positions), torch.from_numpy(keys)


def _decode(
    reader: SplitReader, locate: Callable, skips: bool, positions: np.ndarray, pictures: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read and decode samples into `pictures`, (n, H, W, 3) uint8; their labels, keys, and which are bad, each (n,)."""
    shards, rows = locate(positions)
    is_bad = np.zeros(len(positions), bool)
    for place, data in reader.read(shards, rows):
        try:
            decode_into(data, pictures[place])
        except ValueError as error:
            if skips:
                is_bad[place] = True
                continue
            raise ValueError(
                f"Cannot decode {reader.describe(int(shards[place]), int(rows[place]))}: {error}. The shard was damaged after "
                f"packing: `python -m shards verify {reader.dataset.folder}` lists what to copy again."
            ) from error
    return *reader.labels_and_keys(shards, rows), is_bad


class _Pool:
    """Threads that work on tasks in the order given.

    Made of `SimpleQueue`s alone: they are written in C, so an interrupt (Ctrl-C) cannot come between taking a lock and
    noting that it is held. Inside the conditions of `concurrent.futures` it can, and closing then waits for ever. For the
    same reason the threads are bare ones: a `Thread` runs Python when it is forgotten, and an interrupt there is swallowed.
    """

    def __init__(self, threads: int, device: torch.device):
        """Start this many threads."""
        self._tasks, self._ended, self._threads = SimpleQueue(), SimpleQueue(), threads
        try:
            for _ in range(threads):
                start_new_thread(self._work, (device,))
        except BaseException:
            self._dismiss()
            raise

    def submit(self, task: Callable) -> SimpleQueue:
        """A queue that will hold one item: what the task returns and None, or None and the error that it raised."""
        done = SimpleQueue()
        self._tasks.put((task, done))
        return done

    def close(self) -> None:
        """Forget the tasks that no thread has begun, and wait for the others."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._dismiss()
        for _ in range(self._threads):
            self._ended.get()

    def _dismiss(self) -> None:
        for _ in range(self._threads):
            self._tasks.put(None)

    def _work(self, device: torch.device) -> None:
        ready = False
        while (entry := self._tasks.get()) is not None:
            task, done = entry
            try:
                if not ready:  # here, where an error reaches who waits for the task: a thread that dies answers nobody
                    set_thread_device(device)
                    ready = True
                done.put((task(), None))
            except BaseException as error:
                done.put((None, error))
            del entry, task, done  # not kept alive while this thread waits
        self._ended.put(None)


class _Buffers:
    """Memory for batches of pictures that comes back when nothing refers to the tensor any more.

    Fresh memory would be cleared by the kernel page by page, while the threads wait for each other.
    """

    def __init__(self):
        """Nothing is kept yet."""
        self._free, self._used = deque(), {}

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory of that shape, uint8."""
        try:
            back = self._free.popleft()
            memory = self._used.pop(id(back)).memory
        except IndexError:
            memory = np.empty(shape, np.uint8)
        if memory.shape != shape:  # the last unit of a split may be shorter
            memory = np.empty(shape, np.uint8)
        view = memory.view()
        # The callback is a method in C: an interrupt that came inside one in Python would be swallowed.
        lent = _Lent(view, self._free.append)
        lent.memory = memory
        self._used[id(lent)] = lent
        return torch.from_numpy(view)


class _Lent(weakref.ref):
    """A reference to a view, with the memory that it looks at."""

    __slots__ = ("memory",)
