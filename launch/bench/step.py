"""On the device: an optimizer step, its augmentation, the real loop, evaluation, a checkpoint.

In: parsed options, with the settings of a run. Out: numbers by name. Invariants: clocks wait for the device; ratios are
of loops that ran in turns.
"""

import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from harness.evaluation.predict import predict
from harness.run.checkpoint import save_step, snapshots
from harness.run.progress import Progress
from harness.run.provenance import Provenance
from launch.bench.setup import Trial, gradient_bytes, seconds_of
from shards.index import load
from shards.reader import SplitReader


def bench_step(options: Namespace) -> dict:
    """Milliseconds of an optimizer step on a batch in memory, and of its augmentation; images/s and batch of all processes."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    views = trial.view(batch)
    step = min(seconds_of(lambda: trial.step(views, batch.labels), trial.world) for _ in range(options.rounds * 3))
    augment = min(seconds_of(lambda: trial.view(batch), trial.world) for _ in range(options.rounds * 3))
    n = options.config.data.global_batch_size
    return {
        "step_ms": 1e3 * step,
        "step_images_per_s": n / step,
        "augment_ms": 1e3 * augment,
        "augment_share_of_step": augment / step,
        "batch": n,
        "processes": trial.world.size,
        "model": options.config.model.name,
        "gradient_bytes": gradient_bytes(trial.model),
        "setting": trial.describe(),
    }


def bench_augment(options: Namespace) -> dict:
    """Milliseconds of augmentation for a batch in memory, and images/s."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    seconds = min(seconds_of(lambda: trial.view(batch), trial.world) for _ in range(options.rounds * 3))
    return {
        "augment_ms": 1e3 * seconds,
        "images_per_s": options.config.data.global_batch_size / seconds,
        "setting": trial.describe(),
    }


def bench_train(options: Namespace) -> dict:
    """The real loop (read, decode, augment, step) and its ratio to steps on a batch in memory, in turns.

    Between the two: the same steps beside the decoding threads, which tells what these cost them.
    """
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    views = trial.view(batch)
    n = min(options.batches, trial.plan.n_batches)
    waited = []

    def synthetic(epoch: int) -> None:
        for _ in range(n):
            trial.step(views, batch.labels)

    def beside_decoding(epoch: int) -> None:
        for _ in islice(trial.batches(epoch), n):
            trial.step(views, batch.labels)

    def real(epoch: int) -> None:
        for loaded in islice(trial.batches(epoch), n):
            waited.append(loaded.waited)
            trial.step(trial.view(loaded), loaded.labels)

    loops = {"step": synthetic, "step_beside_decoding": beside_decoding, "train": real}
    found = {name: [] for name in loops}
    for epoch in range(options.rounds):
        for name, loop in loops.items():
            found[name].append(seconds_of(partial(loop, epoch), trial.world))
    best = {name: n * options.config.data.global_batch_size / min(seconds) for name, seconds in found.items()}

    def ratio(name: str) -> float:
        # Within each round: on a shared machine, the best of each are from different minutes.
        return float(np.median(np.divide(found["step"], found[name])))

    return {f"{name}_images_per_s": fastest for name, fastest in best.items()} | {
        "step_beside_decoding_ratio": ratio("step_beside_decoding"),
        "ratio": ratio("train"),
        "waiting_for_data": sum(waited) / sum(found["train"]),
        "setting": trial.describe(),
    }


def bench_evaluate(options: Namespace) -> dict:
    """Seconds to evaluate the validation split with one view and with eight."""
    trial = Trial(options.config)
    reader = SplitReader(load(options.config.data.path, options.config.data.access), "val")
    seconds = {"none": [], "dihedral8": []}
    for _ in range(options.rounds):
        for views, found in seconds.items():
            config = replace(options.config, eval=replace(options.config.eval, views=views))
            once = partial(predict, trial.model, reader, reader.dataset.classes, config, trial.world)
            found.append(seconds_of(once, trial.world))
    n, one, eight = sum(reader.shard_sizes), min(seconds["none"]), min(seconds["dihedral8"])
    return {
        "images": n,
        "one_view_s": one,
        "eight_views_s": eight,
        "ratio": eight / one,
        "one_view_images_per_s": n / one,
        "setting": trial.describe(),
    }


def bench_save(options: Namespace) -> dict:
    """Seconds of a checkpoint: of its copy on the host, which all ranks wait for, and of writing it, beside the training."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    trial.step(trial.view(batch), batch.labels)  # the optimizer has its state from here on
    provenance = Provenance(options.config.model.name, ("a",), "", np.zeros(0, np.uint64), "")
    written, copied, taken = [], [], []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for step in range(1, options.rounds + 1):
            began = time.perf_counter()
            taken = snapshots((trial.model, trial.optimizer, trial.world.scaler), taken)
            copied.append(time.perf_counter() - began)
            save = partial(save_step, Path(scratch), Progress(step=step), provenance, *taken, 2)
            written.append(seconds_of(save, trial.world))
        size = sum(path.stat().st_size for path in Path(scratch).rglob(f"step-{options.rounds:08d}/*"))
    between = 60 * options.config.run.save_every_minutes
    return {
        "checkpoint_mb": size / 1e6,
        "first_copy_ms": 1e3 * copied[0],
        "copy_ms": 1e3 * min(copied[1:] or copied),
        "save_s": min(written),
        "slowest_save_s": max(written),
        "share_of_the_time": min(copied) / (between + min(copied)),
        "setting": f"{trial.describe()}, saved every {options.config.run.save_every_minutes} minutes",
    }
