"""Batches on the device, decoded by threads ahead of time.

In: an `ImageReader`, positions, and where each position is stored. Out: `Batch`es in the order asked for. Invariants: a
whole batch is one task (but for the first ones, which would come late), so threads rarely contend; the number of batches
in memory is bounded; what is kept of decoded images is not decoded again, and is the same; a sample that cannot be decoded is named and fails the batch (or, where asked, is ignored); leaving
the loop early, for whatever reason, leaves no thread behind.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np
import torch

from harness.data.decoded import DecodedCache
from harness.data.decoding import Locate, decode_part
from harness.data.threads import Buffers, TaskThreads
from shards.ahead import Ahead, Need, evaluation_needs, training_needs
from shards.plan import Plan, evaluation_ranges, locate_in_order, rank_slice
from shards.reader import ImageReader

SIGN_S = 1.0  # between two signs of work


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    images: (b, 3, H, W) uint8, channels last in memory, and labels: (b,) int64, -1 where the sample is ignored, are on the device.
    positions: (b,) int64, places in the epoch's stream (training) or in the split (evaluation), and keys: (b,) int64, the samples'
    keys, stay on the host. waited: seconds that the loop stood still for this batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    waited: float


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are read."""

    threads: int
    """decoding threads"""
    prefetch: int
    """batches decoded ahead of the one in use; at least one a thread"""
    device: torch.device
    """where batches go"""
    bad_keys: list[int] | None = None
    """list that keys of training samples that cannot be decoded are appended to; None: such a sample fails its batch"""
    decoded: DecodedCache | None = None
    """where training images are kept once they are decoded"""
    works: Callable[[], None] = lambda: None
    """called now and then while a batch waits for a download, so that nobody takes this rank for stuck"""


def training_batches(
    reader: ImageReader,
    plan: Plan,
    epoch: int,
    first: int,
    rank: int,
    world_size: int,
    options: LoaderOptions,
    group_size: int = 1,
) -> Generator[Batch, None, None]:
    """A rank's share of the epoch's batches, from batch number `first` on; skipping costs nothing.

    Close it (`.close()`) when leaving before its end: that ends its threads.

    Args:
        group_size: so many neighbours of the stream are on one rank, as in `rank_slice`.

    Raises:
        ValueError: more ranks than images in a batch; while iterating, a sample that cannot be decoded, by name.
    """
    start, stop = rank_slice(plan.global_batch, rank, world_size, group_size)
    wanted = (
        np.arange(number * plan.global_batch + start, number * plan.global_batch + stop)
        for number in range(first, plan.n_batches)
    )

    def needs() -> list[Need]:
        """Of this epoch and the next: its first shards come while this one ends."""
        here, then = (training_needs(plan, number, start, stop) for number in (epoch, epoch + 1))
        later = [Need(need.shard, need.first + plan.n_batches, need.last + plan.n_batches) for need in then]
        kept = options.decoded
        return [need for need in here + later if kept is None or not kept.has_shard(need.shard)]

    return _load(reader, wanted, partial(plan.locate, epoch), options, needs, first)


def evaluation_batches(
    reader: ImageReader,
    batch_size: int,
    rank: int,
    world_size: int,
    options: LoaderOptions,
    bad_keys: list[int] | None = None,
) -> Generator[Batch, None, None]:
    """A rank's batches of a split, each of at most `batch_size` samples, in stored order.

    Close it (`.close()`) when leaving before its end: that ends its threads.

    Raises:
        ValueError: while iterating, a sample that cannot be decoded, by name: none is left out of an evaluation, whatever the
            options say. Only where `bad_keys` is a list, its key goes there instead.
    """
    sizes = np.array(reader.shard_sizes, dtype=np.int64)
    ranges = evaluation_ranges(int(sizes.sum()), batch_size, rank, world_size)
    wanted = (np.arange(start, stop) for start, stop in ranges)
    locate, needs = partial(locate_in_order, sizes), partial(evaluation_needs, sizes, ranges)
    options = replace(options, bad_keys=bad_keys, decoded=None)  # that is of the training split
    return _load(reader, wanted, locate, options, needs, 0)


def _load(
    reader: ImageReader,
    wanted: Iterable[np.ndarray],
    locate: Locate,
    options: LoaderOptions,
    needs: Callable[[], list[Need]],
    first: int,
) -> Generator[Batch, None, None]:
    """Batches in order, through three queues; on a GPU the next one is copied while the loop works on this one.

    wanted --------> decoding ------------------> copying --------------------> the loop
    positions (b,)   up to max(prefetch,          the batch that comes next;    1 batch
                     threads) batches, each in    on a GPU up to 2, copied on
                     memory of its own            a stream of their own
    """
    device, cuda = options.device, options.device.type == "cuda"
    stream = _copy_stream(device) if cuda else None
    decoding, copying, buffers = deque(), deque(), Buffers()
    numbered, ahead = enumerate(wanted, start=1), max(options.prefetch, options.threads)
    decode = partial(decode_part, reader, locate, options.bad_keys is not None, options.decoded)
    threads = TaskThreads(options.threads, device)
    downloads: Ahead | None = None
    try:
        downloads = reader.fetch_ahead(needs, first)
        while True:
            while len(decoding) < ahead and (entry := next(numbered, None)) is not None:
                number, positions = entry
                if downloads:
                    downloads.reach(first + number - 1)
                shape = (len(positions), reader.height, reader.width, 3)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=True) if cuda else buffers.take(shape)
                # All threads share the first batches, so that these come soon: a half of them the second, a third ...
                parts = min(options.threads // number, len(positions) // 8)
                decoding.append(_start_decoding(threads, decode, images, positions, max(1, parts)))
            waited = 0.0
            while decoding and (not copying or (cuda and len(copying) < 2 and decoding[0].is_done())):
                began = time.perf_counter()
                decoded = _wait_for(decoding.popleft(), reader, options)
                waited += time.perf_counter() - began
                with torch.cuda.stream(stream):  # does nothing without a GPU
                    images, labels = _move(decoded, options)
                    copied = stream.record_event() if stream is not None else None
                copying.append((images, labels, decoded.positions, decoded.keys, copied))
            if not copying:
                return
            images, labels, positions, keys, copied = copying.popleft()
            if cuda:
                torch.cuda.current_stream(device).wait_event(copied)
                for tensor in (images, labels):
                    tensor.record_stream(torch.cuda.current_stream(device))
            yield Batch(images.permute(0, 3, 1, 2), labels, positions, keys, waited)
    finally:
        if downloads:
            downloads.close()
        threads.close()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to this GPU: torch keeps the memory of each stream apart, so a new one for each epoch took
    another 100 MB each time (batches of 64, 341x256), up to the 32 streams that torch hands out in turn."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Decoding:
    """A batch that threads decode: images (b, H, W, 3) uint8, positions (b,), and a queue for each part's result."""

    images: torch.Tensor
    positions: np.ndarray
    parts: list[SimpleQueue]

    def is_done(self) -> bool:
        return not any(part.empty() for part in self.parts)


def _start_decoding(
    threads: TaskThreads, decode: Callable, images: torch.Tensor, positions: np.ndarray, parts: int
) -> _Decoding:
    """Have a batch decoded into `images`, in so many parts."""
    edges, pixels = np.linspace(0, len(positions), parts + 1).astype(int), images.numpy()
    tasks = [partial(decode, positions[start:stop], pixels[start:stop]) for start, stop in pairwise(edges)]
    return _Decoding(images, positions, [threads.submit(task) for task in tasks])


class _Decoded(NamedTuple):
    """A batch on the host: images (b, H, W, 3) uint8, of which those that are kept on a GPU are missing; the rest (b,) each."""

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    places: np.ndarray
    is_kept: np.ndarray


def _wait_for(batch: _Decoding, reader: ImageReader, options: LoaderOptions) -> _Decoded:
    """Wait for a batch.

    An ignored sample keeps its place, with the label -1 and a copy of a good image of the batch (black if there is none),
    so that shapes, positions and the batch's statistics stay what they should be.
    """
    found, bad_keys = [], options.bad_keys
    for part in batch.parts:
        result, error = _get(part, reader, options)
        if error is not None:
            raise error
        found.append(result)
    labels, keys, is_bad, places, is_kept = map(np.concatenate, zip(*found, strict=True))
    if bad_keys is not None and is_bad.any():
        pixels, good = batch.images.numpy(), np.argmin(is_bad)
        pixels[is_bad] = 0 if is_bad.all() else pixels[good]
        places[is_bad], is_kept[is_bad] = (-1, False) if is_bad.all() else (places[good], is_kept[good])
        labels[is_bad] = -1
        bad_keys.extend(keys[is_bad].tolist())
    numbers = (torch.from_numpy(labels), torch.from_numpy(batch.positions), torch.from_numpy(keys))
    return _Decoded(batch.images, *numbers, places, is_kept)


def _move(decoded: _Decoded, options: LoaderOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels on the device; images that a GPU keeps are gathered there."""
    cache, images = options.decoded, decoded.images
    if cache is not None and cache.device is not None and (decoded.places >= 0).all():
        images = cache.exchange(decoded.places, decoded.is_kept, images)
    labels = decoded.labels.pin_memory() if options.device.type == "cuda" else decoded.labels
    return images.to(options.device, non_blocking=True), labels.to(options.device, non_blocking=True)


def _get(part: SimpleQueue, reader: ImageReader, options: LoaderOptions) -> tuple:
    """What a thread answers, with signs of work while it waits for a download (which ends by its own limit of time)."""
    while True:
        try:
            return part.get(timeout=SIGN_S)
        except Empty:
            if reader.is_reading:
                options.works()
