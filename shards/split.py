"""Split protocols: pure functions of a catalogue's table and a seed, and the one table that names them.

In: the table of a `Catalogue`. Out: a `Split`, naming for every row the splits it is stored in or why it is left out.
Invariants: no group is in two stored splits, except in study protocols, which are marked as leaking; what is chosen
depends on names and the seed, and on the order of the rows only for which image of a group is its first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shards.grouping import (
    SPLITS,
    VAL_IS_TEST,
    Split,
    check_fractions,
    column_of,
    cut_classes,
    is_in,
    is_repeated,
    names_by_class,
    one_image_reasons,
    require_groups,
    sort_by_hash,
    split_names,
    split_of_groups,
    stored_rows,
)
from shards.stratify import describe_deviation, has_mixed_groups, share_out, with_holdout

if TYPE_CHECKING:
    import pandas as pd  # `pack --help` describes the protocols without waiting for pandas

FRACTIONS = (0.70, 0.15, 0.15)
NOT_A_LESION = "ISIC_0035068"  # among the challenge's test images as a joke: it shows no lesion


def split_by_lesion(images: pd.DataFrame, seed: int = 0, fractions: tuple[float, ...] = FRACTIONS) -> Split:
    """Lesion-grouped, stratified: the groups of each class, sorted by hash, are cut at the fractions.

    Train keeps every image of its groups; validation and test keep the first image of each group, so that a lesion
    photographed six times does not count six times in a score. Where groups have images of several classes (patients), whole
    groups are shared out as `stratify.share_out` says, and all of their images are kept.

    Args:
        images: catalogue table with `image_id, label, group`.
        seed: a different seed gives a different split.
        fractions: shares of each class's groups for train, val and (unless it is held out) test; they sum to 1.

    Raises:
        ValueError: fractions that are not positive or do not sum to 1, or a class with fewer groups than splits.
    """
    protocol = {"name": "lesion", "seed": seed, "fractions": list(fractions)}
    if has_mixed_groups(images):
        check_fractions(fractions)
        return _shared_out(images, seed, fractions, list(SPLITS[: len(fractions)]), protocol)
    return split_of_groups(images, cut_classes(images, "group", seed, fractions), seed, protocol)


def _shared_out(
    images: pd.DataFrame, seed: int, fractions: tuple[float, ...], roles: list[str], protocol: dict
) -> Split:
    """A split of groups with several classes: each part has a role; every image is kept, since no one stands for its group."""
    part_of = share_out(images, seed, fractions)
    names = split_names(column_of(images, "group"), {group: roles[part] for group, part in part_of.items()})
    rows = {name: stored_rows(images, names == name, seed) for name in SPLITS if (names == name).any()}
    if missing := [name for name in dict.fromkeys(roles) if name not in rows]:
        raise ValueError(
            f"The groups are too few or too large: none is left for {', '.join(missing)}. Add groups, or ask for other shares."
        )
    note = describe_deviation(images, part_of, fractions)
    return Split(protocol | {"groups": "with several classes"}, rows, notes=(note,))


def split_by_fold(images: pd.DataFrame, seed: int, n_folds: int, fold: int, held_out: bool = False) -> Split:
    """Lesion-grouped, stratified cross-validation: the groups of each class, sorted by hash, are dealt to the folds.

    Fold number `fold` is the test split and the next one validates; where a test set is held out, `fold` validates.

    Raises:
        ValueError: fewer than three folds, no such fold, or a class with fewer groups than folds.
    """
    if n_folds < 3 or not 0 <= fold < n_folds:
        raise ValueError(f"'--folds' must be at least 3 and '--fold' from 0 to one less. Got {n_folds} and {fold}.")
    roles = {fold: "val"} if held_out else {fold: "test", (fold + 1) % n_folds: "val"}
    protocol = {"name": "lesion", "seed": seed, "folds": n_folds, "fold": fold}
    if has_mixed_groups(images):
        named = [roles.get(number, "train") for number in range(n_folds)]
        return _shared_out(images, seed, (1 / n_folds,) * n_folds, named, protocol)
    split_of = {}
    for label, groups in names_by_class(images, "group").items():
        require_groups(label, groups, n_folds, "folds")
        split_of |= {
            group: roles.get(place % n_folds, "train") for place, group in enumerate(sort_by_hash(groups, seed))
        }
    return split_of_groups(images, split_of, seed, protocol)


def split_by_image(images: pd.DataFrame, seed: int = 0, fractions: tuple[float, ...] = FRACTIONS) -> Split:
    """Image-level, stratified, all images kept: a study of what that inflates, since lesions land in several splits."""
    split_of = cut_classes(images, "image_id", seed, fractions)
    names = split_names(column_of(images, "image_id"), split_of)
    rows = {name: stored_rows(images, names == name, seed) for name in SPLITS[: len(fractions)]}
    warning = "split by image: images of one lesion are in several splits, and scores are too high"
    protocol = {"name": "image", "seed": seed, "fractions": list(fractions), "leaks": True}
    return Split(protocol, rows, warnings=(warning,))


def split_notebook(images: pd.DataFrame, seed: int = 0) -> Split:
    """The 2021 notebook's split without its leak: the first image of each lesion, 80/20 per class.

    `int(0.8 n)` images of each class train, the others validate; there is no third split, and a warning says so.
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
    is_test = column_of(images, "part") == "test"
    egg = column_of(images, "image_id") == NOT_A_LESION
    ham = np.flatnonzero(~is_test & ~egg)
    inner = split_by_lesion(images.iloc[ham], seed, (0.85, 0.15))
    rows = {name: ham[members] for name, members in inner.rows.items()}
    rows["test"] = stored_rows(images, is_test & ~egg, seed)
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
    said = column_of(images, name)
    if odd := [repr(word) for word in dict.fromkeys(said) if word.strip().lower() not in words]:
        raise ValueError(f"The column {name!r} must say train, val or test. Found also: {', '.join(odd[:5])}.")
    names = np.array([words[word.strip().lower()] for word in said], dtype=object)
    if missing := {"train", "val"} - set(names):
        raise ValueError(
            f"The column {name!r} has no {' and no '.join(sorted(missing))} rows. Use --protocol lesion instead."
        )
    rows = {part: stored_rows(images, names == part, seed) for part in SPLITS if (names == part).any()}
    alias = {} if "test" in rows else {"test": "val"}
    return Split({"name": f"column:{name}", "seed": seed}, rows, {}, alias, (VAL_IS_TEST,) if alias else ())


def external_test(images: pd.DataFrame, seed: int = 0) -> Split:
    """Every image is test: a set of another origin, to evaluate models on that were trained elsewhere."""
    return Split({"name": "test", "seed": seed}, {"test": stored_rows(images, np.ones(len(images), bool), seed)})


def _notebook(images: pd.DataFrame, seed: int, protocol: dict, cut: Callable) -> Split:
    first, ids = ~is_repeated(images), column_of(images, "image_id")
    chosen: dict[str, set[str]] = {"train": set(), "val": set()}
    for label, members in names_by_class(images.iloc[np.flatnonzero(first)], "image_id").items():
        ordered = sort_by_hash(members, seed)
        require_groups(label, ordered, 2, "splits")
        for part, names in zip(chosen, cut(ordered, int(0.8 * len(ordered))), strict=True):
            chosen[part] |= set(names)
    rows = {part: stored_rows(images, is_in(ids, names), seed) for part, names in chosen.items()}
    unused = first & ~is_in(ids, chosen["train"] | chosen["val"])
    left_out = one_image_reasons(images, ~first, "every split")
    left_out |= {int(row): "the notebook uses it nowhere" for row in np.flatnonzero(unused)}
    return Split(protocol, rows, left_out, {"test": "val"}, (VAL_IS_TEST,))


@dataclass(frozen=True)
class Protocol:
    """A row of `PROTOCOLS`.

    split: makes the split, from (images, seed=...). about: one line for --help.
    has_own_test: the source or the protocol names its test split, so that --holdout does not go with it.
    has_fractions: `split` takes fractions (--holdout drops the last). is_study: it leaks on purpose, and is marked.
    """

    split: Callable[..., Split]
    about: str
    has_own_test: bool = False
    has_fractions: bool = False
    is_study: bool = False


# Every protocol, as `--protocol` names it.
PROTOCOLS = {
    "lesion": Protocol(
        split_by_lesion,
        "groups of each class, .70/.15/.15; val and test keep one image a group, where each group has one class. With --folds: cross-validation",
        has_fractions=True,
    ),
    "notebook": Protocol(
        split_notebook, "the 2021 notebook's without its leak: one image a group, 80/20; validation doubles as test"
    ),
    "isic2018": Protocol(
        split_isic2018, "train and val from HAM10000, test from the challenge's (--test-source)", has_own_test=True
    ),
    "column:NAME": Protocol(split_by_column, "the source says train, val or test in that column", has_own_test=True),
    "test": Protocol(external_test, "every image is test: a set to evaluate a trained model on", has_own_test=True),
    "image": Protocol(
        split_by_image, "images of each class, wherever their groups land", has_fractions=True, is_study=True
    ),
    "notebook-leaky": Protocol(
        split_notebook_leaky, "the notebook's, with its leak: every validation image is a training image", is_study=True
    ),
}
RENAMED = {"seed": "notebook", "seed-leaky": "notebook-leaky"}  # as they were called before


def choose_protocol(
    name: str, seed: int = 0, n_folds: int = 0, fold: int | None = None, holdout: float = 0.0
) -> Callable[[pd.DataFrame], Split]:
    """The protocol of a name, with its parameters: a function of a catalogue's table.

    Args:
        name: one of `PROTOCOLS`. seed: a different seed gives a different split.
        n_folds, fold: cross-validation by lesion in so many folds, and which one is the test split (0 where it
            is not said); 0 folds for none.
        holdout: share of the groups that is cut as a common test set before all else; 0 for none.

    Raises:
        ValueError: an unknown or renamed protocol, or parameters that do not go with it.
    """
    column = name.removeprefix("column:") if name.startswith("column:") else ""
    protocol = PROTOCOLS.get("column:NAME" if column else name)
    if name in RENAMED:
        raise ValueError(f"The '--protocol' {name} is now called {RENAMED[name]}.")
    if protocol is None:
        raise ValueError(f"The '--protocol' must be one of {', '.join(PROTOCOLS)}. Got {name!r} instead.")
    if fold is not None and not n_folds:
        raise ValueError(f"--fold {fold} is one of several folds: give their number as --folds, too.")
    if n_folds and name != "lesion":
        raise ValueError(f"--folds goes with --protocol lesion. Got --protocol {name}.")
    if holdout and protocol.has_own_test:
        raise ValueError(f"--holdout does not go with --protocol {name}, which has a test split of its own.")
    if n_folds:
        chosen = partial(split_by_fold, seed=seed, n_folds=n_folds, fold=fold or 0, held_out=bool(holdout))
    elif column:
        chosen = partial(protocol.split, seed=seed, name=column)
    else:
        chosen = beside_holdout(protocol, seed) if holdout else partial(protocol.split, seed=seed)
    return partial(with_holdout, fraction=holdout, protocol=chosen) if holdout else chosen


def beside_holdout(protocol: Protocol, seed: int) -> Callable[[pd.DataFrame], Split]:
    """A protocol for what a common test set leaves: it makes no test split of its own."""
    train, val, _ = FRACTIONS
    fractions = {"fractions": (train / (train + val), val / (train + val))} if protocol.has_fractions else {}
    return partial(protocol.split, seed=seed, **fractions)


def describe_protocols() -> str:
    """Every protocol in a line, for --help."""
    lines = {False: ["protocols:"], True: ["for studies, marked as leaking:"]}
    for name, protocol in PROTOCOLS.items():
        lines[protocol.is_study].append(f"  {name:<15}{protocol.about}")
    return "\n".join([*lines[False], *lines[True]])
