"""Reading behind a URL, through a cache, beside the same dataset on a disk, and beside other packages behind the same server.

In: parsed options, with the settings of a run whose `data.path` is a folder. Out: numbers by name. Invariants: what is compared runs in
turns; a cache is a temporary folder that begins empty; an epoch counts only if each image came once, and whole.
"""

import gc
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import torch

from harness.config import Config
from harness.data.loader import training_batches
from launch.bench.baselines import decode
from launch.bench.setup import training_input
from launch.bench.streamed import Epoch, Reading, Sample, stored_samples, uploaded
from shards.reader import SplitReader

OURS = "this harness"


@dataclass(frozen=True)
class Cost:
    """Of an epoch: images/s, and milliseconds of all CPUs for an image, which other programs of the machine change less."""

    images_per_s: float
    cpu_ms: float


def bench_remote(options: Namespace) -> dict:
    """Images/s of the loader from a folder, from an empty cache, and from a warm one; with `--peers`, of other packages, too."""
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
    numbers = {
        "local_images_per_s": max(local),
        "warm_cache_images_per_s": max(warm),
        "warm / local": max(warm) / max(local),
        "empty_cache_images_per_s": cold,
        "empty_cache_waited_s": waited,
        "cached_mb": kept / 1e6,
        "images": sum(training_input(config)[0].shard_sizes),
    }
    return numbers | ({"pipelines": _beside_peers(config, url, options.peers, options.rounds)} if options.peers else {})


def _epoch(config: Config, epoch: int) -> tuple[float, float]:
    """Images/s of an epoch, its dataset opened before, and the seconds that its loop waited."""
    reader, plan, loader_options = training_input(config)
    began, images, waited = time.perf_counter(), 0, 0.0
    for batch in training_batches(reader, plan, epoch, 0, 0, 1, loader_options):
        images, waited = images + len(batch.keys), waited + batch.waited
    return images / (time.perf_counter() - began), waited


def _beside_peers(config: Config, url: str, place: str, rounds: int) -> list[dict]:
    """A row for this harness and for each package: its first epoch, with an empty cache, and its second."""
    reader, plan, loader_options = training_input(config)
    prefetch = max(2, -(-loader_options.prefetch // loader_options.threads))  # in all no fewer than ours
    reading = Reading(loader_options.threads, plan.global_batch, prefetch)
    with tempfile.TemporaryDirectory() as scratch, uploaded(reader, place, Path(scratch), reading) as peers:
        samples = stored_samples(reader)
        for name, open_empty in peers.items():  # a warm-up, too
            with tempfile.TemporaryDirectory() as cache:
                check_pixels(name, open_empty(Path(cache))(), samples)
        pipelines: dict[str, Callable[[Path], Epoch]] = {OURS: partial(_open_ours, config, url), **peers}
        found: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in pipelines}
        for _ in range(rounds):
            for name, open_empty in pipelines.items():
                expected = plan.n_batches * plan.global_batch if name == OURS else len(samples)
                with tempfile.TemporaryDirectory() as cache:
                    epoch = open_empty(Path(cache))
                    found[name].append((_cost(name, epoch, reader, expected), _cost(name, epoch, reader, expected)))
                    del epoch
                    gc.collect()  # its worker processes end before the next is measured
    return _rows(found)


def _rows(found: dict[str, list[tuple[Cost, Cost]]]) -> list[dict]:
    """The best of all rounds, and how many times as fast ours is."""
    rows: list[dict] = [{"pipeline": name} for name in found]
    for number, cache in enumerate(("empty", "warm")):
        rates = [max(costs[number].images_per_s for costs in rounds) for rounds in found.values()]
        works = [min(costs[number].cpu_ms for costs in rounds) for rounds in found.values()]
        for row, rate, work in zip(rows, rates, works, strict=True):
            row |= {f"{cache}_cache_images_per_s": rate, f"ours / it, {cache}": rates[0] / rate}
            row[f"{cache}_cpu_ms"] = work
    return rows


def _open_ours(config: Config, url: str, cache: Path) -> Epoch:
    """This harness, as in a run that begins with an empty cache."""
    remote = replace(config, data=replace(config.data, path=url, cache_dir=str(cache)))
    reader, plan, loader_options = training_input(remote)
    numbers = count()

    def epoch():
        for batch in training_batches(reader, plan, next(numbers), 0, 0, 1, loader_options):
            yield batch.images, batch.keys

    return epoch


def _cost(name: str, epoch: Epoch, reader: SplitReader, expected: int) -> Cost:
    """Of one epoch, from before its threads or workers begin until its last batch is there.

    Raises:
        ValueError: an image came twice, or is missing, or has another size.
    """
    keys: list[int] = []
    n_bytes, cpu, began = 0, _cpu_s(), time.perf_counter()
    for images, numbers in epoch():
        n_bytes += images.nbytes
        keys += numbers.tolist()
    seconds, cpu = time.perf_counter() - began, _cpu_s() - cpu
    check_once(name, keys, expected)
    if n_bytes != expected * reader.height * reader.width * 3:
        raise ValueError(f"{name} decoded {n_bytes} bytes of {expected} images of {reader.width}x{reader.height}.")
    return Cost(expected / seconds, 1e3 * cpu / expected)


def _cpu_s() -> float:
    """CPU seconds of this process and of its workers so far."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children()))


def check_once(name: str, keys: list[int], expected: int) -> None:
    """Whether an epoch had so many images, each once.

    Raises:
        ValueError: it had not.
    """
    if (len(keys), len(set(keys))) != (expected, expected):
        raise ValueError(
            f"{name} gave {len(keys)} images, {len(set(keys))} different ones, instead of each of {expected} once."
        )


def check_pixels(name: str, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], samples: list[Sample]) -> None:
    """Whether an epoch had each image once, with the pixels that its stored bytes have for torchvision.

    Raises:
        ValueError: it had not.
    """
    wanted = {key: data for data, _, key in samples}
    seen: list[int] = []
    for images, keys in batches:
        for image, key in zip(images, keys.tolist(), strict=True):
            if key not in wanted or _checksum(image) != _checksum(decode(wanted[key])):
                raise ValueError(f"{name} gave other pixels for the image {key} than what was packed.")
            seen.append(key)
    check_once(name, seen, len(samples))


def _checksum(image: torch.Tensor) -> int:
    return zlib.crc32(image.numpy().tobytes())
