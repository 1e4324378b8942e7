"""Images as the model sees them: pure batch functions, on whatever device the batch is.

In: (B, 3, H, W) uint8 and numbers that identify each image. Out: (B, 3, S, S) float32, normalised. Invariants: crop,
scale, flip and rotation are one affine map and one interpolation; every random number is a hash of (seed, stream,
position), so an image is augmented in the same way at any number of processes.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.config import Augment
from harness.data.random import named_uniforms

MIXING = 1 << 40  # streams of random numbers for pairs, far from those of epochs
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision


class ViewDraws(NamedTuple):
    """What `training_view` draws for each image: (B,) float32 in [0, 1) each. Append only, as `named_uniforms` says."""

    crop_side: torch.Tensor
    crop_x: torch.Tensor
    crop_y: torch.Tensor
    hflip: torch.Tensor
    vflip: torch.Tensor
    rotates: torch.Tensor
    angle: torch.Tensor
    brightness: torch.Tensor
    contrast: torch.Tensor
    saturation: torch.Tensor
    cutout_x: torch.Tensor
    cutout_y: torch.Tensor


class MixDraws(NamedTuple):
    """What `mix` draws for each pair. Append only."""

    kind: torch.Tensor
    share: torch.Tensor
    box_x: torch.Tensor
    box_y: torch.Tensor


class SpinDraws(NamedTuple):
    """What each spin of `evaluation_views` draws for each image. Append only."""

    mirrors: torch.Tensor
    angle: torch.Tensor


def training_view(
    images: torch.Tensor, positions: torch.Tensor, epoch: int, seed: int, augment: Augment, size: int
) -> torch.Tensor:
    """One random view of each image.

    Args:
        images: (B, 3, H, W) uint8. positions: (B,) int64, places in the epoch's stream. size: S in pixels.

    Returns:
        (B, 3, S, S) float32, normalised.
    """
    draws = named_uniforms(seed, epoch, positions, ViewDraws)
    side = _between(draws.crop_side, *augment.crop_side)
    room = 1 - side  # how far the crop's centre may go from the image's, in half short sides
    offset = torch.stack([_between(draws.crop_x, -1, 1) * room, _between(draws.crop_y, -1, 1) * room], 1)
    flips = torch.stack([_sign(draws.hflip < augment.hflip_prob), _sign(draws.vflip < augment.vflip_prob)], 1)
    rotates = (draws.rotates < augment.rotation_prob).float()
    angle = _between(draws.angle, -augment.rotation_degrees, augment.rotation_degrees) * rotates * (torch.pi / 180)
    views = _warp(images, side, offset, flips, angle, size, augment)
    if augment.brightness or augment.contrast or augment.saturation:
        brightness = 1 + _between(draws.brightness, -1, 1) * augment.brightness
        contrast = 1 + _between(draws.contrast, -1, 1) * augment.contrast
        saturation = 1 + _between(draws.saturation, -1, 1) * augment.saturation
        views = _recolour(views, brightness, contrast, saturation)
    views = _normalise(views, augment)
    if augment.cutout:  # the mean colour is 0 after normalisation
        centres = torch.stack([draws.cutout_x, draws.cutout_y], 1)
        half = torch.full_like(draws.cutout_x, 0.5 * augment.cutout)
        views = views * ~_boxes(centres, half, size)[:, None]
    return views


def mix(
    views: torch.Tensor, positions: torch.Tensor, epoch: int, seed: int, augment: Augment
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend neighbours of the stream, or let them exchange a rectangle; some pairs stay as they are.

    Args:
        views: (B, 3, S, S), pairs stand beside each other. positions: (B,) int64, even numbers first.

    Returns:
        the views, and for each the share of it that is its own, (B,) float32; the rest is its neighbour's.
    """
    draws = named_uniforms(seed, MIXING + epoch, positions[::2], MixDraws)
    size, own = views.shape[-1], views.new_ones((len(views) // 2, 1, *views.shape[2:]))  # (B/2, 1, S, S)
    blended = draws.kind < augment.mixup_prob
    exchanged = (draws.kind >= augment.mixup_prob) & (draws.kind < augment.mixup_prob + augment.cutmix_prob)
    share = (draws.share * (torch.pi / 2)).sin().square()  # Beta(1/2, 1/2), by its inverse distribution function
    own = torch.where(blended[:, None, None, None], share[:, None, None, None].to(own), own)
    half = 0.5 * (1 - draws.share).sqrt()  # area 1 - u, before its edges are cut
    boxes = _boxes(torch.stack([draws.box_x, draws.box_y], 1), half, size)
    own = torch.where((exchanged[:, None, None] & boxes)[:, None], torch.zeros_like(own), own)
    first, second = views[::2], views[1::2]
    mixed = torch.stack([own * first + (1 - own) * second, own * second + (1 - own) * first], 1).flatten(0, 1)
    return mixed.contiguous(memory_format=torch.channels_last), own.mean((1, 2, 3)).float().repeat_interleave(2)


def _boxes(centres: torch.Tensor, half: torch.Tensor, size: int) -> torch.Tensor:
    """Squares in images, cut off at their edges: (n, 2) centres and (n,) half sides, in sides, to (n, S, S) bool."""
    places = (torch.arange(size, device=half.device) + 0.5) / size
    inside = (places - centres[..., None]).abs() < half[:, None, None]  # (n, 2, S)
    return inside[:, 1, :, None] & inside[:, 0, None, :]


def plain_view(images: torch.Tensor, augment: Augment, size: int) -> torch.Tensor:
    """The central square, upright: (B, 3, H, W) uint8 to (B, 3, S, S) float32, normalised."""
    n = len(images)
    upright = images.new_ones((n, 2), dtype=torch.float32)
    nothing = images.new_zeros((n, 2), dtype=torch.float32)
    return _normalise(_warp(images, upright[:, 0], nothing, upright, nothing[:, 0], size, augment), augment)


def evaluation_views(
    kind: str, images: torch.Tensor, keys: torch.Tensor, seed: int, augment: Augment, size: int
) -> Iterator[torch.Tensor]:
    """The views of test-time augmentation, one after the other; only one is in memory.

    Args:
        kind: none, flips, dihedral8 or spins:N. keys: (B,) int64, which choose the angles of spins.

    Yields:
        (B, 3, S, S) float32, normalised. The first is the plain view, but for spins, which have none.
    """
    turns, mirrored, spins = parse_views(kind)
    if spins:
        for number in range(spins):
            draws = named_uniforms(seed, -1 - number, keys, SpinDraws)
            ones = torch.ones_like(draws.mirrors)
            flips = torch.stack([_sign(draws.mirrors < 0.5), ones], 1)
            angle = _between(draws.angle, -torch.pi, torch.pi)
            yield _normalise(_warp(images, ones, torch.zeros_like(flips), flips, angle, size, augment), augment)
        return
    plain = plain_view(images, augment, size)
    for turn in turns:
        for mirror in mirrored:
            view = torch.rot90(plain, turn, (2, 3)) if turn else plain
            yield (view.flip(3) if mirror else view).contiguous(memory_format=torch.channels_last)


def parse_views(kind: str) -> tuple[tuple[int, ...], tuple[bool, ...], int]:
    """What a kind of test-time augmentation means: quarter turns, mirrored or not, number of spins.

    Raises:
        ValueError: there is no such kind.
    """
    known = {
        "none": ((0,), (False,), 0),
        "flips": ((0, 2), (False, True), 0),
        "dihedral8": ((0, 1, 2, 3), (False, True), 0),
    }
    name, _, number = kind.partition(":")
    if name == "spins" and number.isdecimal() and int(number) > 0:
        return (), (), int(number)
    if kind not in known:
        raise ValueError(f"The 'eval.views' setting must be none, flips, dihedral8 or spins:N. Got {kind!r} instead.")
    return known[kind]


def _between(draw: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * draw


def _sign(mirrored: torch.Tensor) -> torch.Tensor:
    return 1.0 - 2.0 * mirrored.float()


def _warp(
    images: torch.Tensor,
    side: torch.Tensor,
    offset: torch.Tensor,
    flips: torch.Tensor,
    angle: torch.Tensor,
    size: int,
    augment: Augment,
) -> torch.Tensor:
    """Cut a rotated, mirrored square out of each image.

    Args:
        images: (B, 3, H, W) uint8. side: (B,) of the square, offset: (B, 2) of its centre, both in short sides of the
            image (offset in halves). flips: (B, 2) of +-1. angle: (B,) radians.

    Returns:
        (B, 3, S, S) float32 in 0..255, black outside the image.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    pixels = images.float()
    shrink = int(short * augment.crop_side[0] / size)
    if shrink > 1:  # bilinear interpolation alone would skip pixels: average blocks first, as many as never enlarges
        pixels = F.avg_pool2d(pixels, shrink, ceil_mode=True, count_include_pad=False)
    across, down = pixels.shape[3] * max(1, shrink), pixels.shape[2] * max(1, shrink)  # pixels of the image
    cos, sin = angle.cos(), angle.sin()
    (scale_x, scale_y), (offset_x, offset_y) = (side[:, None] * flips).unbind(1), offset.unbind(1)
    # From the square's [-1, 1] to pixels from the image's centre, then to the sampled array's [-1, 1].
    x = torch.stack([cos * scale_x, -sin * scale_y, offset_x + (width - across) / short], 1) * (short / across)
    y = torch.stack([sin * scale_x, cos * scale_y, offset_y + (height - down) / short], 1) * (short / down)
    grid = F.affine_grid(torch.stack([x, y], 1), [len(images), 3, size, size], align_corners=False)  # (B, S, S, 2)
    views = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if augment.fill == "black":  # beyond the central square there is nothing, as if cropped before the rotation
        from_centre_x = ((grid[..., 0] + 1) * across - width) / short  # in halves of the square's side
        from_centre_y = ((grid[..., 1] + 1) * down - height) / short
        views = views * (torch.maximum(from_centre_x.abs(), from_centre_y.abs()) <= 1 + 1e-6)[:, None]
    return views.contiguous(memory_format=torch.channels_last)


def _recolour(
    views: torch.Tensor, brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor
) -> torch.Tensor:
    """Brightness, contrast (about the mean luminance) and saturation as one matrix; factors (B,), views in 0..255."""
    luma = _constant(LUMA, views.device)
    mean = (views.mean((2, 3)) * luma).sum(1)  # (B,)
    identity = torch.eye(3, device=views.device)
    matrix = saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * luma  # (B, 3, 3)
    matrix = matrix * (brightness * contrast)[:, None, None]
    shift = brightness * (1 - contrast) * mean
    recoloured = torch.einsum("bij,bjhw->bihw", matrix, views) + shift[:, None, None, None]
    return recoloured.clamp(0, 255).contiguous(memory_format=torch.channels_last)


def _normalise(views: torch.Tensor, augment: Augment) -> torch.Tensor:
    mean, std = (_constant(values, views.device)[:, None, None] for values in augment.normalization)
    return (views / 255 - mean) / std


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A tensor that is made once for each device: each making would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
