"""One stored image: open anything, fit it to the stored size, encode it; decode a batch into one array.

In: files or bytes of JPEG, PNG or WebP. Out: JPEG bytes of exactly the stored size, and later (B, H, W, 3) uint8.
Invariants: an image that cannot be read whole is an error that names it, never a grey rectangle.
"""

import io
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

FITS = ("cover", "contain", "squeeze")
# Pillow knows more, some of which run other programs (EPS); a file's name and its bytes may tell different stories.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow reads: older ones have no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of the files that are images, in small letters: those of every format that is read."""
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in readable_formats())


def open_rgb(data: bytes, name: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a whole image to upright RGB.

    Greyscale becomes three equal channels, transparency is laid on black, EXIF orientation is applied,
    16-bit greyscale is scaled to 8.

    Args:
        data: the file's bytes.
        name: what errors call it.
        size: (width, height) in pixels that it must have, before memory is taken for it; None for any that Pillow takes.

    Raises:
        ValueError: not an image, or a damaged or cut-off one, or one of another size.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
        if size is not None and image.size != size:
            raise ValueError(_other_size(image.size, size))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise what they like: SyntaxError, struct.error, ...
        raise ValueError(f"Cannot decode the image {name} ({error}). Download it again or remove its row.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    elif image.mode.startswith("I"):  # 16-bit greyscale: Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    """Bring an image to the stored size with an antialiased bicubic resize.

    Args:
        image: RGB.
        size: (width, height) in pixels.
        how: `cover` scales until it covers and crops the centre, `contain` scales until it fits and pads with black,
            `squeeze` ignores the aspect ratio.
    """
    if image.size == size:
        return image
    if how == "squeeze":
        return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if how == "contain":
        return ImageOps.pad(image, size, Image.Resampling.BICUBIC)
    if how == "cover":
        (width, height), (w, h) = image.size, size
        scale = max(w / width, h / height)
        left, top = (width - w / scale) / 2, (height - h / scale) / 2
        box = (left, top, width - left, height - top)
        return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    raise ValueError(f"The 'fit' of a dataset must be one of {', '.join(FITS)}. Got {how!r} instead.")


def encode(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes at `quality` (1 to 100), colour stored at half resolution (4:2:0)."""
    return simplejpeg.encode_jpeg(np.asarray(image), quality=quality, colorspace="RGB", colorsubsampling="420")


def decode_into(data: bytes, out: np.ndarray) -> None:
    """Decode one stored image into `out`, (H, W, 3) uint8, contiguous.

    Raises:
        ValueError: damaged data, or an image of another size.
    """
    size = out.shape[1], out.shape[0]
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if (width, height) == size:
                # Fast DCT and upsampling: 12 % more images a second, at most a few grey levels off.
                simplejpeg.decode_jpeg(data, buffer=out, fastdct=True, fastupsample=True)
                return
        except Exception as error:  # whatever the bytes are, the sample is named
            raise ValueError(str(error)) from error
        raise ValueError(_other_size((width, height), size))
    out[:] = np.asarray(open_rgb(data, "in the shard", size))


def _other_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    return f"it is {found[0]}x{found[1]}, the dataset's size is {wanted[0]}x{wanted[1]}"
