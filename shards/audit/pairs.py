"""The audit itself: pairs of images of one thing under two names, ranked, and what they mean for the splits.

In: a `Collection`. Out: `Pair`s, a table of them, a summary. Invariants: images of one group are never a pair; the same collection
gives the same pairs in the same order; metadata are shown beside a pair and decide nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from shards.audit.collection import CORE, Collection
from shards.audit.features import Features
from shards.audit.geometry import Alignment, align
from shards.audit.shortlist import shortlist
from shards.files import usable_cores

THRESHOLD = 7  # inliers from which a pair counts as found
SHOWN_FROM = 5  # inliers from which a pair is listed, for a person to decide
FEW_POINTS = 30  # an image with fewer key points may be missed
KINDS = ("group", "bytes", "pixels", "alike")  # strongest evidence first


@dataclass(frozen=True)
class Pair:
    """Rows of two images, and what makes them a pair.

    kind: group (one group in two splits), bytes (the same file), pixels (the same pixels), alike (key points agree).
    """

    a: int
    b: int
    kind: str
    alignment: Alignment

    def is_found(self, threshold: int) -> bool:
        """Whether the evidence suffices."""
        return self.kind != "alike" or self.alignment.inliers >= threshold


def find_pairs(collection: Collection, features: Features, threads: int = 0) -> list[Pair]:
    """All pairs, the strongest evidence first: identical ones, then by the number of key points that agree."""
    exact = [*_split_groups(collection), *_identical(collection, features)]
    known = {(pair.a, pair.b) for pair in exact}
    asked = [pair for pair in shortlist(features, collection.group_keys) if pair[:2] not in known]
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        aligned = list(
            tqdm(
                pool.map(lambda pair: align(features, *pair), asked),
                total=len(asked),
                unit=" pairs",
                desc="comparing",
                disable=None,
            )
        )
    best: dict[tuple[int, int], Alignment] = {}
    for (a, b, _), alignment in zip(asked, aligned, strict=True):
        if alignment.inliers >= SHOWN_FROM and alignment.inliers > best.get((a, b), Alignment(0, False)).inliers:
            best[a, b] = alignment
    alike = [Pair(a, b, "alike", alignment) for (a, b), alignment in best.items()]
    alike.sort(key=lambda pair: (-pair.alignment.inliers, -pair.alignment.correlation, pair.a, pair.b))
    return [*sorted(exact, key=lambda pair: (KINDS.index(pair.kind), pair.a, pair.b)), *alike]


def _split_groups(collection: Collection) -> Iterator[Pair]:
    """A group in two splits of one dataset, by its first image in each."""
    table = collection.table
    first: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for row, (data, group, split) in enumerate(zip(table["data"], table["group"], table["split"], strict=True)):
        first[data, group].setdefault(split, row)
    for rows in first.values():
        here, *others = rows.values()
        for other in others:
            yield Pair(here, other, "group", Alignment(0, False))


def _identical(collection: Collection, features: Features) -> Iterator[Pair]:
    """Images of the same bytes, or the same pixels, in other groups: each with the first of them."""
    groups, seen = collection.group_keys, set()
    for kind, digests in (("bytes", features.files), ("pixels", features.pixels)):
        first: dict[str, int] = {}
        for row, digest in enumerate(digests.tolist()):
            original = first.setdefault(digest, row)
            if groups[original] != groups[row] and (original, row) not in seen:
                seen.add((original, row))
                yield Pair(original, row, kind, Alignment(0, False))


def to_table(pairs: list[Pair], collection: Collection, threshold: int) -> pd.DataFrame:
    """One row a pair; `same` is for a person to correct, and is what `pack --merge-duplicates` reads.

    `leak` says yes where the two are in different splits. `agree` names what else is known of both and equal, `differ` what is not.
    """
    table = collection.table
    known = [name for name in table if name not in CORE]
    rows = []
    for rank, pair in enumerate(pairs, start=1):
        one, other = table.iloc[pair.a], table.iloc[pair.b]
        both = [name for name in known if one[name] and other[name]]
        rows.append(
            {
                "rank": rank,
                "same": "yes" if pair.is_found(threshold) else "",
                "kind": pair.kind,
                "leak": "yes" if _is_leak(one["split"], other["split"]) else "",
                "inliers": pair.alignment.inliers,
                "correlation": round(pair.alignment.correlation, 3),
                "overlap": round(pair.alignment.overlap, 3),
                "scale": round(pair.alignment.scale, 3),
                "angle": round(pair.alignment.angle, 1),
                "mirrored": "yes" if pair.alignment.mirrored else "",
                **{f"{name}_{end}": row[name] for name in CORE for end, row in (("a", one), ("b", other))},
                "agree": ", ".join(name for name in both if one[name] == other[name]),
                "differ": ", ".join(name for name in both if one[name] != other[name]),
            }
        )
    ends = [f"{name}_{end}" for name in CORE for end in "ab"]
    first = ["rank", "same", "kind", "leak", "inliers", "correlation", "overlap", "scale", "angle", "mirrored"]
    return pd.DataFrame(rows, columns=[*first, *ends, "agree", "differ"])


def _is_leak(split: str, other: str) -> bool:
    return bool(split and other) and split != other


def summarize(table: pd.DataFrame, collection: Collection, features: Features, threshold: int) -> dict:
    """What `audit.json` says: found pairs by kind and by the splits of both, and what could not be compared."""
    found = table[table["same"] == "yes"]
    splits = Counter(_split_pair(*ends) for ends in zip(found["split_a"], found["split_b"], strict=True))
    return {
        "images": len(collection.table),
        "groups": len(np.unique(collection.group_keys)),
        "threshold": threshold,
        "pairs": len(found),
        "leaks": int((found["leak"] == "yes").sum()),
        "undecided": int((table["same"] == "").sum()),
        "kinds": {kind: int((found["kind"] == kind).sum()) for kind in KINDS},
        "splits": dict(sorted(splits.items())),
        "other_labels": int((found["label_a"] != found["label_b"]).sum()),
        "few_key_points": int((features.counts < FEW_POINTS).sum()) - len(features.problems),
        "unreadable": _named(features.problems.values()),
        "fingerprints": collection.fingerprints,
    }


def _split_pair(one: str, other: str) -> str:
    return " and ".join(sorted({one or "not split", other or "not split"}))


def _named(reasons: Iterable[str]) -> list[str]:
    return sorted(reasons)
