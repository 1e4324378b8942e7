"""What a copy of an image may have gone through: changes with which an audit is tried.

In: the bytes of an image. Out: those of its copy. Invariants: the same bytes, kind, id and seed give the same copy; what is not named
as encoded otherwise is a JPEG of quality 90.
"""

import hashlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance

from shards.image import open_rgb

Change = Callable[[Image.Image, np.random.Generator], Image.Image]
SIDE = 0.9  # of the sides that a crop keeps, of the range that colours are scaled in
SHIFT = 0.1  # of each side, at most
RECOLOURED = (0.7, 1.3)  # brightness, contrast and saturation, from and to
CHANNELS = (0.9, 1.1)  # each channel, from and to
QUALITY = 90


def make_copy(data: bytes, kind: str, image_id: str, seed: int) -> bytes:
    """The bytes of a changed copy.

    Args:
        kind: one of `KINDS`. image_id, seed: of what is drawn at random.

    Raises:
        ValueError: an image that cannot be read.
    """
    if kind == "same bytes":
        return data
    change, quality = KINDS[kind]
    words = hashlib.sha256(f"{seed} {kind} {image_id}".encode()).digest()
    rng = np.random.default_rng(list(words))
    held = io.BytesIO()
    change(open_rgb(data, image_id), rng).save(held, "JPEG", quality=quality)
    return held.getvalue()


def unchanged(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """The same pixels."""
    return image


def resized(factor: float, image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Both sides `factor` times as long."""
    size = (max(1, round(side * factor)) for side in image.size)
    return image.resize((next(size), next(size)), Image.Resampling.LANCZOS)


def transposed(how: Image.Transpose, image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Flipped or turned without a loss."""
    return image.transpose(how)


def cropped(side: float, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random part that has `side` of the width and of the height."""
    width, height = (max(1, int(length * side)) for length in image.size)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def enlarged(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cropped to `SIDE` of its sides, and scaled to what it was."""
    return cropped(SIDE, image, rng).resize(image.size, Image.Resampling.BICUBIC)


def shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Moved by up to `SHIFT` of each side, with black where nothing is left."""
    most_x, most_y = int(image.width * SHIFT), int(image.height * SHIFT)
    moved = Image.new("RGB", image.size)
    moved.paste(image, (int(rng.integers(-most_x, most_x + 1)), int(rng.integers(-most_y, most_y + 1))))
    return moved


def turned(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """By any angle about the centre, in a frame of the same size: black corners, lost ends."""
    return image.rotate(float(rng.uniform(0, 360)), Image.Resampling.BICUBIC)


def recoloured(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Other brightness, contrast, saturation, and channels."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(rng.uniform(*RECOLOURED)))
    scaled = np.asarray(image, np.float32) * rng.uniform(*CHANNELS, 3)
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def everything(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cropped and enlarged, turned, recoloured."""
    return recoloured(turned(enlarged(image, rng), rng), rng)


def mirrored_too(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Everything, and flipped."""
    return everything(image, rng).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


KINDS: dict[str, tuple[Change, int]] = {  # what is done, and the JPEG quality of the copy
    "same bytes": (unchanged, 0),
    "JPEG 50": (unchanged, 50),
    "JPEG 20": (unchanged, 20),
    "half": (partial(resized, 1 / 2), QUALITY),
    "third": (partial(resized, 1 / 3), QUALITY),
    "flip horizontal": (partial(transposed, Image.Transpose.FLIP_LEFT_RIGHT), QUALITY),
    "flip vertical": (partial(transposed, Image.Transpose.FLIP_TOP_BOTTOM), QUALITY),
    "turn 90": (partial(transposed, Image.Transpose.ROTATE_90), QUALITY),
    "transpose": (partial(transposed, Image.Transpose.TRANSPOSE), QUALITY),
    "crop area": (partial(cropped, SIDE**0.5), QUALITY),  # 0.9 of the area
    "crop sides": (enlarged, QUALITY),
    "shift": (shifted, QUALITY),
    "recolour": (recoloured, QUALITY),
    "turn": (turned, QUALITY),
    "all": (everything, 50),
    "all mirrored": (mirrored_too, 50),
}
