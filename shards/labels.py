"""Class names of a table's rows: from a column, from columns with a 1 in the one of the class, or from numbers with names.

In: columns of text. Out: one class name a row, and the classes in their order. Invariants: each row has exactly one class; a
class without a row is left out, and said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from shards.catalogue import preview
from shards.tree import SourcePath

TRUTH = {"true": "1", "false": "0"}


@dataclass(frozen=True)
class Labels:
    """values: a class name for each row, blank where its cell is. classes: their order. said: what was understood, in one line."""

    values: list[str]
    classes: tuple[str, ...]
    said: str


def read_labels(
    table: pd.DataFrame, path: SourcePath, ids: Sequence[str], columns: Sequence[str], names: Sequence[str]
) -> Labels:
    """Labels from one column, or from several of which each row has exactly one 1.

    Args:
        path, ids: the table's file and what its rows are called, for errors. columns: one, or several. names: of the labels 0, 1, ...
            in one column, or, where all its labels are among them, the order of its classes; empty for alphabetical order (of numbers: by size).

    Raises:
        ValueError: a row without exactly one 1, labels that are none of the names, or names for several columns.
    """
    if len(columns) > 1:
        if names:
            raise ValueError(
                "--class-names names the labels of --label-column; of --label-columns the columns are the names."
            )
        return _from_columns(table, path, ids, columns)
    values = table[columns[0]].str.strip().tolist()
    if names:
        return _named(values, path, columns[0], names)
    found = set(values) - {""}
    in_order = (
        sorted(found, key=int) if all(value.isdecimal() and value.isascii() for value in found) else sorted(found)
    )
    return Labels(values, tuple(in_order), f"classes from {columns[0]}")


def in_small_letters(labels: Labels) -> Labels:
    """The same with class names in small letters; said where that changes any."""
    values = [value.lower() for value in labels.values]
    if values == labels.values:
        return labels
    return Labels(
        values, tuple(dict.fromkeys(name.lower() for name in labels.classes)), f"{labels.said}, in small letters"
    )


def _from_columns(table: pd.DataFrame, path: SourcePath, ids: Sequence[str], columns: Sequence[str]) -> Labels:
    cells = table[list(columns)].apply(lambda column: column.str.strip().str.lower().replace(TRUTH))
    hot = cells.apply(pd.to_numeric, errors="coerce")
    odd = [
        name for name, is_odd in zip(ids, (hot.sum(axis=1) != 1) | ~hot.isin([0, 1]).all(axis=1), strict=True) if is_odd
    ]
    if odd:
        raise ValueError(
            f"{preview(odd)} of {path}: not exactly one of the columns {', '.join(columns)} is 1. Correct those rows or remove them; "
            "images of several classes at once are not supported."
        )
    values = [str(columns[place]) for place in hot.to_numpy().argmax(axis=1)]
    classes = tuple(column for column in columns if column in set(values))
    return Labels(values, classes, f"classes from the columns {', '.join(columns)}" + _unused(columns, classes))


def _named(values: list[str], path: SourcePath, column: str, names: Sequence[str]) -> Labels:
    found = sorted(set(values) - {""})
    numbers = {str(number): name for number, name in enumerate(names)}
    numbers |= {f"{number}.0": name for number, name in enumerate(names)}  # as tables with gaps write whole numbers
    if len(set(names)) < len(names):
        raise ValueError(f"--class-names names a class twice: {', '.join(names)}.")
    if set(found) <= set(names):
        said = f"classes from {column}, in the order {', '.join(names)}"
    elif set(found) <= set(numbers):
        values = [numbers.get(value, "") for value in values]
        said = f"classes from {column}: " + ", ".join(f"{number} is {name}" for number, name in enumerate(names))
    else:
        raise ValueError(
            f"--class-names {','.join(names)} names the labels 0 to {len(names) - 1}, or is the order of the classes. The column {column!r} "
            f"of {path} has {preview(found, 10)}."
        )
    classes = tuple(name for name in names if name in set(values))
    return Labels(values, classes, said + _unused(names, classes))


def _unused(names: Sequence[str], used: Sequence[str]) -> str:
    unused = [name for name in names if name not in used]
    return f" (left out, without an image: {', '.join(unused)})" if unused else ""
