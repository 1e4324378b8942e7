"""What the last layer of a model is given: pooled features, (F,) for an image.

In: a model, images. Out: features. Invariants: the center view, in fp32; the same bits on any number of processes and cores of a CPU.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy
from itertools import islice

import torch
from torch import nn

from harness.config import Config
from harness.data.augment import plain_view
from harness.data.loader import Batch, LoaderOptions, evaluation_batches
from harness.distributed.collectives import gather_rows
from harness.distributed.hardware import decode_threads, set_thread_device
from harness.distributed.world import World
from harness.evaluation.predict import never
from harness.model.build import find_head
from shards.reader import ImageReader


def feature_batches(
    model: nn.Module, reader: ImageReader, config: Config, world: World, rank: int = 0, n_ranks: int = 1
) -> Generator[tuple[Batch, torch.Tensor], None, None]:
    """One rank's batches of a split in stored order, each with its features, (b, F) float32 on the world's device."""
    options = LoaderOptions(decode_threads(config.data.threads), config.data.prefetch_batches, world.device)
    size = config.eval.image_size or config.data.image_size
    headless = without_head(model)

    @torch.inference_mode()
    def compute(batch: Batch) -> torch.Tensor:
        world.works()
        view = plain_view(batch.images, config.augment, size).contiguous(memory_format=world.memory_format)
        features = headless(view)
        return (features.flatten(1) if features.ndim < 4 else features.mean((2, 3))).float()

    running: deque[tuple[Batch, Future[torch.Tensor]]] = deque()
    with (
        closing(evaluation_batches(reader, config.eval.batch_size, rank, n_ranks, options)) as batches,
        world.reproducible_threads() as workers,
        ThreadPoolExecutor(workers, "features", set_thread_device, (world.device,)) as pool,
    ):
        for batch in batches:
            running.append((batch, pool.submit(compute, batch)))
            if len(running) > workers:
                done, features = running.popleft()
                yield done, features.result()
        for done, features in running:
            yield done, features.result()


def without_head(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that returns what its last layer would be given."""
    headless = deepcopy(model).eval()
    parent, _, attribute = find_head(headless).rpartition(".")
    setattr(headless.get_submodule(parent), attribute, nn.Identity())
    return headless


def split_features(
    model: nn.Module, reader: ImageReader, config: Config, world: World, stop: Callable[[], bool] = never
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Collective: features of all images of a split, each computed on one rank, and their labels.

    Args:
        stop: whether this rank was asked to stop; the ranks compare before each batch.

    Returns:
        (N, F) float32 and (N,) int64, in the order of the keys, on rank 0; N is 0 on the others. None if a rank was asked to stop.
    """
    head = model.get_submodule(find_head(model))
    n_features = head.weight.shape[1] if isinstance(head, nn.Linear | nn.Conv2d) else 0
    keys, parts, labels = (
        [torch.empty(0, dtype=torch.int64)],
        [torch.empty(0, n_features)],
        [torch.empty(0, dtype=torch.int64)],
    )
    with closing(feature_batches(model, reader, config, world, world.rank, world.size)) as found:
        for _ in range(0, sum(reader.shard_sizes), config.eval.batch_size * world.size):
            if world.any_rank(stop()):
                return None
            for batch, features in islice(found, 1):  # in the last round, some ranks may have none
                keys.append(batch.keys.cpu())
                labels.append(batch.labels.cpu())
                parts.append(features.cpu())
    columns = {"features": torch.cat(parts), "labels": torch.cat(labels)}
    _, columns = gather_rows(world, torch.cat(keys), columns)
    return columns["features"], columns["labels"]
