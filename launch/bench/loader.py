"""Reading and decoding: images/s of the loader, milliseconds to its first batch, other input pipelines beside it.

In: parsed options, with the settings of a run. Out: numbers by name. Invariants: what is compared runs in turns.
"""

import mmap
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from harness.data.augment import training_view
from harness.data.decoded import DecodedCache, nbytes_of
from harness.data.loader import LoaderOptions, training_batches
from launch.bench import baselines
from launch.bench.setup import rate, training_input


def bench_loader(options: Namespace) -> dict:
    """Images/s of the loader alone, with all decoded images kept, and of threads that decode the same ones from memory and do nothing else."""
    reader, plan, loader_options = training_input(options.config)
    shape = reader.shard_sizes, reader.height, reader.width
    cache = DecodedCache(*shape, memoryview(mmap.mmap(-1, nbytes_of(*shape))))
    keeping = replace(loader_options, decoded=cache)
    blobs = baselines.all_images(reader)
    ours, kept, ceiling = [], [], []

    def sizes(epoch: int, how: LoaderOptions) -> Iterator[int]:
        for batch in training_batches(reader, plan, epoch, 0, 0, 1, how):
            yield len(batch.keys)

    for epoch in range(2):  # what one leaves out, the next one has
        rate(sizes(epoch, keeping))
    for epoch in range(options.rounds):
        ours.append(rate(sizes(epoch, loader_options)))
        kept.append(rate(sizes(epoch, keeping)))
        ceiling.append(baselines.decode_from_memory(blobs, reader, loader_options.threads, plan.global_batch))
    return {
        "images_per_s": max(ours),
        "images_per_s_and_thread": max(ours) / loader_options.threads,
        "kept_images_per_s": max(kept),
        "kept_ratio": float(np.median(np.divide(kept, ours))),
        "decode_ceiling_images_per_s": max(ceiling),
        "share_of_the_ceiling": max(ours) / max(ceiling),
        "threads": loader_options.threads,
    }


def bench_resume(options: Namespace) -> dict:
    """Milliseconds to the first batch, at the start of an epoch and when resuming in its middle; in turns."""
    n_batches = training_input(options.config)[1].n_batches
    found = {"start": [], "middle": []}
    for turn in range(2 * options.rounds):
        # Nothing is remembered: each turn has its own reader, and its own epoch.
        reader, plan, loader_options = training_input(options.config)
        first = 0 if turn % 2 == 0 else n_batches // 2
        batches = training_batches(reader, plan, turn, first, 0, 1, loader_options)
        began = time.perf_counter()
        next(batches)
        found["middle" if first else "start"].append(time.perf_counter() - began)
        batches.close()
    start, middle = (sorted(times)[len(times) // 2] for times in found.values())
    return {"start_ms": 1e3 * start, "middle_ms": 1e3 * middle, "ratio": middle / start, "batches": n_batches}


def bench_compare(options: Namespace) -> dict:
    """Images/s of the notebook's pipeline, of a DataLoader over WebDataset, of others that are installed, and of ours."""
    config = options.config
    reader, plan, loader_options = training_input(config)

    def ours(augment: bool) -> Iterator[int]:
        for batch in training_batches(reader, plan, 0, 0, 0, 1, loader_options):
            if augment:
                training_view(batch.images, batch.positions, 0, 0, config.augment, config.data.image_size)
            yield len(batch.keys)

    with tempfile.TemporaryDirectory() as scratch:
        pipelines = {"ours": lambda: ours(False), "ours, augmented on the CPU": lambda: ours(True)}
        pipelines |= baselines.pipelines(reader, options.source, Path(scratch))
        rates: dict[str, list[float]] = {name: [] for name in pipelines}
        for _ in range(options.rounds):  # in turns, so that a slow minute of the machine hits all
            for name, pipeline in pipelines.items():
                rates[name].append(rate(pipeline()))
    best = {name: max(found) for name, found in rates.items()}
    ratios = {f"ours / {name}": best["ours"] / found for name, found in best.items() if found and name[:4] != "ours"}
    return best | ratios
