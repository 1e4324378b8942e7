"""Predict every sample of a split exactly once, on any number of ranks.

In: a model, an `ImageReader`, settings. Out: `Predictions`, on rank 0. Invariants: the split is cut into batches that
do not depend on the world, and each forward pass has the same number of rows, so every bit of a prediction is the same at
any world size; a sample that was lost or predicted twice is an error before any metric is computed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from harness.config import Config
from harness.data.augment import evaluation_views, parse_views, plain_view
from harness.data.loader import Batch, LoaderOptions, evaluation_batches
from harness.distributed.collectives import gather_rows
from harness.distributed.hardware import decode_threads, set_thread_device
from harness.distributed.world import World
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Predictions
from shards.reader import ImageReader

SPLIT_TITLES = {"val": "validation"}  # others are called by their own names

# Columns of some samples, by the names of `Predictions`' fields; `keys` and `labels` (n,) int64, the others float32.
Columns = dict[str, torch.Tensor]


def never() -> bool:
    """Nobody asks to stop."""
    return False


def predict(
    model: nn.Module,
    reader: ImageReader,
    classes: tuple[str, ...],
    config: Config,
    world: World,
    stop: Callable[[], bool] = never,
    bad_keys: list[int] | None = None,
) -> Predictions | None:
    """Collective: predict the reader's split under `config.eval.views`; each image is decoded once, on one rank.

    Args:
        model: the same on each rank, not wrapped for gradients, on the world's device; left in evaluation mode.
        classes: the C names of the model's outputs; the dataset's are among them, in any order.
        stop: whether this rank was asked to stop; the ranks compare before each batch.
        bad_keys: list that this rank's keys of images that cannot be decoded are appended to: their rows have the label -1, and
            mean nothing. None: such an image is an error. An evaluation leaves none out.

    Returns:
        predictions of all N samples, sorted by key, on rank 0, and of none on the others: what follows from them is computed by
        `world.run_on_main`. None, on every rank, if one was asked to stop.

    Raises:
        RuntimeError: a sample was lost or predicted twice.
    """
    model.eval()
    _, _, n_random = parse_views(config.eval.views)
    parts = [_no_samples(len(classes), n_random)]
    for part in _local_predictions(model, reader, config, world, stop, bad_keys):
        if part is None:
            return None
        parts.append(part)
    local = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    keys, columns = gather_rows(world, local.pop("keys"), local)
    problem = world.run_on_main(find_incomplete, keys, reader)
    if problem:
        raise RuntimeError(problem)
    model_labels = torch.tensor([classes.index(name) for name in reader.classes])  # of the dataset's labels
    columns["labels"] = torch.where(columns["labels"] < 0, -1, model_labels[columns["labels"]])
    return Predictions(keys=keys.numpy(), **{name: column.numpy() for name, column in columns.items()})


def validate(
    model: nn.Module, reader: ImageReader, config: Config, world: World, stop: Callable[[], bool] = never
) -> dict | None:
    """Collective: metrics of the center view, computed on rank 0 and known to all, as from `compute_metrics`.

    Returns:
        no intervals; None if a rank was asked to stop.
    """
    classes = reader.classes
    center_only = replace(config, eval=replace(config.eval, views="none"))
    predictions = predict(model, reader, classes, center_only, world, stop)
    if predictions is None:
        return None
    return world.run_on_main(compute_metrics, predictions.center_probs, predictions.labels, classes)


def find_incomplete(keys: torch.Tensor, reader: ImageReader) -> str | None:
    """What is wrong with the keys that were predicted, (N,) int64; None if they are the split's, each exactly once."""
    expected = np.sort(reader.keys())
    if np.array_equal(keys.numpy(), expected):
        return None
    lost, repeated = len(np.setdiff1d(expected, keys)), len(keys) - len(keys.unique())
    return (
        f"Evaluation lost {lost} samples and predicted {repeated} twice, so no metric was computed. This is a bug: please "
        "report it with the settings and the number of processes. Evaluating on one process may avoid it."
    )


def _local_predictions(
    model: nn.Module,
    reader: ImageReader,
    config: Config,
    world: World,
    stop: Callable[[], bool],
    bad_keys: list[int] | None,
) -> Iterator[Columns | None]:
    """Collective: this rank's batches of the split in their order; None, as the last, if a rank was asked to stop."""
    threads, prefetch = decode_threads(config.data.threads), config.data.prefetch_batches
    options = LoaderOptions(threads, prefetch, world.device, works=world.works)
    batches = evaluation_batches(reader, config.eval.batch_size, world.rank, world.size, options, bad_keys)
    n_images, of_a_round = sum(reader.shard_sizes), config.eval.batch_size * world.size
    running: deque[Future[Columns]] = deque()
    with (
        closing(batches),
        _progress_bar(reader, config, world) as bar,
        world.reproducible_threads() as workers,
        _abandoned_on_error(ThreadPoolExecutor(workers, "predict", set_thread_device, (world.device,))) as pool,
    ):

        def next_done() -> Columns:
            columns = running.popleft().result()
            bar.update(min(of_a_round, n_images - bar.n))  # rank 0 has a batch in each round, and the others keep pace
            return columns

        for _ in range(0, n_images, of_a_round):
            if world.any_rank(stop()):
                yield None
                return
            if (batch := next(batches, None)) is not None:  # in the last round, some ranks may have none
                running.append(pool.submit(_predict_batch, model, batch, config, world))
            if len(running) > workers:
                yield next_done()
        while running:
            yield next_done()


@contextmanager
def _abandoned_on_error(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A pool whose tasks are waited for at the end, but not after an error or Ctrl-C: a batch of many views takes minutes."""
    is_done = False
    try:
        yield pool
        is_done = True
    finally:
        pool.shutdown(wait=is_done, cancel_futures=not is_done)


def _progress_bar(reader: ImageReader, config: Config, world: World) -> tqdm:
    """Images done by all ranks, with the time left; on rank 0, and only where there is a terminal to show it on."""
    split = reader.title
    turns, flips, n_random = parse_views(config.eval.views)
    n_views = n_random or len(turns) * len(flips)
    title = SPLIT_TITLES.get(split, split) + (f", {n_views} views" if n_views > 1 else "")
    return tqdm(total=sum(reader.shard_sizes), desc=title, unit=" images", leave=False, disable=world.hides_bars)


def _no_samples(n_classes: int, n_random: int) -> Columns:
    """The columns of no sample, for a rank that has none: what `_predict_batch` returns, with n = 0."""
    probabilities = torch.empty(0, n_classes)
    columns = {
        "keys": torch.empty(0, dtype=torch.int64),
        "labels": torch.empty(0, dtype=torch.int64),
        "center_probs": probabilities,
        "tta_probs": probabilities,
        "tta_std": torch.empty(0),
    }
    return columns | ({"view_probs": torch.empty(0, n_random, n_classes)} if n_random else {})


@torch.inference_mode()
def _predict_batch(model: nn.Module, batch: Batch, config: Config, world: World) -> Columns:
    """The columns of one batch of n samples, on the CPU; labels are the dataset's. (Device sync.)"""
    size, n, n_rows = config.eval.image_size or config.data.image_size, len(batch.keys), config.eval.batch_size
    images, keys = batch.images, batch.keys
    if n < n_rows:  # the last batch is padded with its last image, so that all have the same arithmetic
        padded = torch.arange(n_rows).clamp(max=n - 1)
        images, keys = images[padded.to(world.device)], keys[padded]
    center = _probabilities(model, plain_view(images, config.augment, size), world)  # (n_rows, C)
    is_random = parse_views(config.eval.views)[2] > 0
    each = [] if is_random else [center]
    views = evaluation_views(config.eval.views, images, keys, config.run.seed, config.augment, size)
    for number, view in enumerate(views):
        if number or is_random:  # otherwise the first is the center view
            each.append(_probabilities(model, view, world))
    stacked = torch.stack(each, 1)  # (n_rows, V, C)
    mean = stacked.mean(1)
    predicted = mean.argmax(1)[:, None, None].expand(-1, len(each), 1)  # (n_rows, V, 1)
    std = stacked.gather(2, predicted)[..., 0].std(1, correction=0)
    columns = {
        "keys": batch.keys,
        "labels": batch.labels,
        "center_probs": center[:n],
        "tta_probs": mean[:n],
        "tta_std": std[:n],
    }
    columns |= {"view_probs": stacked[:n]} if is_random else {}
    return {name: column.cpu() for name, column in columns.items()}  # device sync, once a batch


def _probabilities(model: nn.Module, view: torch.Tensor, world: World) -> torch.Tensor:
    """Class probabilities of a view, (B, 3, S, S) to (B, C) float32."""
    world.works()
    with world.autocast():
        logits = model(view.contiguous(memory_format=world.memory_format))
    return logits.float().softmax(1)
