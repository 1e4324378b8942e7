"""Images as the model sees them: pure batch functions, on whatever device the batch is.

In: (B, 3, H, W) uint8 and numbers that identify each image. Out: (B, 3, S, S) float32, normalised. Invariants: crop,
scale, flip and rotation are one affine map and one interpolation; every random number is a hash of (seed, stream,
position), so an image is augmented in the same way at any number of processes. What is drawn, and the matrices made of it, are
computed where the positions are: on the host, so that a GPU is sent one array of numbers and few kernels.
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
        images: (B, 3, H, W) uint8. positions: (B,) int64 on the host, places in the epoch's stream. size: S in pixels.

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
    numbers = [_affine(images, side, offset, flips, angle, size, augment)]
    if recolours := bool(augment.brightness or augment.contrast or augment.saturation):
        brightness = 1 + _between(draws.brightness, -1, 1) * augment.brightness
        contrast = 1 + _between(draws.contrast, -1, 1) * augment.contrast
        saturation = 1 + _between(draws.saturation, -1, 1) * augment.saturation
        numbers += [_colour_matrix(brightness, contrast, saturation), brightness * (1 - contrast)]
    if augment.cutout:
        half = torch.full_like(draws.cutout_x, 0.5 * augment.cutout)
        numbers += [_sides(draws.cutout_x, half, size), _sides(draws.cutout_y, half, size)]
    affine, *numbers = _moved(numbers, images.device)
    views = _warp(images, affine, size, augment)
    if recolours:
        views = _recolour(views, *numbers[:2])
    views = _normalise(views, augment)
    if augment.cutout:  # the mean colour is 0 after normalisation
        cut_x, cut_y = numbers[-2:]
        views = views * (1 - cut_y[:, :, None] * cut_x[:, None])[:, None]
    return views


def mix(
    views: torch.Tensor, positions: torch.Tensor, epoch: int, seed: int, augment: Augment
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blend neighbours of the stream, or let them exchange a rectangle; some pairs stay as they are.

    Args:
        views: (B, 3, S, S), pairs stand beside each other. positions: (B,) int64 on the host, even numbers first.

    Returns:
        the views, and for each the share of it that is its own, (B,) float32; the rest is its neighbour's.
    """
    draws = named_uniforms(seed, MIXING + epoch, positions[::2], MixDraws)
    size = views.shape[-1]
    blended = draws.kind < augment.mixup_prob
    exchanged = (draws.kind >= augment.mixup_prob) & (draws.kind < augment.mixup_prob + augment.cutmix_prob)
    share = (draws.share * (torch.pi / 2)).sin().square()  # Beta(1/2, 1/2), by its inverse distribution function
    half = 0.5 * (1 - draws.share).sqrt()  # area 1 - u, before its edges are cut
    numbers = [
        torch.where(blended, share, torch.ones_like(share)),
        _sides(draws.box_x, half, size) * exchanged[:, None],
        _sides(draws.box_y, half, size),
    ]
    own, box_x, box_y = _moved(numbers, views.device)
    own = (own[:, None, None] * (1 - box_y[:, :, None] * box_x[:, None]))[:, None].to(views)  # (B/2, 1, S, S)
    first, second = views[::2], views[1::2]
    mixed = torch.stack([own * first + (1 - own) * second, own * second + (1 - own) * first], 1).flatten(0, 1)
    return mixed.contiguous(memory_format=torch.channels_last), own.mean((1, 2, 3)).float().repeat_interleave(2)


def _sides(centres: torch.Tensor, half: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixels of a row or column are in a square, cut off at the edge: (n,) centres and half sides, in sides, to (n, S) of 0 and 1."""
    places = (torch.arange(size, device=half.device) + 0.5) / size
    return ((places - centres[:, None]).abs() < half[:, None]).float()


def _moved(numbers: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Float32 tensors of any shapes, by one copy to a device that they are not on."""
    if numbers[0].device == device:
        return numbers
    flat = torch.cat([tensor.flatten() for tensor in numbers])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in numbers])
    return [part.view(tensor.shape) for part, tensor in zip(parts, numbers, strict=True)]


def plain_view(images: torch.Tensor, augment: Augment, size: int) -> torch.Tensor:
    """The central square, upright: (B, 3, H, W) uint8 to (B, 3, S, S) float32, normalised."""
    upright, nothing = torch.ones(len(images), 2), torch.zeros(len(images), 2)
    affine = _affine(images, upright[:, 0], nothing, upright, nothing[:, 0], size, augment)
    (affine,) = _moved([affine], images.device)
    return _normalise(_warp(images, affine, size, augment), augment)


def evaluation_views(
    kind: str, images: torch.Tensor, keys: torch.Tensor, seed: int, augment: Augment, size: int
) -> Iterator[torch.Tensor]:
    """The views of test-time augmentation, one after the other; only one is in memory.

    Args:
        kind: none, flips, dihedral8 or spins:N. keys: (B,) int64 on the host, which choose the angles of spins.

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
            affine = _affine(images, ones, torch.zeros_like(flips), flips, angle, size, augment)
            (affine,) = _moved([affine], images.device)
            yield _normalise(_warp(images, affine, size, augment), augment)
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


def _shrink(images: torch.Tensor, size: int, augment: Augment) -> tuple[int, int, int]:
    """By how much images (B, 3, H, W) are averaged before the interpolation, and then how many pixels they span across and down.

    Bilinear interpolation alone would skip pixels: blocks are averaged first, as many as never enlarges.
    """
    height, width = images.shape[2:]
    shrink = max(1, int(min(height, width) * augment.crop_side[0] / size))
    return shrink, -(-width // shrink) * shrink, -(-height // shrink) * shrink


def _affine(
    images: torch.Tensor,
    side: torch.Tensor,
    offset: torch.Tensor,
    flips: torch.Tensor,
    angle: torch.Tensor,
    size: int,
    augment: Augment,
) -> torch.Tensor:
    """From the [-1, 1] of a rotated, mirrored square to that of the array that is sampled.

    Args:
        images: (B, 3, H, W), for their shape alone. side: (B,) of the square, offset: (B, 2) of its centre, both in short sides of
            the image (offset in halves). flips: (B, 2) of +-1. angle: (B,) radians.

    Returns:
        (B, 2, 3) float32, where `side` is.
    """
    height, width = images.shape[2:]
    short, (_, across, down) = min(height, width), _shrink(images, size, augment)
    cos, sin = angle.cos(), angle.sin()
    (scale_x, scale_y), (offset_x, offset_y) = (side[:, None] * flips).unbind(1), offset.unbind(1)
    # From the square's [-1, 1] to pixels from the image's centre, then to the sampled array's [-1, 1].
    x = torch.stack([cos * scale_x, -sin * scale_y, offset_x + (width - across) / short], 1) * (short / across)
    y = torch.stack([sin * scale_x, cos * scale_y, offset_y + (height - down) / short], 1) * (short / down)
    return torch.stack([x, y], 1)


def _warp(images: torch.Tensor, affine: torch.Tensor, size: int, augment: Augment) -> torch.Tensor:
    """Cut squares out of images: (B, 3, H, W) uint8 and (B, 2, 3) of `_affine` to (B, 3, S, S) float32 in 0..255, black outside."""
    height, width = images.shape[2:]
    short, (shrink, across, down) = min(height, width), _shrink(images, size, augment)
    pixels = images.float()
    if shrink > 1:
        pixels = F.avg_pool2d(pixels, shrink, ceil_mode=True, count_include_pad=False)
    grid = F.affine_grid(affine, [len(images), 3, size, size], align_corners=False)  # (B, S, S, 2)
    views = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if augment.fill == "black":  # beyond the central square there is nothing, as if cropped before the rotation
        from_centre_x = ((grid[..., 0] + 1) * across - width) / short  # in halves of the square's side
        from_centre_y = ((grid[..., 1] + 1) * down - height) / short
        views = views * (torch.maximum(from_centre_x.abs(), from_centre_y.abs()) <= 1 + 1e-6)[:, None]
    return views.contiguous(memory_format=torch.channels_last)


def _colour_matrix(brightness: torch.Tensor, contrast: torch.Tensor, saturation: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation, factors (B,), as one matrix (B, 3, 3)."""
    luma = _constant(LUMA, brightness.device)
    identity = torch.eye(3, device=brightness.device)
    matrix = saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * luma  # (B, 3, 3)
    return matrix * (brightness * contrast)[:, None, None]


def _recolour(views: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Apply matrices (B, 3, 3), and add as much of the mean luminance, which contrast leaves as it is, as (B,) says; views in 0..255."""
    mean = (views.mean((2, 3)) * _constant(LUMA, views.device)).sum(1)  # (B,)
    recoloured = torch.einsum("bij,bjhw->bihw", matrix, views) + (shift * mean)[:, None, None, None]
    return recoloured.clamp(0, 255).contiguous(memory_format=torch.channels_last)


def _normalise(views: torch.Tensor, augment: Augment) -> torch.Tensor:
    mean, std = (_constant(values, views.device)[:, None, None] for values in augment.normalization)
    return (views / 255 - mean) / std


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A tensor that is made once for each device: each making would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
