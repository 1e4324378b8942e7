"""Scores of predictions: pure functions of probabilities and labels.

In: (N, C) probabilities and (N,) labels. Out: plain numbers. What stays true: what is not defined (a class without
images) is None, never a silent zero, and averages are over the classes that have images.
"""

import numpy as np
from sklearn.metrics import confusion_matrix, roc_auc_score

HIGHER_IS_BETTER = {"loss": False, "balanced_accuracy": True, "macro_f1": True}


def score(probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict:
    """Score predictions; a picture's prediction is its most probable class.

    Args:
        probabilities: (N, C), each row sums to 1. labels: (N,) integers. classes: C names.

    Returns:
        images, loss (mean negative log probability of the label, nats), accuracy, balanced_accuracy (mean recall),
        macro_f1, macro_auc (mean one-vs-rest area under the ROC curve), per_class (precision, recall, f1, auc,
        images), confusion (C rows of labels, C columns of predictions).

    Raises:
        ValueError: nothing to score, probabilities that are not finite or do not sum to 1, unknown labels.
    """
    _check(probabilities, labels, classes)
    confusion = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes)))
    per_class = {name: _class_score(number, probabilities, labels, confusion) for number, name in enumerate(classes)}
    present = [scores for scores in per_class.values() if scores["images"]]
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "images": len(labels),
        "loss": float(-np.log(own.clip(np.finfo(np.float32).tiny)).mean()),
        "accuracy": float(confusion.trace() / confusion.sum()),
        "balanced_accuracy": _mean([scores["recall"] for scores in present]),
        "macro_f1": _mean([scores["f1"] for scores in present]),
        "macro_auc": _mean([scores["auc"] for scores in present]),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def table(scores: dict) -> str:
    """The per-class table of `score`, for people."""
    columns = ("precision", "recall", "f1", "auc")
    width = max(10, *(len(name) + 2 for name in scores["per_class"]))
    lines = [f"{'class':<{width}}{'images':>8}" + "".join(f"{name:>13}" for name in columns)]
    for name, row in scores["per_class"].items():
        lines.append(f"{name:<{width}}{row['images']:>8}" + "".join(f"{_shown(row[column]):>13}" for column in columns))
    totals = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auc", "loss")
    lines.append(",  ".join(f"{name.replace('_', ' ')} {_shown(scores[name])}" for name in totals))
    return "\n".join(lines)


def _class_score(number: int, probabilities: np.ndarray, labels: np.ndarray, confusion: np.ndarray) -> dict:
    hits, images, predicted = confusion[number, number], confusion[number].sum(), confusion[:, number].sum()
    both_kinds = 0 < images < len(labels)
    return {
        "precision": float(hits / predicted) if predicted else None,
        "recall": float(hits / images) if images else None,
        "f1": float(2 * hits / (images + predicted)) if images else None,
        "auc": float(roc_auc_score(labels == number, probabilities[:, number])) if both_kinds else None,
        "images": int(images),
    }


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


def _mean(values: list) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
