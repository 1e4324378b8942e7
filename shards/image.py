"""One stored image: open anything, fit it to the stored size, encode it; decode a batch into one array.

In: files or bytes of JPEG, PNG or WebP. Out: JPEG bytes of exactly the stored size, and later (B, H, W, 3) uint8.
Invariants: an image that cannot be read whole is an error that names it, never a grey rectangle.
"""

import io
import struct
from functools import cache

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.colour import to_srgb

FITS = ("cover", "contain", "squeeze")
# Pillow knows more, some of which run other programs (EPS); a file's name and its bytes may tell different stories.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # Pillow's name -> simplejpeg's
JPEG, JPEG_END = b"\xff\xd8", b"\xff\xd9"
NO_END_SAID = "Premature end of JPEG file"  # libjpeg's words, as those below
JPEG_DAMAGE = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")
PNG = b"\x89PNG\r\n\x1a\n"
NO_END = "a JPEG without its end marker: all rows are there"
CHUNK_IGNORED = "a damaged text, EXIF or profile chunk of a PNG is ignored"
EXIF_IGNORED = "damaged EXIF is ignored"
ORIENTATION = 0x0112  # the EXIF tag
TURNS = (  # for the EXIF orientations 2 to 8
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
UPRIGHT = dict(enumerate(TURNS, start=2))


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
    """Decode a whole image to upright RGB, as `open_noted` does."""
    return open_noted(data, name, size)[0]


def open_noted(data: bytes, name: str, size: tuple[int, int] | None = None) -> tuple[Image.Image, list[str]]:
    """Decode a whole image to upright RGB, and say what was done to it that its owner may not expect.

    Greyscale becomes three equal channels, transparency is laid on black, EXIF orientation is applied,
    16-bit greyscale is scaled to 8, colours with an ICC profile are converted to sRGB.

    Args:
        data: the file's bytes.
        name: what errors call it.
        size: (width, height) in pixels that it must have, before memory is taken for it; None for any that Pillow takes.

    Raises:
        ValueError: not an image, or a damaged or cut-off one, or one of another size, or with more than 16 bits a channel.
    """
    notes: list[str] = []
    try:
        opened, pixels = _load(data, size, notes)
        turn = _orientation(opened, notes)
        rgb = _to_rgb(pixels, opened, notes)
        return (rgb if turn is None else rgb.transpose(turn)), notes
    except UnidentifiedImageError as error:  # in whose words the bytes have an address
        known = ", ".join(readable_formats())
        raise ValueError(
            f"Cannot decode the image {name} (it is none of {known}). Download it again or remove its row."
        ) from error
    except Exception as error:  # Pillow's decoders raise what they like: SyntaxError, struct.error, ...
        raise ValueError(f"Cannot decode the image {name} ({error}). Download it again or remove its row.") from error


def _load(data: bytes, size: tuple[int, int] | None, notes: list[str]) -> tuple[Image.Image, Image.Image]:
    """What the file says of itself, and its pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=readable_formats())
        if size is not None and image.size != size:
            raise ValueError(_other_size(image.size, size))
        if data.startswith(JPEG) and image.mode in JPEG_COLOURS:
            return image, _decode_jpeg(data, image, notes)
        image.load()
    except Exception:
        if not data.startswith(PNG) or (essential := _essential_chunks(data)) == data:
            raise
        notes.append(CHUNK_IGNORED)
        return _load(essential, size, notes)
    return image, image


def _decode_jpeg(data: bytes, opened: Image.Image, notes: list[str]) -> Image.Image:
    """The pixels of a JPEG. libjpeg fills what is missing with grey and only warns; here that is an error.

    Where nothing but the end marker is missing, all rows are there; but of a progressive one, the scans of the finest detail may be missing.
    """
    try:
        pixels = simplejpeg.decode_jpeg(data, JPEG_COLOURS[opened.mode], strict=True)
    except ValueError as error:
        if NO_END_SAID in str(error) and not data.endswith(JPEG_END) and not opened.info.get("progressive"):
            whole = _decode_jpeg(data.removesuffix(JPEG_END[:1]) + JPEG_END, opened, notes)
            notes.append(NO_END)
            return whole
        if any(word in str(error) for word in JPEG_DAMAGE):
            raise
        pixels = None  # a warning that is none: an unknown revision, bytes too many before a marker
    if pixels is None or opened.mode == "CMYK":  # of which there are several conventions, which Pillow knows
        return Image.open(io.BytesIO(data), formats=("JPEG",)).convert(opened.mode)
    return Image.fromarray(pixels.squeeze(-1) if opened.mode == "L" else pixels)


def _orientation(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever the bytes are
        notes.append(EXIF_IGNORED)
        return None


def _to_rgb(image: Image.Image, opened: Image.Image, notes: list[str]) -> Image.Image:
    alpha, profile = None, opened.info.get("icc_profile")
    is_deep = image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM"))
    if is_deep:  # Pillow would clip it
        image, clear = _of_16_bits(image), image.info.get("transparency")
        if isinstance(clear, int):
            alpha = Image.fromarray(np.where(np.asarray(opened) == clear, 0, 255).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
    elif image.mode in ("I", "F"):
        raise ValueError(
            "it has 32 bits a channel, and nothing says which values are black and white; save it with 8 or 16"
        )
    elif image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image, note = to_srgb(image, profile)
        notes += [note] if note else []
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image


def _of_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))


def _essential_chunks(data: bytes) -> bytes:
    """A PNG without the chunks that pixels do not need (text, EXIF, profile), which may be broken while the picture is whole."""
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if kind[:1].isupper() or kind == b"tRNS":  # a capital marks what a decoder must understand
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


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
        left, top = max(0.0, (width - w / scale) / 2), max(0.0, (height - h / scale) / 2)  # rounding made it -1e-14
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
    if data.startswith(JPEG):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            if (width, height) == size:
                # Fast upsampling of colours takes 8 % less time and has no bias. The fast DCT would take another 3 %, and lowers
                # red and blue by more than one level on average: another decoder's images would not be those of training.
                simplejpeg.decode_jpeg(data, buffer=out, fastupsample=True)
                return
        except Exception as error:  # whatever the bytes are, the sample is named
            raise ValueError(str(error)) from error
        raise ValueError(_other_size((width, height), size))
    out[:] = np.asarray(open_rgb(data, "in the shard", size))


def _other_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    return f"it is {found[0]}x{found[1]}, the dataset's size is {wanted[0]}x{wanted[1]}"
