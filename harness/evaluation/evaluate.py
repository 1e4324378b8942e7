"""Predict every sample of a split exactly once, on any number of ranks, and score it.

In: a model, a `Store`, views. Out: `Predictions`, then `predictions.csv` and `metrics.json`. What stays
true: the split is cut into units that do not depend on the world, and each forward pass has the same number of rows,
so the bytes of the results are the same at any world size; a lost or repeated sample is an error before any score.
"""

import json
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from harness.config import Config
from harness.data.augment import evaluation_views, parse_views, plain_view
from harness.data.loader import Batch, LoaderOptions, evaluation_batches
from harness.distributed.hardware import decode_threads, set_thread_device
from harness.distributed.world import World
from harness.evaluation.calibration import Prior
from harness.evaluation.gallery import save_pictures
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Predictions, compute_results
from harness.run.checkpoint import Checkpoint, Provenance
from shards.files import write_atomically
from shards.index import Dataset, load_table
from shards.leaks import leak_warnings
from shards.reader import SplitReader


@dataclass(frozen=True)
class EvalContext:
    """How the weights that are evaluated came about.

    weights: where they come from. changed: settings that changed in the middle of their training.
    prior: class frequencies that the model's probabilities take for granted, and those of the second reading.
    validation: split that the temperature and the thresholds are chosen on; None for neither.
    """

    weights: Checkpoint
    changed: list[str]
    prior: Prior
    validation: SplitReader | None


def never() -> bool:
    """Nobody asks to stop."""
    return False


def predict(
    model: nn.Module,
    reader: SplitReader,
    classes: tuple[str, ...],
    config: Config,
    world: World,
    views: str,
    stop: Callable[[], bool] = never,
) -> Predictions | None:
    """Collective: predict the store's split; each image is decoded once, on one rank.

    Args:
        model: bare (not wrapped for gradients), on the world's device; left in evaluation mode.
        classes: the C names of the model's outputs; the store's are among them, in any order.
        views: test-time augmentation, as in `eval.views`.
        stop: whether this rank was asked to stop; the ranks compare before each unit.

    Returns:
        None if a rank was asked to stop.

    Raises:
        RuntimeError: a sample was lost or predicted twice.
    """
    model.eval()
    world.broadcast_buffers(model)
    options = LoaderOptions(decode_threads(config.data.threads), config.data.prefetch_batches, world.device)
    units = evaluation_batches(reader, config.eval.batch_size, world.rank, world.size, options)
    keys, rows, waiting = [torch.empty(0, dtype=torch.int64)], [], deque()
    with (
        world.reproducible_threads() as workers,
        ThreadPoolExecutor(workers, initializer=set_thread_device, initargs=(world.device,)) as pool,
    ):
        for _ in range(0, sum(reader.shard_sizes), config.eval.batch_size * world.size):
            if world.any_rank(stop()):
                units.close()
                return None
            if (batch := next(units, None)) is not None:  # in the last round, some ranks may have none
                keys.append(batch.keys.cpu())
                waiting.append(pool.submit(_predict_batch, model, batch, config, world, views))
            if len(waiting) > workers:
                rows.append(waiting.popleft().result())
        rows += [future.result() for future in waiting]
        units.close()
    _, _, spins = parse_views(views)
    widths = [1, len(classes), len(classes), 1, spins * len(classes)]
    local = torch.cat([torch.empty(0, sum(widths)), *rows])
    global_keys, global_rows = world.all_gather_rows(torch.cat(keys), local)
    problem = world.run_on_main(_incomplete, global_keys, reader)
    if problem:
        raise RuntimeError(problem)
    labels, plain, mean, spread, each = (part.numpy() for part in global_rows.split(widths, 1))
    own = np.array(
        [classes.index(name) for name in reader.dataset.classes]
    )  # the model's numbers of the split's classes
    labels = own[labels[:, 0].astype(int)]
    each = each.reshape(len(labels), spins, len(classes)) if spins else None
    return Predictions(global_keys.numpy(), labels, plain, mean, spread[:, 0], each)


def validate(
    model: nn.Module, reader: SplitReader, config: Config, world: World, stop: Callable[[], bool]
) -> dict | None:
    """Collective: scores of the plain view, computed on rank 0 and known to all; None if a rank was asked to stop."""
    classes = reader.dataset.classes
    found = predict(model, reader, classes, config, world, "none", stop)
    if found is None:
        return None
    return world.run_on_main(compute_metrics, found.center_probs, found.labels, classes)


def evaluate(
    model: nn.Module,
    reader: SplitReader,
    split: str,
    config: Config,
    world: World,
    out: Path,
    trained: EvalContext,
    stop: Callable[[], bool] = never,
) -> dict | None:
    """Collective: evaluate with test-time augmentation and write the results.

    Args:
        split: its name, as asked for. out: folder for predictions.csv and metrics.json.

    Returns:
        the content of metrics.json, on every rank; None if a rank was asked to stop.
    """
    views, provenance, reference = config.eval.views, trained.weights.provenance, None
    if trained.validation is not None and trained.validation.shards != reader.shards:  # what is judged must not choose
        reference = predict(model, trained.validation, provenance.classes, config, world, views, stop)
        if reference is None:
            return None
    found = predict(model, reader, provenance.classes, config, world, views, stop)
    if found is None:
        return None

    def write() -> dict:
        description, shards = reader.dataset.description, reader.shards
        table = pd.concat([load_table(reader.dataset, shard) for shard in shards]).sort_values("key", ignore_index=True)
        rows = _prediction_rows(found, table, provenance.classes)
        metrics = {
            "format": 3,
            "split": split,
            "views": views,
            "image_size": config.eval.image_size or config.data.image_size,
            "dataset": reader.dataset.fingerprint,
            "protocol": description.protocol,
            "warnings": [
                *description.warnings,
                *leak_warnings(reader.dataset, split, provenance.train_groups),
                *class_warnings(reader.dataset, provenance),
                *(f"changed during training: {change}" for change in trained.changed),
            ],
            "model": provenance.model,
            "trained_on": provenance.dataset,
            "best_epoch": trained.weights.progress.best_epoch,
            **compute_results(found, reference, table, trained.prior, provenance.classes, config.eval),
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").unlink(missing_ok=True)  # written last: where it is, all of these results are
        write_atomically(out / "predictions.csv", rows.to_csv(index=False).encode())
        save_pictures(out, rows, reader)
        write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
        return metrics

    return world.run_on_main(write)


def class_warnings(dataset: Dataset, provenance: Provenance) -> list[str]:
    """One sentence if a dataset lacks classes of the model, else nothing."""
    lacking = [name for name in provenance.classes if name not in dataset.classes]
    if not lacking:
        return []
    return [
        f"the dataset has {len(dataset.classes)} of the model's {len(provenance.classes)} classes; the model chose among all of "
        f"them, and {', '.join(lacking)} can only be mistakes here"
    ]


@torch.inference_mode()
def _predict_batch(model: nn.Module, batch: Batch, config: Config, world: World, views: str) -> torch.Tensor:
    """Rows (n, 1 + C + C + 1 + VC) of one unit, on the CPU, as `Predictions` has them; V is 0 unless views are random."""
    size, unit, n = config.eval.image_size or config.data.image_size, config.eval.batch_size, len(batch.keys)
    images, keys = batch.images, batch.keys
    if n < unit:  # the last unit is filled with its last picture, so that all have the same arithmetic
        repeat = torch.arange(unit, device=world.device).clamp(max=n - 1)
        images, keys = images[repeat], keys[repeat]
    plain = _probabilities(model, plain_view(images, config.augment, size), world)
    random = views.startswith("spins")
    each = [plain] if not random else []
    for number, view in enumerate(evaluation_views(views, images, keys, config.run.seed, config.augment, size)):
        if number or random:  # otherwise the first is the plain one
            each.append(_probabilities(model, view, world))
    stacked = torch.stack(each, 1)  # (unit, V, C)
    mean = stacked.mean(1)
    guess = mean.argmax(1)[:, None, None].expand(-1, len(each), 1)
    spread = stacked.gather(2, guess)[..., 0].std(1, correction=0)
    parts = [batch.labels[:, None].float(), plain[:n], mean[:n], spread[:n, None]]
    return torch.cat(parts + ([stacked[:n].flatten(1)] if random else []), 1).cpu()  # device sync, once a unit


def _probabilities(model: nn.Module, view: torch.Tensor, world: World) -> torch.Tensor:
    with world.autocast():
        logits = model(view.contiguous(memory_format=world.memory_format))
    return logits.float().softmax(1)  # (unit, C)


def _incomplete(keys: torch.Tensor, reader: SplitReader) -> str | None:
    """What is wrong with the keys that were predicted, None if they are the split's, each once."""
    expected = np.sort(np.concatenate([reader.table(shard).key for shard in range(len(reader.shards))]))
    if np.array_equal(keys.numpy(), expected):
        return None
    lost, repeated = len(np.setdiff1d(expected, keys)), len(keys) - len(keys.unique())
    return f"Evaluation lost {lost} samples and predicted {repeated} twice: nothing was scored. Please report this."


def _prediction_rows(found: Predictions, table: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """One row an image: key, image id, group, label, prediction, spread over views, then a probability for each class."""
    names = np.array(classes)
    rows = table[["key", "image_id", "group"]].copy()
    rows["label"], rows["prediction"] = names[found.labels], names[found.tta_probs.argmax(1)]
    rows["spread"] = [f"{value:.4f}" for value in found.tta_std]
    for number, name in enumerate(classes):
        rows[f"p_{name}"] = [f"{value:.7g}" for value in found.tta_probs[:, number]]
    return rows
