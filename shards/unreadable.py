"""Images that cannot be decoded: named all at once, or left out and listed.

In: rows and what is wrong with their images. Out: one error, or a `Split` without them. Invariants: each is named; whoever reads a score
is told where a class or more than one image of a thousand is gone.
"""

from dataclasses import replace

import numpy as np
import pandas as pd

from shards.grouping import Split
from shards.tree import of_cell, size_and_version

WARNED_SHARE = 0.001  # of images that cannot be read: from here on, whoever reads a score is told


def refuse_empty(paths: pd.Series) -> None:
    """Before hours of packing: refuse files of 0 bytes, as a download leaves them that was cut off.

    Raises:
        ValueError: naming them.
    """
    if empty := {row: f"{path}: 0 bytes" for row, path in enumerate(paths) if not size_and_version(of_cell(path))[0]}:
        raise ValueError(all_in_one_error(empty))


def all_in_one_error(bad: dict[int, str], kept: str = "nothing was kept", most: int = 20) -> str:
    """One error for all images that cannot be decoded."""
    lines = "\n  ".join(list(bad.values())[:most])
    more = f"\n  and {len(bad) - most} more" if len(bad) > most else ""
    return f"{len(bad)} image(s) cannot be read, and {kept}. Mend them, or leave them out: --on-bad-image skip\n  {lines}{more}"


def without(split: Split, bad: dict[int, str], labels: pd.Series, groups: pd.Series) -> Split:
    """A split without rows whose images cannot be decoded; each is listed, and a reader of a score is told where that matters.

    Args:
        bad: row -> what is wrong with its image. labels, groups: of all rows.

    Raises:
        ValueError: a split has no image left.
    """
    if not bad:
        return split
    rows = {name: members[~np.isin(members, list(bad))] for name, members in split.rows.items()}
    warned = list(split.warnings)
    for name, members in rows.items():
        if not len(members):
            raise ValueError(f"No image of the {name} split can be read. Mend the images.")
        gone = set(labels.iloc[split.rows[name]]) - set(labels.iloc[members])
        if gone:
            warned.append(f"no image of {', '.join(sorted(gone))} in the {name} split could be read")
    if len(bad) > WARNED_SHARE * len(labels):
        warned.append(f"{len(bad)} of {len(labels)} images could not be read and are left out")
    left_out = split.left_out | bad
    for name, members in rows.items():
        gone = set(groups.iloc[split.rows[name]]) - set(groups.iloc[members])
        for row, reason in split.left_out.items():
            if groups.iloc[row] in gone and reason.startswith(f"{name} keeps one image"):
                left_out[row] = f"{name} keeps one image a group, and that of {groups.iloc[row]} cannot be read"
    return replace(split, rows=rows, left_out=left_out, warnings=tuple(warned))
