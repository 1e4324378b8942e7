"""Batches on the device, decoded by threads ahead of time.

In: a `Store`, positions, and where each position is stored. Out: `Batch`es in the order asked for. What stays true: a
whole batch is one task, so threads rarely meet; the number of batches in memory is bounded; a sample that cannot be
decoded is named and fails the batch; leaving the loop early, for whatever reason, leaves no thread behind.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from shards.image import decode_into
from shards.plan import Plan, evaluation_units, locate_in_order, share
from shards.store import Store


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    images: (b, 3, H, W) uint8, channels last in memory. labels: (b,) int64. positions: (b,) int64, places in the
    epoch's stream (training) or in the split (evaluation). keys: (b,) int64, the samples' keys.
    waited: seconds that the loop stood still for this batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    waited: float


def training_batches(
    store: Store,
    plan: Plan,
    epoch: int,
    first: int,
    rank: int,
    world: int,
    device: torch.device,
    threads: int,
    ahead: int,
) -> Iterator[Batch]:
    """A rank's share of the epoch's batches, from batch number `first` on; skipping costs nothing."""
    start, stop = share(plan.global_batch, rank, world)
    wanted = (
        np.arange(number * plan.global_batch + start, number * plan.global_batch + stop)
        for number in range(first, plan.n_batches)
    )
    return _load(store, wanted, partial(plan.locate, epoch), device, threads, ahead)


def evaluation_batches(
    store: Store, unit: int, rank: int, world: int, device: torch.device, threads: int, ahead: int
) -> Iterator[Batch]:
    """A rank's units of a split, each at most `unit` samples, in stored order."""
    units = evaluation_units(sum(store.shard_sizes), unit, rank, world)
    wanted = (np.arange(start, stop) for start, stop in units)
    return _load(store, wanted, partial(locate_in_order, store.shard_sizes), device, threads, ahead)


def _load(
    store: Store, wanted: Iterable[np.ndarray], locate: Callable, device: torch.device, threads: int, ahead: int
) -> Iterator[Batch]:
    pin = device.type == "cuda"  # a copy from pinned memory does not hold up the loop
    wanted, waiting = iter(wanted), deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        while True:
            while len(waiting) < max(ahead, threads) and (positions := next(wanted, None)) is not None:
                waiting.append(pool.submit(_decode, store, locate, positions, pin))
            if not waiting:
                return
            began = time.perf_counter()
            images, *numbers = waiting.popleft().result()
            waited = time.perf_counter() - began
            images, *numbers = (tensor.to(device, non_blocking=True) for tensor in (images, *numbers))
            yield Batch(images.permute(0, 3, 1, 2), *numbers, waited)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(store: Store, locate: Callable, positions: np.ndarray, pin: bool) -> tuple[torch.Tensor, ...]:
    """Read and decode one batch: images (b, H, W, 3) uint8, labels, positions, keys."""
    shards, rows = locate(positions)
    shape = (len(positions), store.dataset.height, store.dataset.width, 3)
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
    pictures = images.numpy()
    for place, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
        try:
            decode_into(store.read(shard, row), pictures[place])
        except ValueError as error:
            raise ValueError(
                f"Cannot decode {store.name(shard, row)}: {error}. The shard was damaged after packing: "
                f"`python -m shards verify {store.dataset.folder}` lists what to copy again."
            ) from error
    labels, keys = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for shard in np.unique(shards):
        here, table = shards == shard, store.table(int(shard))
        labels[here], keys[here] = table.label[rows[here]], table.key[rows[here]]
    return images, torch.from_numpy(labels), torch.from_numpy(positions), torch.from_numpy(keys)
