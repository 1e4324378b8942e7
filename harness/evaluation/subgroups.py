"""Metrics by subgroup: images with the same value of a column of the source, such as sex or age.

In: a column's values as text, probabilities and labels. Out: plain numbers by value. Invariants: each image is in exactly
one subgroup of a column; subgroups that are too small to rely on are marked, not hidden.
"""

from decimal import Decimal
from math import floor, log10
from typing import Any

import numpy as np
import pandas as pd

from harness.evaluation.metrics import compute_metrics, pick

SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "macro_auc")
MIN_SUBGROUP = 30  # images below which a subgroup's metrics say little
MAX_BINS = 6  # of a numeric column
LARGEST = 1e300  # of numbers whose differences are finite


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
    """Values of a column as subgroups: text as it is, many numbers in bins, `unknown` where there is none or no finite one.

    Args:
        values: (N,) text.

    Returns:
        (N,) ordered categories.
    """
    is_empty = values.isin(["", "nan", "None", "unknown"])
    is_empty |= pd.to_numeric(values, errors="coerce").abs() > LARGEST
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
    power = floor(log10(numbers.max() - numbers.min())) - 1  # so that a few more hold them all
    widths = (Decimal(digit).scaleb(power + more) for more in range(3) for digit in (1, 2, 5))
    width = next(w for w in widths if numbers.max() // float(w) - numbers.min() // float(w) < MAX_BINS)
    bins = numbers // float(width)
    last = width - 1 if width >= 1 and (numbers % 1 == 0).all() else width  # whole numbers: 20 to 39
    names = {
        bin_: f"{_exact(int(bin_) * width)} to {_exact(int(bin_) * width + last)}" for bin_ in sorted(bins.unique())
    }
    return bins.map(names), list(names.values())


def _exact(number: Decimal) -> str:
    """All its digits, where they can be read; two ends of one bin never look alike."""
    return f"{number:f}".rstrip("0").rstrip(".") if number % 1 else f"{number:.0f}"
