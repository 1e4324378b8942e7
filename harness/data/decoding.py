"""What a decoding thread does with a part of a batch.

In: an `ImageReader`, positions, and memory for their pixels. Out: the pixels, and what goes with them. Invariants: an image that is
kept decoded is not decoded again; one that cannot be decoded is never kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from harness.data.decoded import DecodedCache
from shards.reader import ImageReader

Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # positions (n,) to shards and rows, both (n,)


class Part(NamedTuple):
    """What a thread found of n samples, each (n,): is_bad, is_kept and places are of the cache of decoded images."""

    labels: np.ndarray
    keys: np.ndarray
    is_bad: np.ndarray
    places: np.ndarray
    is_kept: np.ndarray


def decode_part(
    reader: ImageReader,
    locate: Locate,
    ignores_bad: bool,
    cache: DecodedCache | None,
    positions: np.ndarray,
    pixels: np.ndarray,
) -> Part:
    """Read and decode samples into `pixels`, (n, H, W, 3) uint8; those that host memory keeps are copied, those of a GPU left out.

    Raises:
        ValueError: a sample that cannot be decoded, unless bad ones are to be ignored.
    """
    shards, rows = locate(positions)
    places = np.zeros(len(positions), np.int64) if cache is None else cache.places(shards, rows)
    is_bad = np.zeros(len(positions), bool)
    is_kept = np.zeros(len(positions), bool) if cache is None else cache.is_kept(places)
    needed = np.flatnonzero(~is_kept)
    for number, data in reader.read(shards[needed], rows[needed]):
        place = needed[number]
        try:
            reader.decode(int(shards[place]), int(rows[place]), data, pixels[place])
        except ValueError:
            if not ignores_bad:
                raise
            is_bad[place] = True
    if cache is not None and cache.device is None:
        new = needed[~is_bad[needed]]
        cache.put(places[new], pixels[new])
        if is_kept.all():
            cache.get(places, pixels)
        elif is_kept.any():
            cache.get(places[is_kept], copies := np.empty_like(pixels[is_kept]))
            pixels[is_kept] = copies
    labels, keys = reader.labels_and_keys(shards, rows)
    return Part(labels, keys, is_bad, places, is_kept)
