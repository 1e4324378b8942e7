"""The graph of an export: Pillow's resize, the central square, and what is known of a file before it is written."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from harness.config import Augment
from harness.data.augment import plain_view
from harness.export.card import _license
from harness.export.graph import Preprocessing, central_square
from harness.export.resize import fit_levels
from harness.export.scoring import compare, spread
from shards.image import FITS, fit

SIDES = st.integers(1, 160)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """The worst case for a resize: each pixel by itself."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def resized(pixels: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    levels = torch.tensor(pixels).permute(2, 0, 1)[None].double()
    return fit_levels(levels, size, how)[0].permute(1, 2, 0).numpy()


@pytest.fixture
def without_gap(monkeypatch):
    """Pillow's resize alone, without the blocks that it averages first where it shrinks by 4 or more."""
    whole = Image.Image.resize

    def resize(self, size, resample=None, box=None, reducing_gap=None):
        return whole(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", resize)


@pytest.mark.skipif(
    int(features.version("pil").split(".")[0]) < 13, reason="before 13, Pillow always resizes rows first"
)
@pytest.mark.usefixtures("without_gap")
@pytest.mark.parametrize("how", FITS)
def test_the_resize_is_pillows_to_the_bit_for_any_sizes(how):
    @settings(max_examples=150)
    @given(SIDES, SIDES, st.integers(8, 80), st.integers(8, 80))
    @example(600, 450, 341, 256)
    @example(450, 600, 341, 256)  # tall: columns first
    @example(168, 158, 40, 42)
    @example(1, 160, 60, 8)  # so thin that `contain` leaves nothing of it
    @example(8, 8, 80, 80)
    @example(13, 4, 65, 13)  # in single precision two levels apart
    def check(width, height, stored_width, stored_height):
        pixels, size = noise(width, height), (stored_width, stored_height)
        expected = np.asarray(fit(Image.fromarray(pixels), size, how))
        assert np.array_equal(resized(pixels, size, how), expected)

    check()


@pytest.mark.parametrize("how", FITS)
def test_an_image_of_the_stored_size_stays_as_it_is(how):
    pixels = noise(48, 36)
    assert np.array_equal(resized(pixels, (48, 36), how), pixels)


def test_a_smooth_image_that_shrinks_much_is_near_what_packing_stores():
    """With `reducing_gap`, as packing does: blocks are averaged first, which the graph does not."""
    small = Image.fromarray(noise(12, 9)).resize((2400, 1800), Image.Resampling.BICUBIC)
    expected = np.asarray(fit(small, (48, 36), "cover"), dtype=float)
    assert np.abs(resized(np.asarray(small), (48, 36), "cover") - expected).max() <= 4


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="cover, contain, squeeze"):
        resized(noise(8, 8), (8, 8), "stretch")


@pytest.mark.parametrize("fill", ["image", "black"])
@pytest.mark.parametrize(
    ("stored", "size"), [((48, 36), 32), ((48, 36), 64), ((36, 48), 15), ((37, 37), 16), ((96, 64), 16)]
)
def test_the_view_of_stored_images_is_the_loaders_plain_view(stored, size, fill):
    augment = Augment(crop_side=(1.0, 1.0), fill=fill, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    images = torch.from_numpy(np.stack([noise(*stored, seed) for seed in range(3)]))
    found = Preprocessing(stored, "cover", augment, size)(images)
    assert torch.allclose(found, plain_view(images.permute(0, 3, 1, 2), augment, size), atol=1e-5)


def test_the_weights_of_the_central_square_have_its_shape():
    across, down = central_square((48, 36), Augment(), 32)
    assert (across.shape, down.shape) == ((32, 48), (32, 36))
    assert across[:, :6].abs().sum() == 0  # beside the square of 36


def test_a_sample_is_spread_over_the_split_and_names_no_image_twice():
    assert spread(10, 100).tolist() == list(range(10))
    places = spread(1000, 100)
    assert (len(set(places.tolist())), places[0], places[-1]) == (100, 0, 999)


def test_probabilities_that_are_not_finite_are_infinitely_far():
    wanted = np.full((2, 2), 0.5)
    assert compare(np.array([[np.nan, 1], [0.5, 0.5]]), wanted).difference == np.inf
    assert compare(np.array([[0.75, 0.25], [0.25, 0.75]]), np.array([[0.7, 0.3], [0.6, 0.4]])).same_class == 0.5


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("", {}),
        ("ask the clinic", {"license": "other", "license_name": "ask the clinic"}),
        ("CC BY", {"license": "other", "license_name": "CC BY"}),
    ],
)
def test_a_licence_is_the_hubs_where_the_hub_knows_it(text, entry):
    assert yaml.safe_load(yaml.safe_dump(_license(text))) == entry
