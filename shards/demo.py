"""Drawn lesions in HAM10000's own layout, for the demo and the tests.

In: a folder name, a number of images, a seed. Out: `HAM10000_metadata.csv` and two folders of 600x450 JPEG. Invariants: the
seven classes differ by shape and texture; skin, lesion colour, size and place come from the same distributions for
all, so that the mean colour of an image hardly predicts its class.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from shards.files import new_folder
from shards.ham10000 import DRAWN, HAM10000_CLASSES

SHARES = {"mel": 0.14, "nv": 0.22, "bcc": 0.13, "akiec": 0.13, "bkl": 0.14, "df": 0.12, "vasc": 0.12}
WIDTH, HEIGHT = 600, 450
STEP = 2  # pixels of an image to one that is drawn: the rest is interpolated, which is four times faster


def draw(out: Path, images: int = 700, seed: int = 0) -> None:
    """Draw a demo source into `out`, which must not exist yet.

    Args:
        out: the folder to make.
        images: number of images; at least 42, so that each class has lesions for three splits. About one lesion in
            three is drawn twice, rotated and with other lighting.
        seed: a different seed draws different lesions.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: too few images.
    """
    out = Path(out)
    if images < 42:
        raise ValueError(f"A demo needs at least 42 images, six a class. Got {images} instead.")
    with new_folder(out) as folder:
        _draw_all(folder, images, seed)


def _draw_all(out: Path, images: int, seed: int) -> None:
    folders = [out / "HAM10000_images_part_1", out / "HAM10000_images_part_2"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows, lesion = [], 0
    for label in HAM10000_CLASSES:
        wanted = max(6, round(SHARES[label] * images))
        while wanted > 0:
            shape_seed = int(rng.integers(2**31))
            person = {"age": f"{5.0 * rng.integers(4, 17):.1f}", "sex": str(rng.choice(["female", "male"]))}
            for _ in range(min(wanted, 1 + int(rng.random() < 0.33))):
                number = len(rows)
                image_id = f"DEMO_{number:07d}"
                image = _draw_image(label, np.random.default_rng(shape_seed), rng)
                folder = folders[number % 2]
                Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(
                    folder / f"{image_id}.jpg", quality=90
                )
                place = str(rng.choice(["back", "trunk", "face", "lower extremity"]))
                row = {"lesion_id": f"DRAWN_{lesion:07d}", "image_id": image_id, "dx": label, "dx_type": DRAWN}
                rows.append(row | person | {"localization": place})
                wanted -= 1
            lesion += 1
    pd.DataFrame(rows).to_csv(out / "HAM10000_metadata.csv", index=False)


def _draw_image(label: str, shape: np.random.Generator, view: np.random.Generator) -> np.ndarray:
    """(225, 300, 3) uint8: `shape` decides the lesion, `view` the photograph of it."""
    skin = np.float32(shape.uniform(170, 240) * np.array([1.0, shape.uniform(0.72, 0.82), shape.uniform(0.6, 0.75)]))
    dark = skin * np.float32(
        shape.uniform(0.35, 0.7) * np.array([1.0, shape.uniform(0.8, 1.0), shape.uniform(0.8, 1.05)])
    )
    radius = np.float32(shape.uniform(110, 170))
    turn, centre = np.float32(view.uniform(0, 2 * np.pi)), view.uniform(-30, 30, 2).astype(np.float32)
    y, x = np.mgrid[0:HEIGHT:STEP, 0:WIDTH:STEP].astype(np.float32)
    x, y = (x - WIDTH / 2 - centre[0]) / radius, (y - HEIGHT / 2 - centre[1]) / radius
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    weight = _PATTERNS[label](x, y, r, angle, shape).clip(0, 1)[..., None]
    grain = view.normal(0, 5, (*x.shape, 1)).astype(np.float32)
    light = 1 + 0.06 * (x * np.cos(turn) + y)[..., None].clip(-2, 2)
    image = (skin * (1 - weight) + dark * weight) * light * np.float32(view.uniform(0.9, 1.08)) + grain
    return image.clip(0, 255).astype(np.uint8)


def _soft(value: np.ndarray, width: float = 0.06) -> np.ndarray:
    """A step from 0 to 1 around value 0, `width` wide (in lesion radii), free of hard pixels."""
    return 1 / (1 + np.exp(-(value / width).clip(-30, 30)))


def _blobs(x, y, shape, n: int, low: float, high: float, reach: float) -> np.ndarray:
    """The union of n soft discs with radii between low and high, centred within reach."""
    union = np.zeros_like(x)
    for _ in range(n):
        away, turn, size = reach * np.sqrt(shape.uniform()), shape.uniform(0, 2 * np.pi), shape.uniform(low, high)
        union = np.maximum(union, _soft(size - np.hypot(x - away * np.cos(turn), y - away * np.sin(turn)), 0.03))
    return union


def _mel(x, y, r, angle, shape):
    """An uneven star: jagged border."""
    waves = sum(shape.uniform(0.6, 1) * np.cos(k * angle + shape.uniform(0, 6.28)) for k in (5, 7, 11)) / 3
    return _soft(0.85 + 0.45 * waves - r) * shape.uniform(0.7, 1)


def _nv(x, y, r, angle, shape):
    """A smooth, even oval."""
    return _soft(0.9 - np.hypot(x, y * shape.uniform(1.0, 1.3))) * shape.uniform(0.5, 0.9)


def _bcc(x, y, r, angle, shape):
    """A pale oval with dark branching vessels."""
    weight = 0.3 * _soft(1.0 - r)
    for _ in range(int(shape.integers(6, 9))):
        turn, bend = shape.uniform(0, 2 * np.pi), shape.uniform(-0.6, 0.6)
        along = x * np.cos(turn) + y * np.sin(turn)
        across = -x * np.sin(turn) + y * np.cos(turn) - bend * along**2
        weight = np.maximum(weight, _soft(0.05 - abs(across), 0.02) * (along > 0) * _soft(1.0 - r))
    return weight * shape.uniform(0.8, 1)


def _akiec(x, y, r, angle, shape):
    """A chequered patch."""
    scale = shape.uniform(7, 10)
    return _soft(0.95 - r) * (0.5 + 0.5 * np.tanh(3 * np.sin(scale * x) * np.sin(scale * y))) * shape.uniform(0.8, 1)


def _bkl(x, y, r, angle, shape):
    """Parallel ridges, like a fingerprint."""
    ridges = np.sin(shape.uniform(12, 16) * (x + 0.15 * np.sin(3 * y)) + shape.uniform(0, 6.28))
    return _soft(0.95 - r) * (0.5 + 0.5 * np.tanh(2 * ridges)) * shape.uniform(0.8, 1)


def _df(x, y, r, angle, shape):
    """A ring around a pale centre."""
    return _soft(0.95 - r) * _soft(r - shape.uniform(0.4, 0.6)) * shape.uniform(0.6, 1)


def _vasc(x, y, r, angle, shape):
    """A cluster of separate lacunae."""
    return _blobs(x, y, shape, int(shape.integers(9, 15)), 0.14, 0.26, 0.95) * shape.uniform(0.7, 1)


_PATTERNS = {"mel": _mel, "nv": _nv, "bcc": _bcc, "akiec": _akiec, "bkl": _bkl, "df": _df, "vasc": _vasc}
