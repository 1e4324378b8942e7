"""Split protocols: pure functions of a catalogue's table and a seed.

In: the table of a `Catalogue`. Out: a `Split`, naming for every row the split it is stored in or why it is left out.
What stays true: no group is in two stored splits; the result does not depend on the order of the rows, but for which
image of a group is its first.
"""

import hashlib
from dataclasses import dataclass, field
from math import floor

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Where each row of a catalogue goes.

    protocol: name and parameters, as recorded in `dataset.json`.
    rows: split name -> row numbers, in the order in which they are stored (shuffled by hash).
    left_out: row number -> the reason why it is stored nowhere.
    aliases: split names that are another split under a second name ({"test": "val"}).
    warnings: what a reader of a score from this split must be told.
    """

    protocol: dict
    rows: dict[str, np.ndarray]
    left_out: dict[int, str]
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def lesion(images: pd.DataFrame, seed: int = 0, fractions: tuple[float, float, float] = (0.70, 0.15, 0.15)) -> Split:
    """Lesion-grouped, stratified: the groups of each class, sorted by hash, are cut at the fractions.

    Train keeps every image of its groups; validation and test keep the first image of each group, so that a lesion
    photographed six times does not count six times in a score.

    Args:
        images: catalogue table with `image_id, label, group`.
        seed: another seed gives another split.
        fractions: shares of each class's groups for train, val, test; they sum to 1.

    Raises:
        ValueError: fractions that are no shares of 1, or a class with fewer groups than splits.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(
            f"The 'fractions' of a split must be three positive shares that sum to 1. Got {fractions} instead."
        )
    split_of = {}
    for label, groups in images.groupby("label")["group"].unique().items():
        if len(groups) < len(SPLITS):
            raise ValueError(
                f"Class {label} has {len(groups)} group(s), fewer than the {len(SPLITS)} splits. "
                "Add images of other lesions of that class, or leave the class out of the source."
            )
        ordered = _by_hash(groups, seed)
        n_val, n_test = (max(1, floor(len(ordered) * share + 0.5)) for share in fractions[1:])
        n_train = max(1, len(ordered) - n_val - n_test)
        cuts = {
            "train": ordered[:n_train],
            "val": ordered[n_train : n_train + n_val],
            "test": ordered[n_train + n_val :],
        }
        split_of |= {group: name for name, members in cuts.items() for group in members}
    names = images["group"].map(split_of)
    repeated = images["group"].duplicated() & (names != "train")
    rows = {name: _stored(images, (names == name) & ~repeated, seed) for name in SPLITS}
    reasons = {
        int(row): f"{names.iloc[row]} keeps one image a group, and another of {images['group'].iloc[row]} is kept"
        for row in np.flatnonzero(repeated)
    }
    return Split({"name": "lesion", "seed": seed, "fractions": list(fractions)}, rows, reasons)


def seed(images: pd.DataFrame, seed: int = 0) -> Split:
    """The 2021 notebook's split without its leak: the first image of each lesion, 80/20 per class.

    `int(0.8 n)` images of each class train, the others validate. There is no third split: validation doubles as the
    test split, as it did in the notebook, and that is recorded as a warning.

    Args:
        images: catalogue table with `image_id, label, group`.
        seed: another seed gives another split.
    """
    first = ~images["group"].duplicated()
    train = pd.Series(False, index=images.index)
    for label, members in images[first].groupby("label"):
        ordered = _by_hash(members["image_id"], seed)
        n_train = int(0.8 * len(ordered))
        if n_train == 0 or n_train == len(ordered):
            raise ValueError(
                f"Class {label} has {len(ordered)} group(s): too few to train and validate. Add images of it."
            )
        train |= images["image_id"].isin(ordered[:n_train])
    rows = {"train": _stored(images, train, seed), "val": _stored(images, first & ~train, seed)}
    reasons = {
        int(row): f"one image a group is kept, and another of {images['group'].iloc[row]} is"
        for row in np.flatnonzero(~first)
    }
    warning = "validation doubles as the test split: test scores are of images that chose the weights"
    return Split({"name": "seed", "seed": seed}, rows, reasons, {"test": "val"}, (warning,))


def assert_disjoint(images: pd.DataFrame, split: Split) -> None:
    """Refuse a split that puts one group in two places, or an image in two places or none.

    Raises:
        ValueError: naming a group or an image, and where it was found.
    """
    home: dict[str, str] = {}
    for name, rows in split.rows.items():
        for group in images["group"].iloc[rows].unique():
            if home.setdefault(group, name) != name:
                raise ValueError(
                    f"Group {group} is in {home[group]} and in {name}: scores would leak. Mend the protocol."
                )
    placed = np.concatenate([*split.rows.values(), np.fromiter(split.left_out, dtype=np.int64)])
    if not np.array_equal(np.sort(placed), np.arange(len(images))):
        raise ValueError("A split must place each image once or say why it is left out; this one does not.")


def _by_hash(names, seed: int) -> list[str]:
    """Names in an order that depends on the seed and on nothing else."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def _stored(images: pd.DataFrame, chosen: pd.Series, seed: int) -> np.ndarray:
    row_of = dict(zip(images["image_id"], range(len(images)), strict=True))
    return np.array([row_of[name] for name in _by_hash(images["image_id"][chosen], seed)], dtype=np.int64)
