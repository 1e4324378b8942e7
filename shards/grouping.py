"""A `Split`, and the parts that split protocols are made of: hash order, cuts inside each class, a held-out test set.

In: the table of a `Catalogue` and a seed. Out: a `Split`, or which split a group or an image goes to.
Invariants: an order depends on names and the seed alone, not on the order of the rows; train keeps every image of
its groups, evaluation splits keep one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sized
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
VAL_IS_TEST = "validation doubles as the test split: test scores are of images that chose the weights"


@dataclass(frozen=True)
class Split:
    """Where each row of a catalogue goes.

    protocol: name and parameters, as recorded in `dataset.json`; `leaks` is there, and true, for study protocols.
    rows: split name -> row numbers, in the order in which they are stored (shuffled by hash).
    left_out: row number -> the reason why it is stored nowhere.
    aliases: split names that are another split under a second name ({"test": "val"}).
    warnings: what a reader of a score from this split must be told. notes: what who packs must be told.
    """

    protocol: dict
    rows: dict[str, np.ndarray]
    left_out: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def leaks(self) -> bool:
        """Whether training groups are in evaluation splits, on purpose."""
        return self.protocol.get("leaks", False)


def split_of_groups(images: pd.DataFrame, split_of: dict[str, str], seed: int, protocol: dict) -> Split:
    """A split by group: train keeps all images, the others the first of each group."""
    names = split_names(column_of(images, "group"), split_of)
    repeated = is_repeated(images) & (names != "train")
    parts = [name for name in SPLITS if name in set(split_of.values())]
    rows = {name: stored_rows(images, (names == name) & ~repeated, seed) for name in parts}
    left_out: dict[int, str] = {}
    for name in parts[1:]:
        left_out |= one_image_reasons(images, repeated & (names == name), name)
    return Split(protocol, rows, left_out)


def cut_classes(images: pd.DataFrame, column: str, seed: int, fractions: tuple[float, ...]) -> dict[str, str]:
    """Group or image -> split, cut at the fractions inside each class; `column` holds what is cut.

    Raises:
        ValueError: fractions that are not positive or do not sum to 1, or a class with fewer members than splits.
    """
    check_fractions(fractions)
    split_of: dict[str, str] = {}
    for label, members in names_by_class(images, column).items():
        require_groups(label, members, len(fractions), "splits")
        ordered = sort_by_hash(members, seed)
        counts = [max(1, floor(len(ordered) * share + 0.5)) for share in fractions[1:]]
        cuts = np.cumsum([max(1, len(ordered) - sum(counts)), *counts])
        for name, part in zip(SPLITS, np.split(np.array(ordered, dtype=object), cuts[:-1]), strict=False):
            split_of |= dict.fromkeys(part, name)
    return split_of


def check_fractions(fractions: tuple[float, ...]) -> None:
    """Refuse fractions that are not positive or do not sum to 1.

    Raises:
        ValueError: naming them.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"The 'fractions' of a split must be positive shares that sum to 1. Got {fractions} instead.")


def names_by_class(images: pd.DataFrame, column: str) -> dict[str, list[str]]:
    """Class -> the different names in a column (groups or image ids) of its images."""
    found: dict[str, dict[str, None]] = {label: {} for label in sorted(set(images["label"]))}
    for label, name in zip(images["label"], images[column], strict=True):
        found[label][name] = None  # a dict keeps the order of the rows, and each name once
    return {label: list(names) for label, names in found.items()}


def column_of(images: pd.DataFrame, column: str) -> np.ndarray:
    """A column's text, (n,) object."""
    return images[column].to_numpy(dtype=object)


def is_in(names: np.ndarray, chosen: Collection[str]) -> np.ndarray:
    """Which names, (n,) object, are chosen: (n,) bool."""
    return np.fromiter((name in chosen for name in names), dtype=bool, count=len(names))


def is_repeated(images: pd.DataFrame) -> np.ndarray:
    """Which images are not the first of their group in the table: (n,) bool."""
    return images["group"].duplicated().to_numpy(dtype=bool)


def split_names(names: np.ndarray, split_of: dict[str, str]) -> np.ndarray:
    """The split of each group or image id: (n,) object."""
    return np.array([split_of[name] for name in names], dtype=object)


def one_image_reasons(images: pd.DataFrame, repeated: np.ndarray, split_name: str) -> dict[int, str]:
    """Row -> why it is left out, for the further images of a group."""
    groups = column_of(images, "group")
    return {
        int(row): f"{split_name} keeps one image a group, and another of {groups[row]} is kept"
        for row in np.flatnonzero(repeated)
    }


def require_groups(label: str, members: Sized, least: int, what: str) -> None:
    """Refuse a class that is too small to be cut.

    Raises:
        ValueError: fewer members than `least`; `what` names the parts in the error.
    """
    if len(members) < least:
        raise ValueError(
            f"Class {label} has {len(members)} group(s), fewer than the {least} {what}. "
            "Add images of other groups of that class, or leave the class out of the source."
        )


def sort_by_hash(names: Iterable[str], seed: int | str) -> list[str]:
    """Names in an order that depends on the seed alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def stored_rows(images: pd.DataFrame, chosen: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers, int64, of the chosen images, (n,) bool, in stored order: shuffled by hash."""
    ids = column_of(images, "image_id")
    row_of = dict(zip(ids, range(len(ids)), strict=True))
    return np.array([row_of[name] for name in sort_by_hash(ids[chosen], seed)], dtype=np.int64)
