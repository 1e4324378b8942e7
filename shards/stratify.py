"""Groups with images of several classes (a patient with several lesions), shared out so that each class keeps its fractions; holdouts.

In: the table of a `Catalogue`, a seed, fractions. Out: the part of each group. Invariants: a group is in one part; which depends on
names and the seed, not on the order of the rows; the shares of the classes deviate by no more than `deviation_bound`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from typing import TYPE_CHECKING

import numpy as np

from shards.grouping import (
    SPLITS,
    VAL_IS_TEST,
    Split,
    column_of,
    is_in,
    is_repeated,
    names_by_class,
    one_image_reasons,
    require_groups,
    sort_by_hash,
    stored_rows,
)

if TYPE_CHECKING:
    import pandas as pd


def has_mixed_groups(images: pd.DataFrame) -> bool:
    """Whether some group has images of several classes."""
    seen: dict[str, str] = {}
    return any(
        seen.setdefault(group, label) != label for group, label in zip(images["group"], images["label"], strict=True)
    )


def share_out(images: pd.DataFrame, seed: int | str, fractions: tuple[float, ...]) -> dict[str, int]:
    """Group -> number of its part, 0 to K - 1, so that each part has its fraction of the images of each class, as near as may be.

    Groups are taken in turn, those with the largest share of a class first (then by hash), and each goes where it adds least to
    the sum over parts and classes of squared deviations from the fractions of what was shared out so far. A random choice
    would keep that sum at `deviation_bound` in the mean, and this one is never worse (the method of conditional expectations;
    Spencer, 1994).

    Args:
        images: with `group` and `label`. fractions: K shares that sum to 1.
    """
    names, counts = _class_shares(images)  # counts: (G, C), each class sums to 1
    hashed = {name: place for place, name in enumerate(sort_by_hash(names, seed))}
    order = sorted(range(len(names)), key=lambda row: (-counts[row].max(), hashed[names[row]]))
    wanted, deviation, part_of = np.array(fractions)[:, None], np.zeros((len(fractions), counts.shape[1])), {}
    for row in order:
        deviation -= wanted * counts[row]
        part = int(np.argmin(deviation @ counts[row]))
        deviation[part] += counts[row]
        part_of[names[row]] = part
    return part_of


def deviation_bound(images: pd.DataFrame, fractions: tuple[float, ...]) -> float:
    """What the squared deviations of `share_out`, summed over parts and classes, cannot exceed.

    (1 - sum of f^2) * sum over groups and classes of (images of the class in the group / images of the class)^2.
    """
    _, counts = _class_shares(images)
    return float((1 - np.square(fractions).sum()) * np.square(counts).sum())


def deviations(images: pd.DataFrame, part_of: dict[str, int], fractions: tuple[float, ...]) -> np.ndarray:
    """Share of each class's images in each part, minus its fraction: (K, C), classes in alphabetical order."""
    names, counts = _class_shares(images)
    found = np.zeros((len(fractions), counts.shape[1]))
    np.add.at(found, [part_of[name] for name in names], counts)
    return found - np.array(fractions)[:, None]


def describe_deviation(images: pd.DataFrame, part_of: dict[str, int], fractions: tuple[float, ...]) -> str:
    """The largest deviation from the asked fractions, in one line."""
    found = deviations(images, part_of, fractions)
    part, number = np.unravel_index(np.abs(found).argmax(), found.shape)
    label, share = sorted(set(images["label"]))[number], found[part, number] + fractions[part]
    name = SPLITS[part] if len(fractions) <= len(SPLITS) else f"fold {part}"
    return (
        f"groups with several classes stay whole: shares of the classes are within {np.abs(found).max():.3f} of those asked for "
        f"(furthest: {label} in {name}, {share:.3f} instead of {fractions[part]:.3f})"
    )


def connect(images: pd.DataFrame, columns: list[str]) -> list[str]:
    """A group for each row: rows that share a value of any of the columns, directly or through others, are in one.

    It is named by the smallest value of the first column in it, so that the order of the rows does not matter.
    """
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    rows = list(zip(*(column_of(images, column) for column in columns), strict=True))
    for values in rows:
        first, *others = zip(columns, values, strict=True)
        for other in others:
            if other[1]:  # a blank connects nothing
                parent[root(other)] = root(first)
    named: dict[tuple[str, str], str] = {}
    for values in rows:
        found = root((columns[0], values[0]))
        named[found] = min(named.get(found, values[0]), values[0])
    return [named[root((columns[0], values[0]))] for values in rows]


def with_holdout(images: pd.DataFrame, fraction: float, protocol: Callable[[pd.DataFrame], Split]) -> Split:
    """Cut a common test set of groups first, then apply a protocol (that leaves no test split) to the others.

    Which groups are held out depends on their names alone, neither on the protocol nor on its seed: splits made with
    the same fraction are tested on the same unseen images, one of each group.

    Raises:
        ValueError: a fraction outside 0 to 1, or a class too small for it.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"'--holdout' must be a share of the groups between 0 and 1. Got {fraction} instead.")
    mixed = has_mixed_groups(images)
    held: set[str] = set()
    if mixed:
        part_of = share_out(images, "holdout", (1 - fraction, fraction))
        held = {group for group, part in part_of.items() if part}
    for label, groups in names_by_class(images, "group").items() if not mixed else ():
        require_groups(label, groups, 2, "parts")
        n = min(len(groups) - 1, max(1, floor(len(groups) * fraction + 0.5)))
        held |= set(sort_by_hash(groups, "holdout")[:n])
    is_held = is_in(column_of(images, "group"), held)
    rest = np.flatnonzero(~is_held)
    inner = protocol(images.iloc[rest].reset_index(drop=True))
    rows = {name: rest[members] for name, members in inner.rows.items()}
    repeated = is_held & is_repeated(images) & (not mixed)
    rows["test"] = stored_rows(images, is_held & ~repeated, 0)
    left_out = {int(rest[row]): reason for row, reason in inner.left_out.items()}
    left_out |= one_image_reasons(images, repeated, "test")
    warnings = tuple(warning for warning in inner.warnings if warning != VAL_IS_TEST)
    return Split(inner.protocol | {"holdout": fraction}, rows, left_out, {}, warnings, inner.notes)


def _class_shares(images: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Names of the G groups, sorted, and the share of each class's images that is in each: (G, C)."""
    names = sorted(set(images["group"]))
    labels = sorted(set(images["label"]))
    row_of, number_of = ({name: place for place, name in enumerate(of)} for of in (names, labels))
    counts = np.zeros((len(names), len(labels)))
    rows = [row_of[name] for name in images["group"]]
    np.add.at(counts, (rows, [number_of[label] for label in images["label"]]), 1)
    return names, counts / counts.sum(0)
