"""Split protocols: pure functions of a catalogue's table and a seed.

In: the table of a `Catalogue`. Out: a `Split`, naming for every row the splits it is stored in or why it is left out.
What stays true: no group is in two stored splits, but for the study protocols that exist to show what that does, and
those say so; what is chosen depends on names and the seed, not on the order of the rows, but for which image of a
group is its first.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import floor

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "test")
FRACTIONS = (0.70, 0.15, 0.15)
NOT_A_LESION = "ISIC_0035068"  # in the challenge's test images by way of a joke: no lesion
VAL_IS_TEST = "validation doubles as the test split: test scores are of images that chose the weights"


@dataclass(frozen=True)
class Split:
    """Where each row of a catalogue goes.

    protocol: name and parameters, as recorded in `dataset.json`; `leaks` is there, and true, for study protocols.
    rows: split name -> row numbers, in the order in which they are stored (shuffled by hash).
    left_out: row number -> the reason why it is stored nowhere.
    aliases: split names that are another split under a second name ({"test": "val"}).
    warnings: what a reader of a score from this split must be told.
    """

    protocol: dict
    rows: dict[str, np.ndarray]
    left_out: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def leaks(self) -> bool:
        """Whether training groups are in evaluation splits, on purpose."""
        return self.protocol.get("leaks", False)


def split_by_lesion(images: pd.DataFrame, seed: int = 0, fractions: tuple[float, ...] = FRACTIONS) -> Split:
    """Lesion-grouped, stratified: the groups of each class, sorted by hash, are cut at the fractions.

    Train keeps every image of its groups; validation and test keep the first image of each group, so that a lesion
    photographed six times does not count six times in a score.

    Args:
        images: catalogue table with `image_id, label, group`.
        seed: another seed gives another split.
        fractions: shares of each class's groups for train, val and (unless it is held out) test; they sum to 1.

    Raises:
        ValueError: fractions that are no shares of 1, or a class with fewer groups than splits.
    """
    split_of = _cut_classes(images, "group", seed, fractions)
    return _grouped(images, split_of, seed, {"name": "lesion", "seed": seed, "fractions": list(fractions)})


def split_by_fold(images: pd.DataFrame, seed: int, n_folds: int, fold: int, held_out: bool = False) -> Split:
    """Lesion-grouped, stratified cross-validation: the groups of each class, sorted by hash, are dealt to the folds.

    Fold number `fold` is the test split and the next one validates; where a test set is held out, `fold` validates.

    Raises:
        ValueError: fewer than three folds, no such fold, or a class with fewer groups than folds.
    """
    if n_folds < 3 or not 0 <= fold < n_folds:
        raise ValueError(f"'--folds' must be at least 3 and '--fold' from 0 to one less. Got {n_folds} and {fold}.")
    roles = {fold: "val"} if held_out else {fold: "test", (fold + 1) % n_folds: "val"}
    split_of = {}
    for label, groups in images.groupby("label")["group"].unique().items():
        _enough(label, groups, n_folds, "folds")
        split_of |= {group: roles.get(place % n_folds, "train") for place, group in enumerate(_by_hash(groups, seed))}
    protocol = {"name": "lesion", "seed": seed, "folds": n_folds, "fold": fold}
    return _grouped(images, split_of, seed, protocol)


def split_by_image(images: pd.DataFrame, seed: int = 0, fractions: tuple[float, ...] = FRACTIONS) -> Split:
    """Image-level, stratified, all images kept: a study of what that inflates, since lesions land in several splits."""
    split_of = _cut_classes(images, "image_id", seed, fractions)
    names = images["image_id"].map(split_of)
    rows = {name: _stored(images, names == name, seed) for name in SPLITS[: len(fractions)]}
    warning = "split by image: images of one lesion are in several splits, and scores are too high"
    protocol = {"name": "image", "seed": seed, "fractions": list(fractions), "leaks": True}
    return Split(protocol, rows, warnings=(warning,))


def split_notebook(images: pd.DataFrame, seed: int = 0) -> Split:
    """The 2021 notebook's split without its leak: the first image of each lesion, 80/20 per class.

    `int(0.8 n)` images of each class train, the others validate. There is no third split: validation doubles as the
    test split, as it did in the notebook, and that is recorded as a warning.

    Args:
        images: catalogue table with `image_id, label, group`.
        seed: another seed gives another split.
    """
    return _notebook(images, seed, {"name": "notebook", "seed": seed}, lambda ordered, n: (ordered[:n], ordered[n:]))


def split_notebook_leaky(images: pd.DataFrame, seed: int = 0) -> Split:
    """The 2021 notebook's split with its leak: both parts are taken from the front of one shuffled list.

    Every validation image is a training image, and the last 20 % of each class are used nowhere. A study of what that
    does to a score.
    """
    protocol = {"name": "notebook-leaky", "seed": seed, "leaks": True}
    split = _notebook(images, seed, protocol, lambda ordered, n: (ordered[:n], ordered[: len(ordered) - n]))
    warning = "every validation image is a training image (the 2021 notebook's mistake): scores mean nothing"
    return replace(split, warnings=(warning, *split.warnings))


def split_isic2018(images: pd.DataFrame, seed: int = 0) -> Split:
    """Train and validation from HAM10000 (.85/.15 of the lesions), test from the challenge's own test images.

    Args:
        images: catalogue table whose column `part` says train (HAM10000) or test (the challenge's 1,512 images).
    """
    column = pd.Series(np.where(images["part"] == "test", "test", ""), index=images.index)
    egg = images["image_id"] == NOT_A_LESION
    ham = np.flatnonzero((column == "") & ~egg)
    inner = split_by_lesion(images.iloc[ham], seed, (0.85, 0.15))
    rows = {name: ham[members] for name, members in inner.rows.items()}
    rows["test"] = _stored(images, (column == "test") & ~egg, seed)
    left_out = {int(ham[row]): reason for row, reason in inner.left_out.items()}
    left_out |= {int(row): "the challenge's easter egg: it shows no lesion" for row in np.flatnonzero(egg)}
    return Split({"name": "isic2018", "seed": seed, "fractions": [0.85, 0.15]}, rows, left_out)


def split_by_column(images: pd.DataFrame, name: str, seed: int = 0) -> Split:
    """The source already says train, val or test in a column; every image is kept where it says.

    Without test rows, validation doubles as the test split.

    Raises:
        ValueError: no such column, other words in it, no train or val rows, or a group in two splits.
    """
    if name not in images.columns:
        raise ValueError(f"The source has no column {name!r} to split by. It has: {', '.join(images.columns)}.")
    words = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    names = images[name].str.strip().str.lower().map(words)
    if names.isna().any():
        odd = images[name][names.isna()].unique()
        raise ValueError(
            f"The column {name!r} must say train, val or test. Found also: {', '.join(map(repr, odd[:5]))}."
        )
    missing = {"train", "val"} - set(names)
    if missing:
        raise ValueError(
            f"The column {name!r} has no {' and no '.join(sorted(missing))} rows. Use --protocol lesion instead."
        )
    rows = {part: _stored(images, names == part, seed) for part in SPLITS if (names == part).any()}
    alias = {} if "test" in rows else {"test": "val"}
    return Split({"name": f"column:{name}", "seed": seed}, rows, {}, alias, (VAL_IS_TEST,) if alias else ())


def external_test(images: pd.DataFrame, seed: int = 0) -> Split:
    """Every image is test: a set of another origin, to evaluate models on that were trained elsewhere."""
    return Split({"name": "test", "seed": seed}, {"test": _stored(images, images["label"].notna(), seed)})


def with_holdout(images: pd.DataFrame, fraction: float, protocol: Callable[[pd.DataFrame], Split]) -> Split:
    """Cut a common test set of groups first, then apply a protocol (that leaves no test split) to the others.

    Which groups are held out depends on their names alone, neither on the protocol nor on its seed: splits made with
    the same fraction are tested on the same unseen images, one of each group.

    Raises:
        ValueError: a fraction that is no share, or a class too small for it.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"'--holdout' must be a share of the groups between 0 and 1. Got {fraction} instead.")
    held: set[str] = set()
    for label, groups in images.groupby("label")["group"].unique().items():
        _enough(label, groups, 2, "parts")
        n = min(len(groups) - 1, max(1, floor(len(groups) * fraction + 0.5)))
        held |= set(_by_hash(groups, "holdout")[:n])
    is_held = images["group"].isin(held)
    rest = np.flatnonzero(~is_held)
    inner = protocol(images.iloc[rest].reset_index(drop=True))
    rows = {name: rest[members] for name, members in inner.rows.items()}
    repeated = is_held & images["group"].duplicated()
    rows["test"] = _stored(images, is_held & ~repeated, 0)
    left_out = {int(rest[row]): reason for row, reason in inner.left_out.items()} | _one_image(images, repeated, "test")
    warnings = tuple(warning for warning in inner.warnings if warning != VAL_IS_TEST)
    return Split(inner.protocol | {"holdout": fraction}, rows, left_out, {}, warnings)


def check_split(images: pd.DataFrame, split: Split) -> None:
    """Refuse a split that loses an image, tests what it does not train, or leaks without saying so.

    Raises:
        ValueError: naming a group and where it was found, or an image.
    """
    placed = np.concatenate([*split.rows.values(), np.fromiter(split.left_out, dtype=np.int64)])
    if not np.array_equal(np.unique(placed), np.arange(len(images))):
        raise ValueError("A split must place each image or say why it is left out; this one does not.")
    trained = set(images["label"].iloc[split.rows["train"]]) if "train" in split.rows else set(images["label"])
    for name, rows in split.rows.items():
        if unknown := sorted(set(images["label"].iloc[rows]) - trained):
            raise ValueError(
                f"The {name} split has classes that train has not: {', '.join(unknown)}. Add training images of them."
            )
    if split.leaks:
        return
    split_of: dict[str, str] = {}
    for name, rows in split.rows.items():
        for group in images["group"].iloc[rows].unique():
            if split_of.setdefault(group, name) != name:
                raise ValueError(
                    f"Group {group} is in {split_of[group]} and in {name}: scores would leak. "
                    "Give each group one split, or let `--protocol lesion` split."
                )
    if len(np.unique(placed)) != len(placed):
        raise ValueError("A split must place each image once; this one places some twice.")


def _cut_classes(images: pd.DataFrame, unit: str, seed: int, fractions: tuple[float, ...]) -> dict[str, str]:
    """Group or image -> split, cut at the fractions inside each class; `unit` is the column that is cut."""
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"The 'fractions' of a split must be positive shares that sum to 1. Got {fractions} instead.")
    split_of = {}
    for label, members in images.groupby("label")[unit].unique().items():
        _enough(label, members, len(fractions), "splits")
        rest = _by_hash(members, seed)
        counts = [max(1, floor(len(rest) * share + 0.5)) for share in fractions[1:]]
        n_train = max(1, len(rest) - sum(counts))
        cuts = np.cumsum([n_train, *counts])
        for name, part in zip(SPLITS, np.split(np.array(rest, dtype=object), cuts[:-1]), strict=False):
            split_of |= dict.fromkeys(part, name)
    return split_of


def _grouped(images: pd.DataFrame, split_of: dict[str, str], seed: int, protocol: dict) -> Split:
    """A split by group: train keeps all images, the others the first of each group."""
    names = images["group"].map(split_of)
    repeated = images["group"].duplicated() & (names != "train")
    parts = [name for name in SPLITS if name in set(split_of.values())]
    rows = {name: _stored(images, (names == name) & ~repeated, seed) for name in parts}
    left_out = {}
    for name in parts[1:]:
        left_out |= _one_image(images, repeated & (names == name), name)
    return Split(protocol, rows, left_out)


def _notebook(images: pd.DataFrame, seed: int, protocol: dict, cut: Callable) -> Split:
    first = ~images["group"].duplicated()
    chosen: dict[str, set[str]] = {"train": set(), "val": set()}
    for label, members in images[first].groupby("label"):
        ordered = _by_hash(members["image_id"], seed)
        _enough(label, ordered, 2, "splits")
        for part, names in zip(chosen, cut(ordered, int(0.8 * len(ordered))), strict=True):
            chosen[part] |= set(names)
    rows = {part: _stored(images, images["image_id"].isin(names), seed) for part, names in chosen.items()}
    unused = first & ~images["image_id"].isin(chosen["train"] | chosen["val"])
    left_out = _one_image(images, ~first, "every split")
    left_out |= {int(row): "the notebook uses it nowhere" for row in np.flatnonzero(unused)}
    return Split(protocol, rows, left_out, {"test": "val"}, (VAL_IS_TEST,))


def _one_image(images: pd.DataFrame, repeated: pd.Series, name: str) -> dict[int, str]:
    """Why the further images of a group are left out."""
    groups = images["group"]
    return {
        int(row): f"{name} keeps one image a group, and another of {groups.iloc[row]} is kept"
        for row in np.flatnonzero(repeated)
    }


def _enough(label: str, members, least: int, what: str) -> None:
    if len(members) < least:
        raise ValueError(
            f"Class {label} has {len(members)} group(s), fewer than the {least} {what}. "
            "Add images of other lesions of that class, or leave the class out of the source."
        )


def _by_hash(names: Iterable[str], seed: int | str) -> list[str]:
    """Names in an order that depends on the seed and on nothing else."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())


def _stored(images: pd.DataFrame, chosen: pd.Series, seed: int) -> np.ndarray:
    row_of = dict(zip(images["image_id"], range(len(images)), strict=True))
    return np.array([row_of[name] for name in _by_hash(images["image_id"][chosen], seed)], dtype=np.int64)
