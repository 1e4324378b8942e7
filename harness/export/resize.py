"""Pillow's antialiased bicubic resize to the stored size, as two matrix products in the graph.

In: (N, 3, H, W) levels of grey, H and W dynamic. Out: (N, 3, h, w), whole numbers. Invariants: what `shards.image.fit` gives,
to the bit: Pillow adds up whole numbers below 2^31, which float64 holds and float32 does not. An image of the stored size stays as it
is. No operator for resizing is used: each runtime has its own antialiasing.

What is not in the graph: packing first averages blocks where it shrinks by 4 or more (Pillow's `reducing_gap`), for speed.
"""

import torch

from shards.image import FITS

CUBIC = -0.5  # Pillow's a (Keys, 1981); OpenCV's and torch's plain bicubic have -0.75
RADIUS = 2.0  # of the cubic, in pixels
FRACTION = 2.0**22  # Pillow computes in whole numbers; its weights have so many bits behind the point
ALL = slice(None)


def fit_levels(
    levels: torch.Tensor, size: tuple[int, int], how: str, columns: slice = ALL, rows: slice = ALL
) -> torch.Tensor:
    """Bring images to the stored size, and compute no more than some of its columns and rows.

    Args:
        levels: (N, 3, H, W) float64 in 0..255, whole numbers. size: (width, height) in pixels. how: cover, contain or squeeze.

    Returns:
        (N, 3, height, width) float64, of the columns and rows asked for, in 0..255, whole numbers.

    Raises:
        ValueError: no such fit.
    """
    height, width = levels.shape[2:]
    (left, right, new_width), (top, bottom, new_height) = _boxes(height, width, size, how)
    across = _weights(width, size[0], left, right, new_width)[columns]
    down = _weights(height, size[1], top, bottom, new_height)[rows]
    # Between the two, Pillow keeps whole levels, none beyond black and white: so their order matters where edges are sharp.
    # Since version 13 it begins with the columns where these lose many pixels.
    lost = _number(height) - new_height
    columns_first = (lost > 0) & (lost > 2 * (_number(width) - new_width))
    return torch.cond(columns_first, _columns_first, _rows_first, (levels, across, down))


def _rows_first(levels: torch.Tensor, across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return _whole(down @ _whole(levels @ across.T))


def _columns_first(levels: torch.Tensor, across: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return _whole(_whole(down @ levels) @ across.T)


def _whole(levels: torch.Tensor) -> torch.Tensor:
    return (levels + 0.5).floor().clamp(0, 255)


def _boxes(
    height: int, width: int, size: tuple[int, int], how: str
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """For x and y: where the part that is resized starts and stops, and its new length, all () float64, in pixels."""
    full_width, full_height, stored_width, stored_height = map(_number, (width, height, *size))
    nothing = _number(0)
    if how == "squeeze":
        return (nothing, full_width, stored_width), (nothing, full_height, stored_height)
    if how == "cover":
        scale = torch.maximum(stored_width / full_width, stored_height / full_height)
        left = ((full_width - stored_width / scale) / 2).clamp(min=0)
        top = ((full_height - stored_height / scale) / 2).clamp(min=0)
        return (left, full_width - left, stored_width), (top, full_height - top, stored_height)
    if how == "contain":  # torch rounds halves to even, as Python does in ImageOps.contain; 0 leaves all black
        is_wide = full_width / full_height > stored_width / stored_height
        lower = (full_height / full_width * stored_width).round()
        narrower = (full_width / full_height * stored_height).round()
        return (
            (nothing, full_width, torch.where(is_wide, stored_width, narrower)),
            (nothing, full_height, torch.where(is_wide, lower, stored_height)),
        )
    raise ValueError(f"The 'fit' of a dataset must be one of {', '.join(FITS)}. Got {how!r} instead.")


def _weights(n_in: int, n_out: int, start: torch.Tensor, stop: torch.Tensor, resized: torch.Tensor) -> torch.Tensor:
    """Pillow's `precompute_coeffs`: n_in pixels from start to stop become so many, in the middle of n_out.

    Args:
        start, stop: in pixels, and resized: a whole number up to n_out; all () float64.

    Returns:
        (n_out, n_in) float64, each row sums to 1, or to 0 where there is only padding.
    """
    start, stop = start.float(), stop.float()  # Pillow hands its box on in single precision
    scale = (stop - start).double() / resized
    spread = scale.clamp(min=1.0)  # above 1 where it shrinks: that is the antialiasing
    places = torch.arange(n_out, dtype=torch.float64) - ((n_out - resized) * 0.5).round()  # (n_out,)
    is_inside = (places >= 0) & (places < resized)
    centres = start.double() + (places + 0.5) * scale
    pixels = torch.arange(n_in, dtype=torch.float64) + 0.5  # (n_in,)
    distance = (pixels[None, :] - centres[:, None]).abs() / spread
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * CUBIC
    cubic = torch.where(distance < 1, near, torch.where(distance < RADIUS, far, torch.zeros_like(distance)))
    normalised = (cubic / cubic.sum(1, keepdim=True) * FRACTION).round() / FRACTION
    return torch.where(is_inside[:, None], normalised, torch.zeros_like(normalised))


def _number(value: int) -> torch.Tensor:
    """() float64; of a dynamic size, too."""
    return torch.full((), value, dtype=torch.float64)
