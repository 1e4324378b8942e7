"""`python -m shards audit`: look for one thing under two names, and write what was found.

In: a packed dataset or a source, and perhaps another. Out: a folder with `audit.csv`, `audit.html` and `audit.json`. Invariants: an audit that
was interrupted goes on where it was; what a person corrected stays; one that found a leak between splits has exit code 1.
"""

import json
from pathlib import Path

from shards.audit.collection import join, open_collection
from shards.audit.corrections import NAME, keep_corrections
from shards.audit.features import extract
from shards.audit.page import SAID, write_page
from shards.audit.pairs import find_pairs, summarize, to_table
from shards.audit.record import default_folder, describe
from shards.files import write_atomically
from shards.public_data import Columns
from shards.remote import DEFAULT_ACCESS, Access

LEAK = 1  # exit code


def audit(
    path: Path | str,
    other: Path | str | None,
    out: Path | None,
    columns: Columns,
    threshold: int,
    threads: int = 0,
    access: Access = DEFAULT_ACCESS,
) -> int:
    """Audit one or two datasets; returns the exit code: 1 where a leak between splits was found, else 0.

    Args:
        path, other: folders, tables, or URLs of packed datasets, which are read as `access` says. out: for the results.

    Raises:
        FileNotFoundError, ValueError: no such dataset, or none that can be read.
    """
    if threshold < 1:
        raise ValueError(f"The '--threshold' must be at least 1. Got {threshold} instead.")
    collection = open_collection(path, columns, access)
    if other:
        collection = join(collection, open_collection(other, columns, access))
    out = out or default_folder(path, other)
    features = extract(collection, out / "key_points", threads)
    pairs = find_pairs(collection, features, threads)
    table = keep_corrections(to_table(pairs, collection, threshold), out)
    summary = summarize(table, collection, features, threshold)
    write_atomically(out / NAME, table.to_csv(index=False, lineterminator="\n").encode())
    write_atomically(out / "audit.html", write_page(pairs, table, collection, features, summary))
    write_atomically(out / "audit.json", (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
    print(f"{' and '.join(dict.fromkeys(collection.table['data']))}: {describe(summary)}")
    for kind, number in summary["kinds"].items():
        if number:
            print(f"  {number:>6} pairs: {SAID[kind]}")
    for splits, number in summary["splits"].items():
        print(f"  {number:>6} pairs in {splits}")
    if summary["few_key_points"]:
        print(
            f"{summary['few_key_points']} images have too little structure: only their exact copies are sure to be found"
        )
    for why in summary["unreadable"]:
        print(f"not compared: {why}")
    print(
        f"look at {out / 'audit.html'}, correct the column `same` of {out / 'audit.csv'}, then: pack ... --merge-duplicates"
    )
    return LEAK if summary["leaks"] else 0
