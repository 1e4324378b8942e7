"""Scores of predictions, with intervals: pure functions of probabilities, labels and groups.

In: (N, C) probabilities and (N,) labels. Out: plain numbers. What stays true: what is not defined (a class without
images) is None, never a silent zero, and averages are over the classes that have images. A figure and its interval come
from one formula: the figure counts each image once, the interval counts groups as often as a resample drew them.
"""

from collections.abc import Iterator

import numpy as np

HIGHER_IS_BETTER = {"loss": False, "balanced_accuracy": True, "macro_f1": True}
RESAMPLES = 2000
BINS = 15  # of the calibration error, equally wide
SUMMARY_METRICS = (
    *("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "macro_auc", "kappa"),
    *("loss", "brier", "calibration_error"),
)
CLASS_METRICS = ("precision", "recall", "specificity", "f1", "auc", "average_precision")


def compute_metrics(
    probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], groups: np.ndarray | None = None
) -> dict:
    """Score predictions; a picture's prediction is its most probable class.

    Args:
        probabilities: (N, C), each row sums to 1. labels: (N,) integers. classes: C names. groups: (N,) names of what is
            independent (lesions), for 95 % intervals; None for no intervals.

    Returns:
        images; loss (mean negative log probability of the label, nats), accuracy, balanced_accuracy (mean recall),
        macro_f1, weighted_f1 (by images), macro_auc (mean one-vs-rest area under the ROC curve), kappa (Cohen, 1960),
        brier (Brier, 1950: mean squared distance to the one-hot label, 0 to 2), calibration_error (mean distance of
        confidence and accuracy over 15 equal bins of confidence, weighted by images; Naeini et al., 2015); per_class
        (precision, recall, specificity, f1, auc, average_precision, images); confusion (C rows of labels, C columns of
        predictions); with groups also intervals, of the same shape, each [low, high].

    Raises:
        ValueError: nothing to score, probabilities that are not finite or do not sum to 1, unknown labels.
    """
    _check(probabilities, labels, classes)
    once = np.ones((1, len(labels)), np.float32)
    figures = {
        name: _plain(values[0]) for name, values in _metric_samples(probabilities, labels, classes, once).items()
    }
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    images = {name: {"images": int(count)} for name, count in zip(classes, confusion.sum(1), strict=True)}
    found = {"images": len(labels)} | _nested(figures, classes)
    found["per_class"] = {name: row | images[name] for name, row in found["per_class"].items()}
    found["confusion"] = confusion.tolist()
    if groups is not None:
        resampled = bootstrap([probabilities], labels, classes, groups)[0]
        found["intervals"] = _nested({name: percentile_interval(values) for name, values in resampled.items()}, classes)
    return found


def bootstrap(
    predictions: list[np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    groups: np.ndarray,
    resamples: int = RESAMPLES,
) -> list[dict[str, np.ndarray]]:
    """Figures of many resamples of the groups, with replacement (Efron, 1979); the same resamples for each prediction.

    Args:
        predictions: one or several (N, C), of the same images. resamples: R.

    Returns:
        for each prediction, (R,) values of each figure, NaN where a resample does not define it; names of a class's are
        `recall of mel`.
    """
    parts = [
        [_metric_samples(probabilities, labels, classes, weights) for probabilities in predictions]
        for weights in bootstrap_weights(groups, resamples)
    ]
    return [
        {name: np.concatenate([part[number][name] for part in parts]) for name in parts[0][number]}
        for number in range(len(predictions))
    ]


def paired_differences(
    before: list[np.ndarray],
    after: list[np.ndarray],
    labels: np.ndarray,
    classes: tuple[str, ...],
    groups: np.ndarray,
    figures: tuple[str, ...] = SUMMARY_METRICS,
) -> dict:
    """What `after` has more than `before`, with paired intervals: {figure: {gain, interval}}.

    Args:
        before: one or several (N, C); of several (seeds of one recipe), the mean of their figures counts. The interval is
            over the images that might have been drawn; the spread over seeds is not in it. after: likewise.
        figures: names as `bootstrap` returns them.
    """
    once = np.ones((1, len(labels)), np.float32)
    plain = [_metric_samples(found, labels, classes, once) for found in (*before, *after)]
    drawn = bootstrap([*before, *after], labels, classes, groups)

    def gain(found: list[dict], name: str) -> np.ndarray:
        low, high = ([one[name] for one in part] for part in (found[: len(before)], found[len(before) :]))
        return np.mean(high, axis=0) - np.mean(low, axis=0)

    return {
        name: {"gain": _plain(gain(plain, name)[0]), "interval": percentile_interval(gain(drawn, name))}
        for name in figures
    }


def percentile_interval(values: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval [low, high]; None where more than 5 % of the resamples do not define the figure."""
    known = values[np.isfinite(values)]
    if len(known) < 0.95 * len(values):
        return None
    return [float(edge) for edge in np.percentile(known, [2.5, 97.5])]


def table(scores: dict) -> str:
    """The per-class table of `score`, for people; 95 % intervals where there are any."""
    columns = ("precision", "recall", "f1", "auc")
    intervals = scores.get("intervals")
    width = max(10, *(len(name) + 2 for name in scores["per_class"]))
    cell = 20 if intervals else 13
    lines = [f"{'class':<{width}}{'images':>8}" + "".join(f"{name:>{cell}}" for name in columns)]
    for name, row in scores["per_class"].items():
        cells = [_compact(row[column], intervals and intervals["per_class"][name][column]) for column in columns]
        lines.append(f"{name:<{width}}{row['images']:>8}" + "".join(f"{text:>{cell}}" for text in cells))
    for names in (SUMMARY_METRICS[:3], SUMMARY_METRICS[4:6], SUMMARY_METRICS[6:]):
        texts = [
            f"{name.replace('_', ' ')} {format_metric(scores[name], intervals and intervals[name])}" for name in names
        ]
        lines.append(",  ".join(texts))
    if intervals:
        lines.append("in brackets: 95 % intervals, by resampling lesions (groups)")
    return "\n".join(lines)


def format_metric(value: float | None, interval: list[float] | None = None, form: str = ".3f") -> str:
    """A figure with its interval, for people."""
    if value is None:
        return "not defined"
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def _metric_samples(
    probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Each figure for each row of weights: (R, N) counts of the images, float32, to (R,) float64."""
    n_classes, guesses = len(classes), probabilities.argmax(1)
    exact = probabilities.astype(np.float64)
    own = exact[np.arange(len(labels)), labels].clip(np.finfo(np.float32).tiny)
    cells = np.eye(n_classes * n_classes, dtype=np.float32)[labels * n_classes + guesses]
    confusion = (weights @ cells).astype(np.float64).reshape(-1, n_classes, n_classes)  # (R, C, C)
    total, hits = confusion.sum((1, 2)), np.einsum("rcc->rc", confusion)
    images, predicted = confusion.sum(2), confusion.sum(1)  # (R, C)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, precision = hits / images, hits / predicted
        specificity = (total[:, None] - images - predicted + hits) / (total[:, None] - images)
        f1 = np.where(images > 0, 2 * hits / (images + predicted), np.nan)
        accuracy, chance = hits.sum(1) / total, (images * predicted).sum(1) / total**2
        areas = [_roc_auc_and_ap(exact[:, number], labels == number, weights) for number in range(n_classes)]
        auc, average_precision = np.stack([area for area, _ in areas], 1), np.stack([area for _, area in areas], 1)
        overall = {
            "accuracy": accuracy,
            "balanced_accuracy": _mean(recall),
            "macro_f1": _mean(f1),
            "weighted_f1": np.nansum(f1 * images, 1) / total,
            "macro_auc": _mean(auc),
            "kappa": (accuracy - chance) / (1 - chance),
            "loss": _sums(weights, -np.log(own)) / total,
            "brier": _sums(weights, ((exact - np.eye(n_classes)[labels]) ** 2).sum(1)) / total,
            "calibration_error": _calibration_error(exact.max(1), guesses == labels, weights) / total,
        }
    of_classes = dict(zip(CLASS_METRICS, (precision, recall, specificity, f1, auc, average_precision), strict=True))
    return overall | {
        f"{name} of {label}": values[:, number]
        for name, values in of_classes.items()
        for number, label in enumerate(classes)
    }


def _roc_auc_and_ap(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under the ROC curve (as a rank statistic; ties count half) and average precision, both (R,)."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # where the score changes
    hits = np.add.reduceat(weights[:, order] * positive[order].astype(np.float32), starts, axis=1)
    misses = np.add.reduceat(weights[:, order] * (~positive[order]).astype(np.float32), starts, axis=1)
    found, false = hits.cumsum(1), misses.cumsum(1)  # whole numbers below 2^24: exact in float32
    n_positive, n_negative = found[:, -1].astype(np.float64), false[:, -1].astype(np.float64)
    below = n_negative[:, None] - false + 0.5 * misses  # negatives with a lower score; ties half
    auc = np.einsum("rn,rn->r", hits, below) / (n_positive * n_negative)
    at_least_one = np.maximum(found + false, 1)
    average_precision = np.einsum("rn,rn->r", hits, found / at_least_one, dtype=np.float64) / n_positive
    undefined = (n_positive == 0) | (n_negative == 0)
    return np.where(undefined, np.nan, auc), np.where(undefined, np.nan, average_precision)


def _calibration_error(confidence: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over bins of |confidence - hits|, (R,)."""
    bins = np.eye(BINS)[np.minimum((confidence * BINS).astype(int), BINS - 1)]
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
        shape = probabilities.shape
        raise ValueError(
            f"Scores need (N, {len(classes)}) probabilities for N > 0 labels. Got {shape} for {len(labels)}."
        )
    if not np.isfinite(probabilities).all() or abs(probabilities.sum(1) - 1).max() > 1e-3:
        raise ValueError(
            "Probabilities must be finite and sum to 1 in each row. The model's output is broken: lower optim.lr."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"Labels must be 0 to {len(classes) - 1}. Got {labels.min()} to {labels.max()}.")


def _nested(figures: dict, classes: tuple[str, ...]) -> dict:
    """Overall figures, then {class: {figure}} under per_class."""
    per_class = {label: {name: figures[f"{name} of {label}"] for name in CLASS_METRICS} for label in classes}
    return {name: figures[name] for name in SUMMARY_METRICS} | {"per_class": per_class}


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that have the figure: (R, C) to (R,), NaN where none has."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(1) / known.sum(1)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _compact(value: float | None, interval: list[float] | None) -> str:
    return format_metric(value) + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval and value is not None else "")
