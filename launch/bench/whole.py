"""A whole run on this machine, validation and checkpoints included, beside steps on a batch in memory.

In: parsed options, with the settings of a run. Out: numbers by name. Invariants: the run is that of `launch/train.py`, into a folder of
its own that is removed; its first epoch, in which kernels are chosen and caches filled, is not counted.
"""

import logging
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from harness.config import Config
from harness.data.loader import Batch
from harness.distributed.world import World
from harness.run.console import LOGGER
from harness.training.train import train
from launch.bench.setup import Trial, seconds_of

SAMPLE_S = 0.1  # between two looks at the GPU


def bench_run(options: Namespace) -> dict:
    """Images/s of `--rounds` whole epochs after a first one, and their share of steps on a batch in memory."""
    world, n_images, found = bench_steps_alone(options)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with (
        tempfile.TemporaryDirectory(dir=options.scratch) as scratch,
        EpochClock() as clock,
        gpu_watched(world.device) as busy,
    ):
        outcome = train(whole_run(options.config, Path(scratch) / "run", options.rounds + 1), world)
    if outcome != "finished":
        raise ValueError("The run was asked to stop before its end: nothing was measured.")
    seconds = (clock.times[-1] - clock.times[0]) / options.rounds
    whole = n_images / seconds
    ratio = whole / found["steps_alone_images_per_s"]
    found |= {"epoch_s": seconds, "whole_run_images_per_s": whole, "ratio": ratio}
    if busy:
        found["gpu_busy_percent"] = sum(busy) / len(busy)
    if world.device.type == "cuda":
        found["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def bench_steps_alone(options: Namespace) -> tuple[World, int, dict]:
    """The world, images of an epoch, and images/s of steps on a batch in memory, which is free again afterwards."""
    trial = Trial(options.config)
    if trial.world.size > 1:
        raise ValueError("This benchmark measures one process: start it with `python -m launch.bench run`.")
    batch = next(iter(trial.batches(0)))
    views, n = trial.view(batch), min(40, trial.plan.n_batches)

    def steps() -> None:
        for _ in range(n):
            trial.step(views, batch.labels)

    alone = max(n * trial.plan.global_batch / seconds_of(steps, trial.world) for _ in range(options.rounds + 1))
    found = {"setting": trial.describe(), "steps_alone_images_per_s": alone} | count_launches(trial, batch)
    return trial.world, trial.plan.n_batches * trial.plan.global_batch, found


def whole_run(config: Config, folder: Path, epochs: int) -> Config:
    """The settings of a run that trains so many epochs and evaluates on validation with one view."""
    warmup, freeze = (min(number, epochs) for number in (config.optim.warmup_epochs, config.optim.freeze_epochs))
    return replace(
        config,
        run=replace(
            config.run, folder=str(folder), epochs=epochs, patience=epochs, time_limit_minutes=0.0, checkpoint_dir=""
        ),
        optim=replace(config.optim, warmup_epochs=warmup, freeze_epochs=freeze),
        eval=replace(config.eval, split="val", views="none", subgroups=(), positive_classes=()),
    )


class EpochClock(logging.Handler):
    """Notes when each epoch is said to be over: it is validated then, and its checkpoint is about to be begun."""

    def __init__(self):
        super().__init__()
        self.times: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line of the run."""
        if record.getMessage().startswith("epoch "):
            self.times.append(record.created)

    def __enter__(self) -> "EpochClock":
        self._level = LOGGER.level
        LOGGER.setLevel(logging.INFO)
        LOGGER.addHandler(self)
        return self

    def __exit__(self, *error) -> None:
        LOGGER.removeHandler(self)
        LOGGER.setLevel(self._level)


def count_launches(trial: Trial, batch: Batch) -> dict:
    """What one step asks of the GPU, augmentation included: kernels and graphs launched; nothing without one."""
    if trial.world.device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trial.step(trial.view(batch), batch.labels)
        trial.world.synchronize()
    names = {"launches": ("cudaLaunchKernel", "cuLaunchKernel"), "graph_launches": ("cudaGraphLaunch",)}
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        f"{name}_per_step": sum(count for key, count in counts.items() if key.startswith(kinds))
        for name, kinds in names.items()
    }


@contextmanager
def gpu_watched(device: torch.device) -> Iterator[list[float]]:
    """Inside, samples of the GPU's utilisation in percent are taken, where NVIDIA's library for it is installed."""
    samples, over = [], threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_S):
            try:
                samples.append(float(torch.cuda.utilization(device)))
            except (ModuleNotFoundError, RuntimeError):
                return

    thread = threading.Thread(target=look, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield samples
    finally:
        over.set()
        if thread.is_alive():
            thread.join()
