"""Metrics by subgroup: images with the same value of a column of the source, such as sex or age.

In: a column's values as text, probabilities and labels. Out: plain numbers by value. Invariants: each image is in exactly
one subgroup of a column; subgroups that are too small to rely on are marked, not hidden.
"""

from typing import Any

import numpy as np
import pandas as pd

from harness.evaluation.metrics import compute_metrics, pick

SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "macro_auc")
MIN_SUBGROUP = 30  # images below which a subgroup's metrics say little
MAX_BINS = 6  # of a numeric column


def subgroup_metrics(
    values: pd.Series, probabilities: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], groups: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Metrics of the images with each value of a column.

    Args:
        values: (N,) text. probabilities: (N, C). labels: (N,) integers. classes: C names. groups: (N,) names of what is
            independent.

    Returns:
        {value: {images, groups, small, metrics, intervals}}; small: fewer than `MIN_SUBGROUP` images.
    """
    subgroups, binned = {}, bin_values(values)
    for value in binned.cat.categories:
        here = (binned == value).to_numpy()
        metrics = compute_metrics(probabilities[here], labels[here], classes, groups[here])
        counts = {
            "images": int(here.sum()),
            "groups": len(np.unique(groups[here])),
            "small": bool(here.sum() < MIN_SUBGROUP),
        }
        subgroups[str(value)] = counts | pick(metrics, SUBGROUP_METRICS)
    return subgroups


def bin_values(values: pd.Series) -> pd.Series:
    """Values of a column as subgroups: text as it is, many numbers in bins, `unknown` where there is none.

    Args:
        values: (N,) text.

    Returns:
        (N,) ordered categories.
    """
    is_empty = values.isin(["", "nan", "None", "unknown"])
    known = pd.Series(values[~is_empty])
    numbers = pd.Series(pd.to_numeric(known, errors="coerce"), known.index)
    if len(numbers) and numbers.notna().all() and numbers.nunique() > MAX_BINS:
        bins, order = _bin_numbers(numbers)
    else:
        bins, order = known, sorted(known.unique())
    binned = bins.reindex(index=values.index, fill_value="unknown")
    return pd.Series(pd.Categorical(binned, [*order, "unknown"] if is_empty.any() else order), values.index)


def _bin_numbers(numbers: pd.Series) -> tuple[pd.Series, list[str]]:
    """Names of the bins that numbers fall into, (N,), and the bins in order; their width is 1, 2 or 5 times a power of ten."""
    widths = (digit * 10.0**power for power in range(-6, 12) for digit in (1, 2, 5))
    width = next(w for w in widths if numbers.max() // w - numbers.min() // w < MAX_BINS)
    lows = (numbers // width) * width
    last = width - 1 if width >= 1 and (numbers % 1 == 0).all() else width  # whole numbers: 20 to 39
    names = {low: f"{low:g} to {low + last:g}" for low in sorted(lows.unique())}
    return lows.map(names), list(names.values())
