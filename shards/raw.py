"""Images as people have them, read as if they had been packed: opened, fitted, encoded and decoded by the same functions.

In: image files and how a dataset stores images. Out: an `ImageReader` of their stored pixels. Invariants: an image gives the bytes that
packing would store; the key of an image is its place in the list; one that cannot be read is kept with its reason.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from shards.ahead import Ahead, Need
from shards.description import Description
from shards.image import decode_into, encode, fit, open_rgb


class RawReader:
    """Image files in the order given. Their labels are 0, which means nothing. Safe to share between threads."""

    title = "images"
    is_reading = False  # from a network

    def __init__(self, paths: Sequence[Path], names: Sequence[str], stored: Description, classes: tuple[str, ...]):
        """Nothing is read yet.

        Args:
            names: what errors call the images. stored: of the dataset whose stored size, fit and quality apply.
        """
        self._paths, self._names = paths, names
        self.width, self.height = stored.size
        self._fit, self._quality = stored.fit, stored.quality
        self.classes, self.shard_sizes = classes, (len(paths),)
        self.problems: dict[int, str] = {}  # key: why the image cannot be read

    def fetch_ahead(self, needs: Callable[[], list[Need]], first: int) -> Ahead | None:
        """Nothing: everything is here."""
        return None

    def keys(self) -> np.ndarray:
        """0 to N - 1, (N,) int64."""
        return np.arange(len(self._paths))

    def read(self, shards: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """The place of an image among those requested, and its file's bytes; none where the file cannot be read."""
        for place, row in enumerate(rows.tolist()):
            try:
                yield place, self._paths[row].read_bytes()
            except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
                why = error.strerror if isinstance(error, OSError) else error
                self.problems[row] = f"Cannot read the image {self._names[row]} ({why})."
                yield place, b""

    def decode(self, shard: int, row: int, data: bytes, out: np.ndarray) -> None:
        """What packing would store of an image, into `out`, (H, W, 3) uint8.

        Raises:
            ValueError: it cannot be decoded; `problems` says why, too.
        """
        if row in self.problems:
            raise ValueError(self.problems[row])
        try:
            if not data:
                raise ValueError(f"The image {self._names[row]} is empty (0 bytes).")
            decode_into(self.stored(data, self._names[row]), out)
        except ValueError as error:
            self.problems[row] = str(error)
            raise

    def stored(self, data: bytes, name: str) -> bytes:
        """The JPEG that packing would store of an image file's bytes.

        Raises:
            ValueError: they cannot be decoded.
        """
        return encode(fit(open_rgb(data, name), (self.width, self.height), self._fit), self._quality)

    def labels_and_keys(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (0) and keys, both (n,) int64."""
        return np.zeros(len(rows), np.int64), rows.astype(np.int64)
