"""Reading behind a URL, through a cache, beside the same dataset on a disk.

In: parsed options, with the settings of a run whose `data.path` is a folder. Out: numbers by name. Invariants: what is compared runs in
turns, over the same batches; the cache is a temporary folder that begins empty.
"""

import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from harness.config import Config
from harness.data.loader import training_batches
from launch.bench.setup import training_input


def bench_remote(options: Namespace) -> dict:
    """Images/s of the loader from a folder, from an empty cache, and from a warm one."""
    config = options.config
    url = options.url or Path(config.data.path).resolve().as_uri()
    with tempfile.TemporaryDirectory() as cache:
        remote = replace(config, data=replace(config.data, path=url, cache_dir=cache))
        cold, waited = _epoch(remote, 0)
        local, warm = [], []
        for epoch in range(1, options.rounds + 1):  # the first of each verifies nothing anew: files are sealed
            local.append(_epoch(config, epoch)[0])
            warm.append(_epoch(remote, epoch)[0])
        kept = sum(path.stat().st_size for path in Path(cache).iterdir())
    return {
        "local_images_per_s": max(local),
        "warm_cache_images_per_s": max(warm),
        "warm / local": max(warm) / max(local),
        "empty_cache_images_per_s": cold,
        "empty_cache_waited_s": waited,
        "cached_mb": kept / 1e6,
        "images": sum(training_input(config)[0].shard_sizes),
    }


def _epoch(config: Config, epoch: int) -> tuple[float, float]:
    """Images/s of an epoch, its dataset opened before, and the seconds that its loop waited."""
    reader, plan, loader_options = training_input(config)
    began, images, waited = time.perf_counter(), 0, 0.0
    for batch in training_batches(reader, plan, epoch, 0, 0, 1, loader_options):
        images, waited = images + len(batch.keys), waited + batch.waited
    return images / (time.perf_counter() - began), waited
