"""Colours of an image, brought to sRGB by the ICC profile in its file.

In: 8-bit pixels and the bytes of a profile. Out: RGB pixels in sRGB. Invariants: pixels whose profile says sRGB keep their
values; a profile that cannot be used changes nothing, and says so.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

CONVERTED = "colours converted to sRGB"
IGNORED = "a colour profile that cannot be used is ignored"
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space -> Pillow's
NEAR = (
    2  # grey levels of 255 by which a profile may differ from sRGB and still be it: versions of it round in other ways
)


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """RGB or L pixels in sRGB (with relative colorimetric intent, as cameras' profiles expect), and what was done, if anything.

    Args:
        image: of mode RGB, L or CMYK. profile: an ICC profile.
    """
    try:
        transform = _transform(profile, image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError):  # what Pillow makes of lcms's errors
        return image, IGNORED
    if transform is None:
        return image, ""
    converted = ImageCms.applyTransform(image, transform)
    return (image, IGNORED) if converted is None else (converted, CONVERTED)


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB itself.

    Raises:
        ValueError: the profile is of another colour space than the pixels.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space  # pyright: ignore[reportAttributeAccessIssue] - set since it opened
    if MODES.get(space) != mode:
        raise ValueError(f"a profile of {space.strip()} in a picture of {mode}")
    srgb = ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", renderingIntent=intent)
    return None if mode != "CMYK" and _keeps_colours(transform, mode) else transform


def _keeps_colours(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    colours = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 18, 3)
    sample = Image.fromarray(np.ascontiguousarray(colours))
    found = ImageCms.applyTransform(sample, transform)
    assert found is not None  # it is only in place that Pillow returns nothing
    return int(np.abs(np.asarray(found, dtype=int) - np.asarray(sample.convert("RGB"), dtype=int)).max()) <= NEAR
