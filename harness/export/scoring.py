"""How an exported file answers: on stored images, beside the harness, and how fast.

In: stored images of a split, and functions from images to probabilities. Out: differences, thresholds, milliseconds.
Invariants: the harness's own answer is the center view of `plain_view` through the run's model; temperature and thresholds are
chosen on the validation split, for the very probabilities that the file gives.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from harness.data.augment import plain_view
from harness.evaluation.calibration import threshold_for, with_temperature
from harness.evaluation.results import classes_of
from harness.export.trained import Trained
from shards.index import load_table
from shards.plan import locate_in_order
from shards.reader import SplitReader

LIMIT = 1e-3  # largest difference of a probability at which a file is kept
SAMPLE = 100  # images that a file is checked on
BATCH = 16
ROUNDS = 5  # of timing

Predict = Callable[[np.ndarray], np.ndarray]  # stored images (n, H, W, 3) uint8 to probabilities (n, C)


@dataclass(frozen=True)
class Parity:
    """An exported file beside the harness: number of images, largest difference of a probability, share of equal classes."""

    images: int
    difference: float
    same_class: float


def spread(n_images: int, wanted: int) -> np.ndarray:
    """Places of at most so many images, evenly spread over a split in stored order: (n,) int64."""
    return np.linspace(0, n_images - 1, min(wanted, n_images)).round().astype(np.int64)


def stored_images(reader: SplitReader, places: np.ndarray, batch: int = BATCH) -> Iterator[np.ndarray]:
    """Batches of (n, H, W, 3) uint8, decoded as the loader does; places: (N,) in the split's stored order.

    Raises:
        ValueError: one cannot be decoded, by name.
    """
    for first in range(0, len(places), batch):
        shards, rows = locate_in_order(reader.shard_sizes, places[first : first + batch])
        pixels = np.empty((len(rows), reader.dataset.height, reader.dataset.width, 3), np.uint8)
        for place, data in reader.read(shards, rows):
            reader.decode(int(shards[place]), int(rows[place]), data, pixels[place])
        yield pixels


def labels_and_groups(reader: SplitReader) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) int64 and groups (N,) of a split in stored order."""
    tables = [load_table(reader.dataset, shard) for shard in reader.shards]
    labels = np.concatenate([table["label"].to_numpy() for table in tables])
    return labels, np.concatenate([table["group"].astype(str).to_numpy() for table in tables])


def predict_images(predict: Predict, reader: SplitReader, places: np.ndarray) -> np.ndarray:
    """Probabilities of those images: (N, C)."""
    return np.concatenate([predict(pixels) for pixels in stored_images(reader, places)])


def plain_views(trained: Trained, pixels: np.ndarray) -> torch.Tensor:
    """Stored images as the model sees them: (n, H, W, 3) uint8 to (n, 3, S, S) float32."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return plain_view(images, trained.config.augment, trained.results.image_size).contiguous()


def harness_predict(trained: Trained) -> Predict:
    """The harness's own probabilities of the center view, with the temperature."""

    @torch.inference_mode()
    def predict(pixels: np.ndarray) -> np.ndarray:
        probabilities = trained.model(plain_views(trained, pixels)).float().softmax(1).numpy()
        return with_temperature(probabilities, trained.temperature)

    return predict


def compare(found: np.ndarray, wanted: np.ndarray) -> Parity:
    """Probabilities of a file beside the harness's, both (N, C)."""
    same = (found.argmax(1) == wanted.argmax(1)).mean()
    difference = np.abs(found - wanted).max() if np.isfinite(found).all() else np.inf
    return Parity(len(found), float(difference), float(same))


def choose_thresholds(trained: Trained, probabilities: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Thresholds of the run's operating points for these probabilities of the validation split, (N, C) and (N,).

    Those in metrics.json are of averages over views, without a temperature: another score has another threshold. They are
    rounded down to 5 digits, so that the arithmetic of another runtime does not lose the image that one stands on.
    """
    points = []
    for point in trained.results.operating_points:
        numbers = [trained.classes.index(name) for name in classes_of(point["positive"], trained.classes)]
        scores = probabilities[:, numbers].sum(1)
        threshold = threshold_for(scores, np.isin(labels, numbers), point["wanted_sensitivity"])
        if threshold is not None:
            rounded = float(np.floor(threshold * 1e5) / 1e5)
            points.append({name: point[name] for name in ("positive", "wanted_sensitivity")} | {"threshold": rounded})
    return points


def latency_ms(run: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray) -> float:
    """Milliseconds of a batch on the CPU: the median of some runs, after one that does not count."""
    run(inputs)
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        run(inputs)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) * 1000
