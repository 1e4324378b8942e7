"""What a person wrote into the column `same` of an audit, kept when the audit is made again.

In: the folder of an audit and its new table. Out: the table with what was corrected. Invariants: an answer that differs from what the audit wrote
is a person's; one that the new table has no row for stays in a file of its own.
"""

import os
from pathlib import Path

import pandas as pd

from shards.audit.pairs import THRESHOLD
from shards.audit.record import read_audit
from shards.duplicates import NO, YES
from shards.files import free_name

NAME = "audit.csv"
DATA, IDS = ["data_a", "data_b"], ["image_id_a", "image_id_b"]


def keep_corrections(table: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The table of an audit with the answers of the one in the folder, where somebody changed these.

    An answer of words that are neither yes nor no stays as it is. Where a changed row is in the new table no more, the old table is kept, as
    `audit.csv.before`, or `.before-2` and so on; what was done is printed.
    """
    path = folder / NAME
    try:
        before = pd.read_csv(path, dtype=str, keep_default_na=False)
        before = before[[*DATA, *IDS, "same", "kind", "inliers"]].assign(inliers=pd.to_numeric(before["inliers"]))
    except FileNotFoundError:
        return table
    except (ValueError, KeyError):
        _put_aside(path, "could not be read as the table of an audit")
        return table
    threshold = (read_audit(folder) or {"threshold": THRESHOLD})["threshold"]
    words = before["same"].str.strip().str.lower()
    written = (before["kind"] != "alike") | (before["inliers"] >= threshold)  # as the audit decided
    changed = before[(words.isin(YES) != written) | ~words.isin([*YES, *NO]) | (words.isin(NO) & (words != ""))]
    one_data = all(len(set(rows[DATA].to_numpy().ravel())) <= 1 for rows in (before, table))  # however it was named
    ends = IDS if one_data else [*DATA, *IDS]
    answers = {
        tuple(row): "yes" if word in YES else "no" if word in NO else answer
        for row, word, answer in zip(changed[ends].to_numpy(), words[changed.index], changed["same"], strict=True)
    }
    keys = [tuple(row) for row in table[ends].astype(str).to_numpy()]
    if lost := len(answers.keys() - set(keys)):
        _put_aside(path, f"has {lost} corrected row(s) that are found no more")
    if kept := len(answers.keys() & set(keys)):
        print(f"{kept} corrected row(s) of {path} are kept")
    return table.assign(same=[answers.get(key, same) for key, same in zip(keys, table["same"], strict=True)])


def _put_aside(path: Path, why: str) -> None:
    aside = free_name(path.with_name(f"{NAME}.before"))
    os.replace(path, aside)
    print(f"{path} {why}; it is {aside.name} now")
