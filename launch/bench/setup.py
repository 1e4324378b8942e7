"""What the benchmarks measure with: a model and its input as in training, and clocks that wait for the device.

In: the settings of a run. Out: a `Trial` to step with, a reader with its plan, rates and seconds. Invariants: it is built
and read as in training.
"""

import argparse
import time
from collections.abc import Callable, Generator, Iterable

import torch

from harness.config import Config
from harness.data.augment import training_view
from harness.data.loader import Batch, LoaderOptions, training_batches
from harness.distributed.hardware import decode_threads, set_arithmetic
from harness.distributed.world import World
from harness.model.build import build_model
from harness.model.loss import Loss, Targets
from harness.model.optim import build_optimizer
from harness.training.cache import open_cache
from harness.training.state import TrainState
from harness.training.step import optimizer_step
from shards.index import load
from shards.plan import Plan
from shards.reader import SplitReader


class Trial:
    """A model, its optimizer and its input, ready to step."""

    def __init__(self, config: Config):
        """Build everything from the settings of a run."""
        set_arithmetic(config.run.tf32, config.run.deterministic)
        self.config, self.world = config, World(config.run.precision, config.run.channels_last)
        self.reader, self.plan, self.options = training_input(config, self.world)
        torch.manual_seed(config.run.seed)
        self.model = build_model(config.model.name, len(self.reader.dataset.classes))
        # torch's stub of `Module.to` lacks the memory format.
        self.model.to(self.world.device, memory_format=self.world.memory_format)  # pyright: ignore[reportCallIssue]
        counts = self.reader.dataset.description.counts["train"]
        loss_fn = Loss(config.optim, counts, self.world.device)
        mode = config.run.compile_mode if config.run.compile else None
        ddp_model, self.optimizer = self.world.prepare(self.model, build_optimizer(self.model, config.optim), mode)
        self.state = TrainState(model=self.model, ddp_model=ddp_model, optimizer=self.optimizer, loss_fn=loss_fn)

    def batches(self, epoch: int) -> Generator[Batch, None, None]:
        """An epoch's batches on the device."""
        return training_batches(self.reader, self.plan, epoch, 0, self.world.rank, self.world.size, self.options)

    def view(self, batch: Batch) -> torch.Tensor:
        """Augmented, (b, 3, S, S) float32."""
        return training_view(batch.images, batch.positions, 0, 0, self.config.augment, self.config.data.image_size)

    def step(self, views: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimizer step."""
        self.model.train()
        optimizer_step(self.config, self.world, self.state, views, Targets(labels), 1e-4)

    def describe(self) -> str:
        """The setting, human-readable."""
        data = self.config.data
        compiled = f", compiled ({self.config.run.compile_mode})" if self.config.run.compile else ""
        return f"{self.config.model.name}, {data.image_size} px, batch {data.global_batch_size}, {self.world.precision}{compiled}"


def training_input(config: Config, world: World | None = None) -> tuple[SplitReader, Plan, LoaderOptions]:
    """The training split, its plan, and how it is read."""
    reader = SplitReader(load(config.data.path, config.data.access), "train")
    plan = Plan(
        reader.shard_sizes, config.data.global_batch_size, 0, config.data.lanes, config.data.shuffle_block_shards
    )
    device = world.device if world else torch.device("cpu")
    decoded = open_cache(config, world, reader) if world else None
    threads = decode_threads(config.data.threads)
    return reader, plan, LoaderOptions(threads, config.data.prefetch_batches, device, decoded=decoded)


def gradient_bytes(model: torch.nn.Module) -> int:
    """Bytes that several processes sum in each step: gradients have the type of their weights, also under autocast."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)


def positive_whole(word: str) -> int:
    """The type of an option that takes a whole number from 1 on."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {word!r}")
    return int(word)


def rate(sizes: Iterable[int]) -> float:
    """Images/s of one epoch, from the sizes of its batches as they come."""
    began = time.perf_counter()
    images = sum(sizes)
    return images / (time.perf_counter() - began)


def seconds_of(work: Callable[[], object], world: World) -> float:
    """Seconds of some work, its kernels included."""
    world.synchronize()
    began = time.perf_counter()
    work()
    world.synchronize()
    return time.perf_counter() - began
