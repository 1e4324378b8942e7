"""What an audit finds of copies planted among a user's own images, and what it takes for copies that are none.

In: parsed options with a source or a packed dataset. Out: numbers by name, a row for each kind of change. Invariants: every image is of
another group, so that all are compared; the same seed plants the same copies; nothing is written but to a temporary folder.
"""

import platform
import resource
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from launch.bench.changes import KINDS, make_copy
from launch.bench.other_finders import PairFinder, other_finders
from shards.audit.collection import Collection, open_collection
from shards.audit.features import extract
from shards.audit.pairs import THRESHOLD, Pair, find_pairs
from shards.column_options import columns_of
from shards.files import usable_cores

NOTHING = "nothing planted"
WEAKEST = 0.05  # share of the found copies that are left out of a rank: one hard copy says little
Ends = tuple[int, int]
Made = TypeVar("Made")


def measure_planted(options: Namespace) -> dict:
    """Plant copies by each kind of change in turn, look for them by the audit, and by other programs where they are installed.

    Raises:
        ValueError: an unknown kind, or too few groups.
        FileNotFoundError: no such source.
    """
    kinds = options.kinds or tuple(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"The '--kinds' must be of {', '.join(KINDS)}. Got {', '.join(unknown)} instead.")
    source = open_collection(options.path, columns_of(options))
    own = choose(source, options.images, options.others, options.seed)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        others = other_finders(own, Path(scratch) / "files", options.cnn)
        for kind in (NOTHING, *kinds):
            collection = own if kind == NOTHING else plant(own, options.images, kind, options.seed)
            row = _audited(collection, len(own.table), Path(scratch) / "key_points")
            row |= _by_others(others, collection, len(own.table))
            rows.append({"kind": kind, **row})
            print(f"{kind}: {row}", flush=True)
    return {
        "images": len(own.table),
        "copies": options.images,
        "seed": options.seed,
        "kinds": rows,
        "versions": {name: version(name) for name in ("faiss-cpu", "opencv-python-headless", *_packages(others))},
        "system": platform.platform(),
    }


def choose(source: Collection, n_images: int, n_others: int, seed: int) -> Collection:
    """Images that copies are made of, then others: one of each group, drawn at random.

    Raises:
        ValueError: fewer groups than that.
    """
    order = np.random.default_rng(seed).permutation(len(source.table))
    _, first = np.unique(source.group_keys[order], return_index=True)
    rows = order[np.sort(first)][: n_images + n_others]
    if len(rows) < n_images + n_others:
        raise ValueError(
            f"'--images' and '--others' ask for {n_images + n_others} groups, and there are {len(rows)}. Ask for fewer."
        )
    table = source.table.iloc[rows].reset_index(drop=True)
    versions = [source.versions[row] for row in rows]
    return Collection(table, lambda row: source.read(int(rows[row])), versions, source.fingerprints)


def plant(own: Collection, n_images: int, kind: str, seed: int) -> Collection:
    """A collection with a copy of each of its first images behind the others, of another id and group."""
    n = len(own.table)
    names = own.table["image_id"].iloc[:n_images].tolist()
    with ThreadPoolExecutor(usable_cores()) as pool:
        copies = list(pool.map(lambda row: make_copy(own.read(row), kind, names[row], seed), range(n_images)))
    table = own.table.iloc[:n_images]
    table = table.assign(image_id=table["image_id"] + f" ({kind})", group="copy of " + table["group"])
    return Collection(
        pd.concat([own.table, table], ignore_index=True),
        lambda row: own.read(row) if row < n else copies[row - n],
        own.versions + [f"{seed} {kind} {one}" for one in own.versions[:n_images]],
        own.fingerprints,
    )


def count(ranked: Sequence[Ends], found: Iterable[Ends], n_own: int, n: int) -> dict[str, float]:
    """Copies that were found, and the pairs that nobody planted.

    Args:
        ranked: rows of all pairs that are listed, a < b, the strongest first. found: of those at the threshold or above.
        n_own: images before the copies; row i + n_own is a copy of row i. n: images with the copies.

    Returns:
        found, listed: shares of the copies. above_weakest: unplanted pairs that are ranked before the last copy that was found;
        above_weakest_5_percent: the same without the 5 % of them that come last. unplanted_per_1000: unplanted pairs at the threshold or
        above, for 1,000 images, those of the images' own included.
    """
    copies = n - n_own
    is_planted = np.array([b - a == n_own for a, b in ranked], bool)
    strong = set(found)
    is_found = np.array([ends in strong for ends in ranked], bool)
    places = np.flatnonzero(is_planted & is_found)
    before = np.cumsum(~is_planted)[places] if len(places) else np.zeros(1, int)
    kept = max(0, len(places) - 1 - int(WEAKEST * len(places)))
    numbers = {"unplanted_per_1000": 1000 * float((is_found & ~is_planted).sum()) / n}
    if not copies:
        return numbers
    return {
        "found": len(places) / copies,
        "listed": float(is_planted.sum()) / copies,
        "above_weakest": int(before[-1]),
        "above_weakest_5_percent": int(before[kept]),
        **numbers,
    }


def _audited(collection: Collection, n_own: int, folder: Path) -> dict[str, float]:
    features, of_features = _timed(lambda: extract(collection, folder))
    pairs, of_pairs = _timed(lambda: find_pairs(collection, features))
    ranked = [_ends(pair) for pair in pairs]
    found = [_ends(pair) for pair in pairs if pair.is_found(THRESHOLD)]
    numbers = count(ranked, found, n_own, len(collection.table))
    return numbers | {"seconds": of_features[0] + of_pairs[0], "cpu_seconds": of_features[1] + of_pairs[1]}


def _by_others(finders: dict[str, PairFinder], collection: Collection, n_own: int) -> dict[str, float]:
    numbers = {}
    for name, find in finders.items():
        found, (_, cpu_seconds) = _timed(lambda find=find: find(collection))
        counted = count(sorted(found), found, n_own, len(collection.table)) | {"cpu_seconds": cpu_seconds}
        chosen = ("found", "unplanted_per_1000", "cpu_seconds")
        numbers |= {f"{name}: {key}": counted[key] for key in chosen if key in counted}
    return numbers


def _ends(pair: Pair) -> Ends:
    return min(pair.a, pair.b), max(pair.a, pair.b)


def _timed(work: Callable[[], Made]) -> tuple[Made, tuple[float, float]]:
    """What it made; wall seconds and CPU seconds of all threads."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    made = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return made, (time.perf_counter() - began, cpu)


def _packages(finders: dict[str, PairFinder]) -> list[str]:
    return ["imagededup"] if finders else []
