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

from harness.augment import evaluation_views, plain_view
from harness.calibration import at_threshold, fit_temperature, threshold_for, with_temperature
from harness.checkpoint import Checkpoint, Origin, write_atomically
from harness.config import Config
from harness.hardware import decode_threads, use_device
from harness.loader import Batch, Reading, evaluation_batches
from harness.metrics import gains, score, shown, table
from harness.world import World
from shards.index import Dataset, load_groups, load_table
from shards.store import Store


@dataclass(frozen=True)
class Predictions:
    """Predictions of a whole split, sorted by key.

    keys: (N,) int64. labels: (N,) int64. plain: (N, C) probabilities of the upright view. mean: (N, C) probabilities,
    averaged over the views.
    """

    keys: np.ndarray
    labels: np.ndarray
    plain: np.ndarray
    mean: np.ndarray


def never() -> bool:
    """Nobody asks to stop."""
    return False


def predict(
    model: nn.Module, store: Store, config: Config, world: World, views: str, stop: Callable[[], bool] = never
) -> Predictions | None:
    """Collective: predict the store's split; each image is decoded once, on one rank.

    Args:
        model: bare (not wrapped for gradients), on the world's device; left in evaluation mode.
        views: test-time augmentation, as in `eval.views`.
        stop: whether this rank was asked to stop; the ranks compare before each unit.

    Returns:
        None if a rank was asked to stop.

    Raises:
        RuntimeError: a sample was lost or predicted twice.
    """
    model.eval()
    world.broadcast_buffers(model)
    reading = Reading(decode_threads(config.data.threads), config.data.batches_ahead, world.device)
    units = evaluation_batches(store, config.eval.unit, world.rank, world.size, reading)
    keys, rows, waiting = [torch.empty(0, dtype=torch.int64)], [], deque()
    with (
        world.reproducible_threads() as workers,
        ThreadPoolExecutor(workers, initializer=use_device, initargs=(world.device,)) as pool,
    ):
        for _ in range(0, sum(store.shard_sizes), config.eval.unit * world.size):
            if world.any(stop()):
                units.close()
                return None
            if (batch := next(units, None)) is not None:  # in the last round, some ranks may have none
                keys.append(batch.keys.cpu())
                waiting.append(pool.submit(_predict_unit, model, batch, config, world, views))
            if len(waiting) > workers:
                rows.append(waiting.popleft().result())
        rows += [future.result() for future in waiting]
        units.close()
    n_classes = len(store.dataset.classes)
    local = torch.cat([torch.empty(0, 1 + 2 * n_classes), *rows])
    global_keys, global_rows = world.gather_rows(torch.cat(keys), local)
    problem = world.on_main(_incomplete, global_keys, store)
    if problem:
        raise RuntimeError(problem)
    labels = global_rows[:, 0].long().numpy()
    plain, mean = global_rows[:, 1:].numpy().reshape(len(labels), 2, n_classes).transpose(1, 0, 2)
    return Predictions(global_keys.numpy(), labels, plain, mean)


def validate(model: nn.Module, store: Store, config: Config, world: World, stop: Callable[[], bool]) -> dict | None:
    """Collective: scores of the plain view, computed on rank 0 and known to all; None if a rank was asked to stop."""
    found = predict(model, store, config, world, "none", stop)
    if found is None:
        return None
    return world.on_main(score, found.plain, found.labels, store.dataset.classes)


def evaluate(
    model: nn.Module,
    store: Store,
    split: str,
    config: Config,
    world: World,
    out: Path,
    weights: Checkpoint,
    changed: list[str],
    validation: Store | None,
    stop: Callable[[], bool] = never,
) -> dict | None:
    """Collective: evaluate with test-time augmentation and write the results.

    Args:
        split: its name, as asked for. out: folder for predictions.csv and metrics.json.
        weights: where the model's weights come from. changed: settings that changed in the middle of their training.
        validation: split that the temperature and the thresholds are chosen on; None for neither.

    Returns:
        the content of metrics.json, on every rank; None if a rank was asked to stop.
    """
    views, classes = config.eval.views, store.dataset.classes
    reference = None
    if validation is not None and validation.shards != store.shards:  # the split that is judged must not choose
        reference = predict(model, validation, config, world, views, stop)
        if reference is None:
            return None
    found = predict(model, store, config, world, views, stop)
    if found is None:
        return None

    def write() -> dict:
        rows = _prediction_rows(found, store)
        groups = rows["group"].astype(str).to_numpy()
        description = store.dataset.description
        metrics = {
            "format": 2,
            "split": split,
            "views": views,
            "dataset": store.dataset.fingerprint,
            "protocol": description.protocol,
            "warnings": [
                *description.warnings,
                *leak_warnings(store.dataset, split, weights.origin),
                *(f"changed during training: {change}" for change in changed),
            ],
            "model": weights.origin.model,
            "trained_on": weights.origin.dataset,
            "best_epoch": weights.progress.best_epoch,
            "plain": score(found.plain, found.labels, classes, groups),
            "tta": score(found.mean, found.labels, classes, groups),
            "gain": gains(found.plain, found.mean, found.labels, classes, groups),
            **({} if reference is None else _chosen_on_validation(found, reference, config, classes, groups)),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "predictions.csv", rows.to_csv(index=False).encode())
        write_atomically(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
        return metrics

    return world.on_main(write)


def _chosen_on_validation(
    found: Predictions, reference: Predictions, config: Config, classes: tuple[str, ...], groups: np.ndarray
) -> dict:
    """The temperature and the operating points: chosen on `reference`, judged on `found`."""
    temperature = fit_temperature(reference.mean, reference.labels)
    calibrated = score(with_temperature(found.mean, temperature), found.labels, classes, groups)
    shown = ("loss", "brier", "calibration_error")
    points = []
    for positive in config.eval.positives:
        numbers = [classes.index(name) for name in positive.split("+") if name in classes]
        if len(numbers) < len(positive.split("+")):
            continue  # of another dataset
        here, there = ((p.mean[:, numbers].sum(1), np.isin(p.labels, numbers)) for p in (found, reference))
        threshold = threshold_for(*there, config.eval.sensitivity)
        if threshold is not None:
            point = {"positive": positive, "wanted_sensitivity": config.eval.sensitivity, "threshold": threshold}
            points.append(point | {"positives": int(here[1].sum())} | at_threshold(*here, threshold, groups))
    return {
        "calibration": {"temperature": temperature}
        | {name: calibrated[name] for name in shown}
        | {"intervals": {name: calibrated["intervals"][name] for name in shown}},
        "operating_points": points,
    }


def leak_warnings(dataset: Dataset, split: str, origin: Origin) -> list[str]:
    """One sentence if groups of a split are among those that the weights were trained on, else nothing."""
    groups = load_groups(dataset, split)
    shared = len(np.intersect1d(groups, origin.train_groups))
    if not shared:
        return []
    return [f"{shared} of {len(groups)} groups (lesions) of the {split} split were trained on: the scores are too high"]


def summary(metrics: dict) -> str:
    """What `evaluate` found, for people."""
    scores, plain, gain = metrics["tta"], metrics["plain"], metrics["gain"]["balanced_accuracy"]
    lines = [f"{metrics['split']} split, {scores['images']} images, views: {metrics['views']}", table(scores)]
    if metrics["views"] != "none":
        lines.append(
            f"the views gain {shown(gain['gain'], gain['interval'], '+.3f')} balanced accuracy over the plain one "
            f"({shown(plain['balanced_accuracy'])})"
        )
    if calibration := metrics.get("calibration"):
        before, after = scores["calibration_error"], calibration["calibration_error"]
        lines.append(
            f"temperature {calibration['temperature']:.2f} (fitted on validation): calibration error {before:.3f} becomes "
            f"{after:.3f}, loss {scores['loss']:.3f} becomes {calibration['loss']:.3f}"
        )
    for point in metrics.get("operating_points", []):
        rates = {name: shown(**point[name]) for name in ("sensitivity", "specificity")}
        lines.append(
            f"{point['positive']} at the threshold {point['threshold']:.3f} (sensitivity {point['wanted_sensitivity']:.2f} on "
            f"validation): sensitivity {rates['sensitivity']}, specificity {rates['specificity']}"
        )
    return "\n".join(lines + [f"warning: {warning}" for warning in metrics["warnings"]])


@torch.inference_mode()
def _predict_unit(model: nn.Module, batch: Batch, config: Config, world: World, views: str) -> torch.Tensor:
    """Rows (n, 1 + 2C) of one unit, on the CPU: label, plain probabilities, probabilities averaged over the views."""
    size, unit, n = config.data.image_size, config.eval.unit, len(batch.keys)
    images, keys = batch.images, batch.keys
    if n < unit:  # the last unit is filled with its last picture, so that all have the same arithmetic
        repeat = torch.arange(unit, device=world.device).clamp(max=n - 1)
        images, keys = images[repeat], keys[repeat]
    plain = _probabilities(model, plain_view(images, config.augment, size), world)
    total, count = torch.zeros_like(plain), 0
    for view in evaluation_views(views, images, keys, config.run.seed, config.augment, size) if views != "none" else ():
        first_is_plain = count == 0 and not views.startswith("spins")
        total += plain if first_is_plain else _probabilities(model, view, world)
        count += 1
    mean = total / count if count else plain
    return torch.cat([batch.labels[:, None].float(), plain[:n], mean[:n]], 1).cpu()  # device sync, once a unit


def _probabilities(model: nn.Module, view: torch.Tensor, world: World) -> torch.Tensor:
    with world.autocast():
        logits = model(view.contiguous(memory_format=world.memory_format))
    return logits.float().softmax(1)  # (unit, C)


def _incomplete(keys: torch.Tensor, store: Store) -> str | None:
    """What is wrong with the keys that were predicted, None if they are the split's, each once."""
    expected = np.sort(np.concatenate([store.table(shard).key for shard in range(len(store.shards))]))
    if np.array_equal(keys.numpy(), expected):
        return None
    lost, repeated = len(np.setdiff1d(expected, keys)), len(keys) - len(keys.unique())
    return f"Evaluation lost {lost} samples and predicted {repeated} twice: nothing was scored. Please report this."


def _prediction_rows(found: Predictions, store: Store) -> pd.DataFrame:
    """One row an image: key, image id, group, label, prediction, then a probability for each class."""
    classes = np.array(store.dataset.classes)
    tables = pd.concat([load_table(store.dataset, shard)[["key", "image_id", "group"]] for shard in store.shards])
    rows = tables.sort_values("key", ignore_index=True)
    rows["label"], rows["prediction"] = classes[found.labels], classes[found.mean.argmax(1)]
    for number, name in enumerate(classes):
        rows[f"p_{name}"] = [f"{value:.7g}" for value in found.mean[:, number]]
    return rows
