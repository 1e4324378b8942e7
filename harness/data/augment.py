"""Pictures as the model sees them: pure batch functions, on whatever device the batch is.

In: (B, 3, H, W) uint8 and numbers that identify each picture. Out: (B, 3, S, S) float32, normalised. What stays true:
crop, scale, flip and turn are one affine map and one interpolation; every random number is a hash of (seed, stream,
position), so a picture is varied in the same way on any number of devices.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

from harness.config import Augment

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, which torchvision's weights were trained with
STD = (0.229, 0.224, 0.225)
MIXING = 1 << 40  # streams of random numbers for pairs, far from those of epochs
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in torchvision


def training_view(
    images: torch.Tensor, positions: torch.Tensor, epoch: int, seed: int, augment: Augment, size: int
) -> torch.Tensor:
    """One random view of each picture.

    Args:
        images: (B, 3, H, W) uint8. positions: (B,) int64, places in the epoch's stream. size: S in pixels.

    Returns:
        (B, 3, S, S) float32, normalised.
    """
    draws = uniforms(seed, epoch, positions, 12).unbind(1)
    side = _between(draws[0], *augment.crop_side)
    room = 1 - side  # how far the crop's centre may go from the picture's, in half short sides
    offset = torch.stack([_between(draws[1], -1, 1) * room, _between(draws[2], -1, 1) * room], 1)
    flips = torch.stack([_sign(draws[3] < augment.hflip_prob), _sign(draws[4] < augment.vflip_prob)], 1)
    turned = (draws[5] < augment.rotation_prob).float()
    angle = _between(draws[6], -augment.rotation_degrees, augment.rotation_degrees) * turned * (torch.pi / 180)
    views = _warp(images, side, offset, flips, angle, size, augment)
    jitter = [1 + _between(draws[7 + i], -1, 1) * strength for i, strength in enumerate(_jitters(augment))]
    views = _normalise(_recolour(views, *jitter) if any(_jitters(augment)) else views)
    if augment.cutout:  # the mean colour is 0 after normalisation
        half = 0.5 * augment.cutout
        views = views * ~_boxes(torch.stack(draws[10:12], 1), torch.full_like(draws[10], half), size)[:, None]
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
    draws = uniforms(seed, MIXING + epoch, positions[::2], 4).unbind(1)
    size, own = views.shape[-1], views.new_ones((len(views) // 2, 1, *views.shape[2:]))
    blended = draws[0] < augment.mixup_prob
    exchanged = (draws[0] >= augment.mixup_prob) & (draws[0] < augment.mixup_prob + augment.cutmix_prob)
    part = (draws[1] * (torch.pi / 2)).sin().square()  # Beta(1/2, 1/2), by its inverse distribution function
    own = torch.where(blended[:, None, None, None], part[:, None, None, None].to(own), own)
    boxes = _boxes(
        torch.stack(draws[2:4], 1), 0.5 * (1 - draws[1]).sqrt(), size
    )  # area 1 - u, before its edges are cut
    own = torch.where((exchanged[:, None, None] & boxes)[:, None], torch.zeros_like(own), own)
    first, second = views[::2], views[1::2]
    mixed = torch.stack([own * first + (1 - own) * second, own * second + (1 - own) * first], 1).flatten(0, 1)
    return mixed.contiguous(memory_format=torch.channels_last), own.mean((1, 2, 3)).float().repeat_interleave(2)


def _boxes(centres: torch.Tensor, half: torch.Tensor, size: int) -> torch.Tensor:
    """Squares in pictures, cut off at their edges: (n, 2) centres and (n,) half sides, in sides, to (n, S, S) bool."""
    places = (torch.arange(size, device=half.device) + 0.5) / size
    inside = (places - centres[..., None]).abs() < half[:, None, None]  # (n, 2, S)
    return inside[:, 1, :, None] & inside[:, 0, None, :]


def plain_view(images: torch.Tensor, augment: Augment, size: int) -> torch.Tensor:
    """The central square, upright: (B, 3, H, W) uint8 to (B, 3, S, S) float32, normalised."""
    n = len(images)
    upright = images.new_ones((n, 2), dtype=torch.float32)
    nothing = images.new_zeros((n, 2), dtype=torch.float32)
    return _normalise(_warp(images, upright[:, 0], nothing, upright, nothing[:, 0], size, augment))


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
            draws = uniforms(seed, -1 - number, keys, 2).unbind(1)
            ones = torch.ones_like(draws[0])
            flips = torch.stack([_sign(draws[0] < 0.5), ones], 1)
            angle = _between(draws[1], -torch.pi, torch.pi)
            yield _normalise(_warp(images, ones, torch.zeros_like(flips), flips, angle, size, augment))
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


def uniforms(seed: int, stream: int, positions: torch.Tensor, n: int) -> torch.Tensor:
    """Random numbers that depend on their arguments alone: SplitMix64 (Steele, Lea, Flood 2014) as a hash.

    Args:
        positions: (B,) int64. n: numbers for each.

    Returns:
        (B, n) float32 in [0, 1), multiples of 2^-24: the same bits on every device.
    """
    state = _mix(positions + _key(seed, stream))  # (B,)
    draws = _mix(state[:, None] + _GOLDEN * torch.arange(1, n + 1, device=positions.device))
    return _shift(draws, 40).float() * 2.0**-24


@lru_cache
def _key(seed: int, stream: int) -> int:
    """What the numbers of one epoch start from; on the CPU, as making it on a GPU would wait for the GPU."""
    return _mix(_mix(torch.tensor([seed])) + stream).item()


def stream_checksum(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A number for which samples stand at which positions; checksums of parts add up to that of the whole.

    Args:
        keys, positions: (B,) int64.

    Returns:
        scalar float64, a whole number; sums stay exact up to 2^17 samples.
    """
    return _shift(_mix(_mix(positions) + keys), 28).double().sum()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser; int64 arithmetic wraps, as it must."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _between(draw: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * draw


def _sign(mirrored: torch.Tensor) -> torch.Tensor:
    return 1.0 - 2.0 * mirrored.float()


def _jitters(augment: Augment) -> tuple[float, float, float]:
    return augment.brightness, augment.contrast, augment.saturation


def _warp(
    images: torch.Tensor,
    side: torch.Tensor,
    offset: torch.Tensor,
    flips: torch.Tensor,
    angle: torch.Tensor,
    size: int,
    augment: Augment,
) -> torch.Tensor:
    """Cut a turned, mirrored square out of each picture.

    Args:
        images: (B, 3, H, W) uint8. side: (B,) of the square, offset: (B, 2) of its centre, both in short sides of the
            picture (offset in halves). flips: (B, 2) of +-1. angle: (B,) radians.

    Returns:
        (B, 3, S, S) float32 in 0..255, black outside the picture.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    pictures = images.float()
    shrink = int(short * augment.crop_side[0] / size)
    if shrink > 1:  # bilinear interpolation alone would skip pixels: average blocks first, as many as never enlarges
        pictures = F.avg_pool2d(pictures, shrink, ceil_mode=True, count_include_pad=False)
    across, down = pictures.shape[3] * max(1, shrink), pictures.shape[2] * max(1, shrink)  # pixels of the picture
    cos, sin = angle.cos(), angle.sin()
    (scale_x, scale_y), (offset_x, offset_y) = (side[:, None] * flips).unbind(1), offset.unbind(1)
    # From the square's [-1, 1] to pixels from the picture's centre, then to the sampled array's [-1, 1].
    x = torch.stack([cos * scale_x, -sin * scale_y, offset_x + (width - across) / short], 1) * (short / across)
    y = torch.stack([sin * scale_x, cos * scale_y, offset_y + (height - down) / short], 1) * (short / down)
    grid = F.affine_grid(torch.stack([x, y], 1), [len(images), 3, size, size], align_corners=False)  # (B, S, S, 2)
    views = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if augment.fill == "black":  # beyond the central square there is nothing, as if cropped before the turn
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


def _normalise(views: torch.Tensor) -> torch.Tensor:
    mean, std = (_constant(values, views.device)[:, None, None] for values in (MEAN, STD))
    return (views / 255 - mean) / std


@lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A tensor that is made once for each device: each making would wait for the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)
