"""Key points of images: where they are, and what each looks like.

In: bytes of image files. Out: `Features` of all images, kept in a folder in parts, so that what was computed is not computed again.
Invariants: an image's features depend on its pixels alone; what cannot be read, or shows nothing, is named and has none.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2  # pyright: ignore[reportMissingImports] - an extra
import numpy as np
from tqdm import tqdm

from shards.audit.collection import Collection
from shards.files import usable_cores, write_atomically
from shards.image import open_rgb

VERSION = 2  # of how features are made; another one reads no features of this one
SIDE = 300  # pixels of the longer side of an image that is compared; a smaller one stays as it is
KEY_POINTS = 300
CONTRAST = 0.01  # of a key point; with OpenCV's own 0.04 a quarter of HAM10000's images have under 120
SMALL = 64  # pixels of the longer side of a thumbnail
PER_PART = 500  # images whose features are one file, of these arrays:
JOINED, OF_EACH = ("points", "descriptors"), ("counts", "thumbnails", "sizes", "files", "pixels", "problems")
SCALE = 381.0  # of a descriptor of length 1, to bytes


@dataclass(frozen=True)
class Features:
    """Of n images with K key points in all.

    counts: (n,) int64, key points of each image. points: (K, 2) float32, x and y in pixels of the image scaled to `SIDE`.
    descriptors: (K, 128) uint8, RootSIFT. thumbnails: (n, 64, 64) uint8, grey, at the top left. sizes: (n, 2) int64, width and
    height of the scaled image. files, pixels: (n,) SHA-256 as hex, of the file and of what it shows. problems: row -> why it has none.
    """

    counts: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray
    thumbnails: np.ndarray
    sizes: np.ndarray
    files: np.ndarray
    pixels: np.ndarray
    problems: dict[int, str]

    @cached_property
    def starts(self) -> list[int]:
        """Where the key points of each image begin, and where the last ones end: n + 1 numbers."""
        return np.concatenate([[0], np.cumsum(self.counts)]).tolist()


def extract(collection: Collection, folder: Path, threads: int = 0) -> Features:
    """Features of all images of a collection; those that `folder` has already are read from it, and those of other images removed.

    Args:
        threads: 0 for one a core.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error}). Give a folder that can be written as --out.") from error
    names, versions = collection.names, collection.versions
    arrays: list[dict[str, np.ndarray]] = []
    used = set()
    with (
        ThreadPoolExecutor(threads or usable_cores()) as pool,
        tqdm(total=len(names), unit=" images", desc="key points", disable=None) as bar,
    ):
        for start in range(0, len(names), PER_PART):
            rows = range(start, min(start + PER_PART, len(names)))
            path = folder / f"{_key(versions[start : rows.stop])}.npz"
            used.add(path)
            if (known := _load(path, len(rows))) is None:
                made = pool.map(lambda row: _describe(collection.read, row, names[row]), rows)
                known = _stack(_counted(made, bar))
                held = io.BytesIO()
                np.savez(held, **known)  # pyright: ignore[reportArgumentType] - no array is called allow_pickle
                write_atomically(path, held.getvalue())
            else:
                bar.update(len(rows))
            arrays.append(known)
    for path in set(folder.glob("*.npz")) - used:  # of images that were changed or taken out since
        path.unlink(missing_ok=True)
    joined = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
    problems = {row: str(why) for row, why in enumerate(joined.pop("problems")) if why}
    return Features(**joined, problems=problems)


def _counted(made: Iterator[dict], bar: tqdm) -> Iterator[dict]:
    for one in made:
        bar.update()
        yield one


def _key(versions: list[str]) -> str:
    words = json.dumps([VERSION, SIDE, KEY_POINTS, CONTRAST, versions])
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _load(path: Path, n_images: int) -> dict[str, np.ndarray] | None:
    """A part that was computed before; None where there is none, or one that is damaged, or of another program's making."""
    try:
        with np.load(path, allow_pickle=False) as file:
            part = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return part if set(part) == {*JOINED, *OF_EACH} and len(part["counts"]) == n_images else None


def _describe(read: Callable[[int], bytes], row: int, name: str) -> dict:
    try:
        data = read(row)
        rgb = np.asarray(open_rgb(data, name))
        if (rgb == rgb[0, 0]).all():
            raise ValueError(f"The image {name} is of one colour and shows nothing.")
    except (ValueError, OSError) as error:
        nothing = np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8)
        return _entry(*nothing, np.zeros((1, 1), np.uint8), f"unreadable {name}", f"unreadable {name}", str(error))
    grey = scaled(rgb)
    shape = np.array(rgb.shape, np.int64).tobytes()
    pixels = hashlib.sha256(shape + rgb.tobytes()).hexdigest()
    return _entry(*key_points(grey), grey, hashlib.sha256(data).hexdigest(), pixels, "")


def _entry(points: np.ndarray, descriptors: np.ndarray, grey: np.ndarray, file: str, pixels: str, why: str) -> dict:
    height, width = grey.shape
    small = cv2.resize(
        grey, (max(1, width * SMALL // SIDE), max(1, height * SMALL // SIDE)), interpolation=cv2.INTER_AREA
    )
    thumbnail = np.zeros((SMALL, SMALL), np.uint8)
    thumbnail[: small.shape[0], : small.shape[1]] = small[:SMALL, :SMALL]
    return {
        "counts": len(points),
        "points": points,
        "descriptors": descriptors,
        "thumbnails": thumbnail,
        "sizes": (width, height),
        "files": file,
        "pixels": pixels,
        "problems": why,
    }


def _stack(entries: Iterator[dict]) -> dict[str, np.ndarray]:
    made = list(entries)
    joined = {name: np.concatenate([one[name] for one in made]) for name in JOINED}
    return joined | {name: np.array([one[name] for one in made]) for name in OF_EACH}


def scaled(rgb: np.ndarray) -> np.ndarray:
    """Grey, its longer side at most `SIDE` pixels: (h, w) uint8 of (H, W, 3) uint8."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, scaled_size(rgb), interpolation=cv2.INTER_AREA)


def scaled_size(rgb: np.ndarray) -> tuple[int, int]:
    """Width and height in pixels in which an image, (H, W, 3), is compared."""
    height, width = rgb.shape[:2]
    factor = min(1.0, SIDE / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def key_points(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `KEY_POINTS` SIFT key points of an image whose contrast was evened out: (k, 2) float32, (k, 128) uint8.

    Descriptors are RootSIFT (Arandjelovic and Zisserman 2012), scaled to bytes.
    """
    even = cv2.createCLAHE(2.0, (8, 8)).apply(grey)
    sift = cv2.SIFT_create(KEY_POINTS, contrastThreshold=CONTRAST)  # pyright: ignore[reportAttributeAccessIssue]
    found, descriptors = sift.detectAndCompute(even, None)
    if descriptors is None or not len(found):
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8)
    points = np.array([point.pt for point in found], np.float32)[:KEY_POINTS]
    root = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return points, np.minimum(root * SCALE, 255).astype(np.uint8)[:KEY_POINTS]
