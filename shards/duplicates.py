"""Unite the groups of images that an audit found to show one thing, and a person confirmed.

In: a `Catalogue` and the table of an audit. Out: the catalogue with fewer groups. Invariants: only rows that say yes unite; a pair of
two labels is named and refused, unless it is allowed.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd

from shards.catalogue import Catalogue, preview
from shards.stratify import connect
from shards.tables import read_table_file

COLUMNS = ("same", "image_id_a", "image_id_b")
DATA = ("data_a", "data_b")  # the dataset of each, as an audit writes them; ids of two may be equal
YES, NO = ("yes", "y", "true", "1", "1.0"), ("", "no", "n", "false", "0", "0.0")


def merge_duplicates(catalogue: Catalogue, path: Path, allow_mixed_labels: bool = False) -> tuple[Catalogue, int]:
    """The catalogue with the groups of confirmed pairs united, each named by the first of its names; and how many pairs united any.

    Args:
        path: `audit.csv`; a row counts where its column `same` says yes.
        allow_mixed_labels: a united group may have images of several classes; then whole groups are shared out, as of patients.

    Raises:
        FileNotFoundError: no such table.
        ValueError: columns that it lacks, an audit of two datasets, words other than yes and no, ids that the source does not have, or pairs of two labels.
    """
    table, _ = read_table_file(path)
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"{path} has no column {missing[0]}. Give the audit.csv of `python -m shards audit`.")
    if len(of_two := sorted({name for column in DATA if column in table.columns for name in table[column]})) > 1:
        raise ValueError(
            f"{path} is an audit of {' and '.join(of_two)}, whose images may have equal names. Audit {catalogue.name} alone: python -m shards "
            "audit SOURCE."
        )
    words = table["same"].str.strip().str.lower()
    if odd := sorted(set(words) - {*YES, *NO}):
        raise ValueError(f"The column 'same' of {path} must say yes or no, or nothing. Found also: {preview(odd)}.")
    confirmed = table[words.isin(YES)]
    images = catalogue.images.set_index("image_id")
    ends = [confirmed[f"image_id_{end}"].str.strip() for end in "ab"]
    if unknown := [name for names in ends for name in names if name not in images.index]:
        raise ValueError(
            f"{path} names {preview(dict.fromkeys(unknown))}, which {catalogue.name} does not have. Audit this source."
        )
    groups, labels = ([images[column].loc[names].tolist() for names in ends] for column in ("group", "label"))
    mixed = [f"{a} ({of_a}) and {b} ({of_b})" for a, b, of_a, of_b in zip(*ends, *labels, strict=True) if of_a != of_b]
    if mixed and not allow_mixed_labels:
        raise ValueError(
            f"{len(mixed)} confirmed pair(s) of {path} have two labels, of which at most one can be right: {preview(mixed, 5)}. Write no "
            "in the column 'same' of those that are two lesions, correct the labels, or allow it with --allow-mixed-labels."
        )
    pairs = [pair for pair in zip(*groups, strict=True) if pair[0] != pair[1]]
    united = _unite(pairs)
    merged = catalogue.images.assign(group=catalogue.images["group"].map(lambda name: united.get(name, name)))
    return replace(catalogue, images=merged, mixed_groups=catalogue.mixed_groups or bool(mixed)), len(pairs)


def _unite(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Group -> the name of the group that it is now part of."""
    links = [{"group": name, "pair": str(number)} for number, pair in enumerate(pairs) for name in pair]
    if not links:
        return {}
    rows = pd.DataFrame(links)
    return dict(zip(rows["group"], connect(rows, ["group", "pair"]), strict=True))
