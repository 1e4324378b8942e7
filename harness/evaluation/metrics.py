"""Metrics of predictions, with intervals: pure functions of probabilities, labels and groups.

In: (N, C) probabilities and (N,) labels. Out: plain numbers. Invariants: what is not defined (a class without images) is
None, never a silent zero, and averages are over the classes that have images. A metric and its interval come from one
formula: the metric counts each image once, the interval counts groups as often as a resample drew them.

To add a metric: compute it in `_metric_samples` and name it in `SUMMARY_METRICS` or `CLASS_METRICS`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

HIGHER_IS_BETTER = {"loss": False, "balanced_accuracy": True, "macro_f1": True, "last": True}
RESAMPLES = 2000
CALIBRATION_BINS = 15  # equally wide, over confidence
SUMMARY_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "weighted_f1",
    "macro_auc",
    "kappa",
    "loss",
    "brier",
    "calibration_error",
)
# Noise in a bin adds to the binned error and a resample adds it again: of 95 % intervals from 80 splits of 1,120 images, none
# covered a true error of 0.01 and 11 % one of 0.02 (reflected: 88 and 85 %, and 49 % one of 0).
WITHOUT_INTERVAL = ("calibration_error",)
CLASS_METRICS = ("precision", "recall", "specificity", "f1", "auc", "average_precision")


def compute_metrics(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    groups: np.ndarray | None = None,
    folds: np.ndarray | None = None,
) -> dict[str, Any]:
    """All metrics of a split; an image's prediction is its most probable class.

    Args:
        probabilities: (N, C), each row sums to 1. labels: (N,) integers. classes: C names. groups: (N,) names of what is
            independent (a lesion, a patient), for 95 % intervals; None for no intervals. folds: (N,) names of the model
            that scored an image, in cross-validation; None where one model scored all. Scores of two models have no common
            order, so areas (auc, macro_auc, average_precision) are means over the folds that define them, and all else
            counts the images together (Forman, Scholz, 2010).

    Returns:
        images; loss (mean negative log probability of the label, nats), accuracy, balanced_accuracy (mean recall),
        macro_f1, weighted_f1 (by images), macro_auc (mean one-vs-rest area under the ROC curve), kappa (Cohen, 1960),
        brier (Brier, 1950: mean squared distance to the one-hot label, 0 to 2), calibration_error (mean distance of
        confidence and accuracy over 15 equal bins of confidence, weighted by images; Naeini et al., 2015; too high by the noise of
        small bins, and without an interval); per_class
        (precision, recall, specificity, f1, auc, average_precision, images); confusion (C rows of labels, C columns of
        predictions); with groups also intervals, of the same shape, each [low, high].

    Raises:
        ValueError: no labels, probabilities that are not finite or do not sum to 1, unknown labels.
    """
    _check(probabilities, labels, classes)
    once = np.ones((1, len(labels)), np.float32)
    samples = _metric_samples(probabilities, labels, classes, once, folds)
    values = {name: _none_if_undefined(of_once[0]) for name, of_once in samples.items()}
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    images = {name: {"images": int(count)} for name, count in zip(classes, confusion.sum(1), strict=True)}
    metrics: dict[str, Any] = {"images": len(labels)} | _nested(values, classes)
    metrics["per_class"] = {name: row | images[name] for name, row in metrics["per_class"].items()}
    metrics["confusion"] = confusion.tolist()
    if groups is not None:
        (resampled,) = bootstrap([probabilities], labels, classes, groups, folds=folds)
        intervals = {name: interval_of(name, of_resamples) for name, of_resamples in resampled.items()}
        metrics["intervals"] = _nested(intervals, classes)
    return metrics


def pick(metrics: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Some of the metrics that `compute_metrics` returned, with their intervals."""
    return {name: metrics[name] for name in names} | {"intervals": {name: metrics["intervals"][name] for name in names}}


def bootstrap(
    predictions: list[np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    groups: np.ndarray,
    resamples: int = RESAMPLES,
    names: tuple[str, ...] | None = None,
    folds: np.ndarray | None = None,
) -> list[dict[str, np.ndarray]]:
    """Metrics of many resamples of the groups, with replacement (Efron, 1979); the same resamples for each prediction.

    Args:
        predictions: one or several (N, C), of the same images. resamples: R. names: of the metrics wanted; None for all.
            folds: as in `compute_metrics`.

    Returns:
        for each prediction, (R,) values of each metric, NaN where a resample does not define it; a class's metrics are
        named `recall of mel`.
    """
    parts = [
        [_metric_samples(probabilities, labels, classes, weights, folds) for probabilities in predictions]
        for weights in bootstrap_weights(groups, resamples)
    ]
    return [
        {name: np.concatenate([part[number][name] for part in parts]) for name in names or parts[0][number]}
        for number in range(len(predictions))
    ]


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray, n_classes: int) -> float:
    """The mean recall over the classes that have images: (N, C) probabilities, (N,) labels."""
    is_right = probabilities.argmax(1) == labels
    images = np.bincount(labels, minlength=n_classes)
    return float((np.bincount(labels, is_right, n_classes)[images > 0] / images[images > 0]).mean())


def paired_differences(
    before: list[np.ndarray],
    after: list[np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    groups: np.ndarray,
    names: tuple[str, ...] = SUMMARY_METRICS,
    folds: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """How much greater metrics are after than before, with paired intervals: {metric: {gain, interval}}.

    Args:
        before: one or several (N, C); of several (seeds of one recipe), the mean of their metrics counts. The interval is
            over the images that might have been drawn; the spread over seeds is not in it. after: likewise.
        names: of metrics, as `bootstrap` returns them. folds: as in `compute_metrics`.
    """
    once = np.ones((1, len(labels)), np.float32)
    exact = [_metric_samples(probabilities, labels, classes, once, folds) for probabilities in (*before, *after)]
    resampled = bootstrap([*before, *after], labels, classes, groups, names=names, folds=folds)

    def gain(samples: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        values = np.array([of_one[name] for of_one in samples])  # (before + after, R)
        return values[len(before) :].mean(0) - values[: len(before)].mean(0)

    return {
        name: {"gain": _none_if_undefined(gain(exact, name)[0]), "interval": interval_of(name, gain(resampled, name))}
        for name in names
    }


def interval_of(name: str, values: np.ndarray) -> list[float] | None:
    """The `percentile_interval` of a metric; None for those that have none, see `WITHOUT_INTERVAL`."""
    return None if name in WITHOUT_INTERVAL else percentile_interval(values)


def percentile_interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval [low, high]; None where more than 5 % of the resamples do not define the metric."""
    known = values[np.isfinite(values)]
    if len(known) < 0.95 * len(values):
        return None
    return [float(edge) for edge in np.percentile(known, [2.5, 97.5])]


def _metric_samples(
    probabilities: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    weights: np.ndarray,
    folds: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Each metric for each row of weights: (R, N) counts of the images, float32, to (R,) float64."""
    n_classes, guesses = len(classes), probabilities.argmax(1)
    exact, is_right = probabilities.astype(np.float64), guesses == labels
    own = exact[np.arange(len(labels)), labels].clip(np.finfo(np.float32).tiny)
    images = _counts(weights, labels, n_classes).astype(np.float64)  # (R, C)
    predicted = _counts(weights, guesses, n_classes).astype(np.float64)
    hits = _counts(weights[:, is_right], labels[is_right], n_classes).astype(np.float64)
    total = images.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, precision = hits / images, hits / predicted
        specificity = (total[:, None] - images - predicted + hits) / (total[:, None] - images)
        f1 = np.where(images > 0, 2 * hits / (images + predicted), np.nan)
        accuracy, chance = hits.sum(1) / total, (images * predicted).sum(1) / total**2
        models = [slice(None)] if folds is None else [folds == name for name in np.unique(folds)]
        areas = [_areas(exact[scored], labels[scored], weights[:, scored]) for scored in models]
        auc, average_precision = (_mean(np.stack(of_models, 2)) for of_models in zip(*areas, strict=True))
        overall = {
            "accuracy": accuracy,
            "balanced_accuracy": _mean(recall),
            "macro_f1": _mean(f1),
            "weighted_f1": np.nansum(f1 * images, 1) / total,
            "macro_auc": _mean(auc),
            "kappa": (accuracy - chance) / (1 - chance),
            "loss": _sums(weights, -np.log(own)) / total,
            "brier": _sums(weights, ((exact - np.eye(n_classes)[labels]) ** 2).sum(1)) / total,
            "calibration_error": _calibration_error(exact.max(1), is_right, weights) / total,
        }
    of_classes = {
        "precision": precision,
        "recall": recall,
        "specificity": specificity,
        "f1": f1,
        "auc": auc,
        "average_precision": average_precision,
    }
    return overall | {
        f"{name} of {label}": values[:, number]
        for name, values in of_classes.items()
        for number, label in enumerate(classes)
    }


def _counts(weights: np.ndarray, numbers: np.ndarray, n_classes: int) -> np.ndarray:
    """Images of each class, (R, C) float32, in no more memory than that: weights (R, N), numbers of classes (N,)."""
    order = np.argsort(numbers, kind="stable")
    present, starts = np.unique(numbers[order], return_index=True)
    counts = np.zeros((len(weights), n_classes), np.float32)
    if len(present):
        counts[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)  # whole numbers below 2^24: exact
    return counts


def _areas(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC AUC and average precision of each class against the rest, both (R, C): scores (N, C), labels (N,), weights (R, N)."""
    areas = [_roc_auc_and_ap(scores[:, number], labels == number, weights) for number in range(scores.shape[1])]
    auc, average_precision = (np.stack(of_classes, 1) for of_classes in zip(*areas, strict=True))
    return auc, average_precision


def _roc_auc_and_ap(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the ROC curve (as a rank statistic; ties count half) and average precision, both (R,).

    Images are counted in runs: those of one score where a positive has it, and all between two such scores.
    """
    order = np.argsort(-scores, kind="stable")
    is_positive, changes = positive[order], np.diff(scores[order], prepend=np.inf) != 0  # where the score changes
    of_score = changes.cumsum() - 1
    has_positive = np.isin(of_score, of_score[is_positive])  # the image, or one of the same score
    starts = np.flatnonzero(changes & (has_positive | np.roll(has_positive, 1)) | (np.arange(len(order)) == 0))
    run_of_positive = np.searchsorted(starts, np.flatnonzero(is_positive), "right") - 1
    hits = _counts(weights[:, order[is_positive]], run_of_positive, len(starts))  # (R, runs)
    misses = np.add.reduceat(weights[:, order], starts, axis=1) - hits
    true, false = hits.cumsum(1), misses.cumsum(1)  # positives so far; whole numbers below 2^24: exact in float32
    n_positive, n_negative = true[:, -1].astype(np.float64), false[:, -1].astype(np.float64)
    below = n_negative[:, None] - false + 0.5 * misses  # negatives with a lower score; ties half
    auc = np.einsum("rn,rn->r", hits, below) / (n_positive * n_negative)
    at_least_one = np.maximum(true + false, 1)
    average_precision = np.einsum("rn,rn->r", hits, true / at_least_one, dtype=np.float64) / n_positive
    undefined = (n_positive == 0) | (n_negative == 0)
    return np.where(undefined, np.nan, auc), np.where(undefined, np.nan, average_precision)


def _calibration_error(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over bins of |confidence - hits|, (R,)."""
    bins = np.eye(CALIBRATION_BINS)[np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)]
    return abs(np.stack([_sums(weights, column) for column in (bins * (confidence - right)[:, None]).T], 1)).sum(1)


def _sums(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted sums, (R, N) and (N,) to (R,). Not by BLAS, whose order of adding depends on its threads."""
    return np.einsum("rn,n->r", weights, values)


def bootstrap_weights(groups: np.ndarray, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each image counts in each resample: parts of (R, N) float32, small enough for the memory."""
    _, group = np.unique(groups, return_inverse=True)
    n_groups, generator = group.max() + 1, np.random.default_rng(0)
    at_once = max(1, 2_000_000 // len(group))
    for first in range(0, resamples, at_once):
        n = min(at_once, resamples - first)
        yield generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), n)[:, group].astype(np.float32)


def _check(probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    if len(labels) == 0 or probabilities.shape != (len(labels), len(classes)):
        shapes = f"{probabilities.shape} for {len(labels)} labels"
        raise ValueError(f"Metrics need (N, {len(classes)}) probabilities for N > 0 labels. Got {shapes}.")
    if not np.isfinite(probabilities).all() or abs(probabilities.sum(1) - 1).max() > 1e-3:
        raise ValueError(
            "Probabilities must be finite and sum to 1 in each row. The model's output is broken: lower optim.lr."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"Labels must be 0 to {len(classes) - 1}. Got {labels.min()} to {labels.max()}.")


def _nested(values: dict[str, Any], classes: tuple[str, ...]) -> dict[str, Any]:
    """Summary metrics, then {class: {metric: value}} under per_class."""
    per_class = {label: {name: values[f"{name} of {label}"] for name in CLASS_METRICS} for label in classes}
    return {name: values[name] for name in SUMMARY_METRICS} | {"per_class": per_class}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the classes, or folds, that have the metric: (..., C) to (...), NaN where none has."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(-1) / known.sum(-1)


def _none_if_undefined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
