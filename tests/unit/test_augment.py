"""Augmentation is one exact affine map whose random numbers depend on seed, epoch and position alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.config import Augment
from harness.config.sections import MEAN, STD
from harness.data.augment import (
    evaluation_views,
    mix,
    parse_views,
    plain_view,
    training_view,
)
from support.images import smooth_images

STILL = Augment(
    crop_side=(1, 1),
    hflip_prob=0,
    vflip_prob=0,
    rotation_degrees=0,
    rotation_prob=0,
    brightness=0,
    contrast=0,
    saturation=0,
)


def colours(view: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: 0..255."""
    return (view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def test_the_plain_view_is_the_central_square():
    images = smooth_images()
    view = colours(plain_view(images, STILL, 48))
    assert view.shape == (4, 3, 48, 48)
    assert (view - images[:, :, :, 8:56]).abs().max() < 0.01


def test_without_variation_the_training_view_is_the_plain_view():
    images = smooth_images()
    still = training_view(images, torch.arange(4), 0, 0, STILL, 32)
    assert torch.equal(still, plain_view(images, STILL, 32))


def test_flips_and_half_turns_are_exact():
    images, square = smooth_images(), Augment(**{**vars(STILL), "fill": "black"})
    flipped = training_view(images, torch.arange(4), 0, 0, Augment(**{**vars(square), "hflip_prob": 1.0}), 48)
    upright = plain_view(images, square, 48)
    assert torch.allclose(flipped, upright.flip(3), atol=1e-3)
    upside = training_view(images, torch.arange(4), 0, 0, Augment(**{**vars(square), "vflip_prob": 1.0}), 48)
    assert torch.allclose(upside, upright.flip(2), atol=1e-3)


def test_shrinking_averages_instead_of_skipping_pixels():
    x = torch.arange(256) % 2 * 255
    stripes = x.expand(1, 3, 256, 256).to(torch.uint8)
    view = colours(plain_view(stripes, STILL, 64))
    assert (view - 127.5).abs().max() < 1  # skipping would give black or white


def test_a_constant_image_stays_constant_inside_at_any_scale():
    grey = torch.full((64, 3, 96, 128), 77, dtype=torch.uint8)
    augment = Augment(**{**vars(Augment()), "brightness": 0, "contrast": 0, "saturation": 0, "crop_side": (0.3, 0.6)})
    view = colours(training_view(grey, torch.arange(64), 0, 0, augment, 32))
    assert (view[:, :, 8:24, 8:24] - 77).abs().max() < 0.01


def test_corners_show_the_image_or_black_as_asked():
    white = torch.full((32, 3, 48, 96), 255, dtype=torch.uint8)
    turning = {**vars(STILL), "rotation_degrees": 45.0, "rotation_prob": 1.0}
    shown = {}
    for fill in ("image", "black"):
        view = colours(training_view(white, torch.arange(32), 0, 0, Augment(**turning | {"fill": fill}), 48))
        shown[fill] = float((view < 128).float().mean())
    assert 0 < shown["image"] < shown["black"]


def test_an_image_is_augmented_alike_in_any_share_of_the_batch():
    images, augment = smooth_images(12), Augment()
    whole = training_view(images, torch.arange(12), 5, 1, augment, 32)
    for start, stop in ((0, 4), (4, 7), (7, 12)):
        part = training_view(images[start:stop], torch.arange(start, stop), 5, 1, augment, 32)
        assert torch.allclose(part, whole[start:stop], atol=1e-4)


def test_colour_changes_follow_torchvisions_definitions():
    from torchvision.transforms.v2 import functional

    from harness.data.augment import _colour_matrix, _recolour

    images = smooth_images(3).float() / 2 + 40  # far from the ends: nothing is clamped
    factor = torch.tensor([0.9, 1.0, 1.1])
    ones = torch.ones(3)
    for place, change in enumerate(
        [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    ):
        factors = [factor if place == other else ones for other in range(3)]
        brightness, contrast, _ = factors
        ours = _recolour(images, _colour_matrix(*factors), brightness * (1 - contrast))
        theirs = torch.stack([change(image / 255, float(f)) * 255 for image, f in zip(images, factor, strict=True)])
        assert (ours - theirs).abs().max() < 0.6  # torchvision rounds its grey


@pytest.mark.parametrize(("kind", "number"), [("none", 1), ("flips", 4), ("dihedral8", 8), ("spins:3", 3)])
def test_views_are_as_many_as_named_and_all_differ(kind, number):
    images = smooth_images(2)
    views = list(evaluation_views(kind, images, torch.tensor([5, 9]), 0, STILL, 32))
    assert len(views) == number
    assert all(view.shape == (2, 3, 32, 32) for view in views)
    for place, view in enumerate(views):
        assert all((view - other).abs().max() > 0.05 for other in views[:place])
    if not kind.startswith("spins"):
        assert torch.equal(views[0], plain_view(images, STILL, 32))


def test_the_eight_views_are_the_symmetries_of_the_square():
    image = smooth_images(1)
    views = list(evaluation_views("dihedral8", image, torch.tensor([0]), 0, STILL, 16))
    turned = [torch.rot90(view, 1, (2, 3)) for view in views]
    assert all(any(torch.equal(turn, view) for view in views) for turn in turned)  # closed under turning


def test_spins_depend_on_the_samples_key_alone():
    images, keys = smooth_images(3), torch.tensor([4, 8, 15])
    whole = list(evaluation_views("spins:2", images, keys, 0, STILL, 32))
    alone = list(evaluation_views("spins:2", images[1:2], keys[1:2], 0, STILL, 32))
    for all_of_them, one in zip(whole, alone, strict=True):
        assert torch.allclose(all_of_them[1:2], one, atol=1e-4)


@pytest.mark.parametrize("kind", ["", "all", "spins", "spins:0", "spins:-1", "spins:x", "dihedral4"])
def test_unknown_views_are_refused(kind):
    with pytest.raises(ValueError, match=r"eval\.views"):
        parse_views(kind)


def pairs(n: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """n views, each of one number, and their positions."""
    return torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, size, size).clone(), torch.arange(n)


def test_mixing_is_the_same_on_any_share_of_a_batch():
    views, positions = pairs(24)
    augment = Augment(mixup_prob=0.4, cutmix_prob=0.4)
    whole, shares = mix(views, positions, 3, 7, augment)
    for cut in (slice(0, 8), slice(8, 10), slice(10, 24)):
        part, part_shares = mix(views[cut], positions[cut], 3, 7, augment)
        assert torch.equal(part, whole[cut])
        assert torch.equal(part_shares, shares[cut])
    assert not torch.equal(mix(views, positions, 4, 7, augment)[1], shares)


def test_mixup_blends_by_the_share_and_cutmix_exchanges_as_much_as_it_says():
    views, positions = pairs(400)
    blended, shares = mix(views, positions, 0, 0, Augment(mixup_prob=1.0))
    own = torch.arange(400.0)
    other = own.view(-1, 2).flip(1).flatten()
    assert torch.allclose(blended[:, 0, 0, 0], shares * own + (1 - shares) * other, atol=1e-3)
    assert ((shares < 0.1) | (shares > 0.9)).float().mean() == pytest.approx(0.41, abs=0.08)  # Beta(1/2, 1/2)
    cut, shares = mix(views, positions, 0, 0, Augment(cutmix_prob=1.0))
    mine = (cut == own[:, None, None, None]).float().mean((1, 2, 3))
    assert torch.allclose(mine, shares, atol=1e-6)
    assert set((cut - own[:, None, None, None]).abs().unique().tolist()) == {0.0, 1.0}  # its own or its neighbour's
    assert 0.4 < shares.mean() < 0.75


def test_some_pairs_stay_as_they_are():
    views, positions = pairs(2000, 4)
    mixed, shares = mix(views, positions, 0, 0, Augment(mixup_prob=0.2, cutmix_prob=0.3))
    whole = (mixed == views).all(1).all(1).all(1)
    assert whole[shares == 1].all()
    assert not whole[shares < 0.999].any()
    assert whole.float().mean() == pytest.approx(0.5, abs=0.08)  # and small boxes that miss every pixel


def test_cutout_blanks_a_square_of_its_side_inside_the_image_at_most():
    images = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    augment = Augment(crop_side=(1.0, 1.0), rotation_degrees=0, brightness=0, contrast=0, saturation=0, cutout=0.5)
    views = training_view(images, torch.arange(200), 0, 0, augment, 32)
    blank = (views == 0).all(1).float().mean((1, 2))
    assert blank.max() == pytest.approx(0.25, abs=0.02)
    assert blank.min() > 0.05
    assert torch.equal(views != 0, (views != 0)[:, :1].expand_as(views))


class DeviceOperators(TorchDispatchMode):
    """Counts operators on the device `meta`, which computes nothing: what a GPU would be asked to run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        found = operator(*arguments, **(options or {}))
        tensors = [leaf for leaf in tree_leaves((arguments, options, found)) if isinstance(leaf, torch.Tensor)]
        self.count += not operator.is_view and any(tensor.device.type == "meta" for tensor in tensors)
        return found


def test_what_is_drawn_reaches_the_device_by_one_copy():
    """Few operators run there, however many numbers are drawn; each costs a GPU about 10 us."""
    images, positions = torch.empty(8, 3, 36, 48, dtype=torch.uint8, device="meta"), torch.arange(8)
    augment = Augment(cutout=0.3, mixup_prob=0.4, cutmix_prob=0.4)
    for _ in range(2):  # constants are made once
        with DeviceOperators() as operators:
            views = training_view(images, positions, 0, 0, augment, 32)
        with DeviceOperators() as of_mix:
            mix(views, positions, 0, 0, augment)
    assert operators.count <= 20
    assert of_mix.count <= 20
