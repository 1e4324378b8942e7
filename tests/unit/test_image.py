"""A stored image has the stored size and shows what the original showed, whatever its mode."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.image import decode_into, encode, fit, open_rgb


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colour_images_keep_their_colours(kind):
    image = open_rgb(saved(gradient(), kind, **({} if kind == "PNG" else {"quality": 98})), "x")
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - np.asarray(gradient())
    assert abs(difference).mean() < 3


def test_greyscale_becomes_three_equal_channels():
    image = np.asarray(open_rgb(saved(gradient().convert("L"), "PNG"), "x"))
    assert (image[..., 0] == image[..., 1]).all()
    assert (image[..., 0] == image[..., 2]).all()


def test_sixteen_bit_greyscale_keeps_its_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = np.asarray(open_rgb(saved(Image.fromarray(ramp), "PNG"), "x"))
    assert image.min() == 0
    assert image.max() == 255
    assert 120 < image.mean() < 135


def test_dim_sixteen_bit_greyscale_stays_dim():
    dim = np.full((8, 8), 200, dtype=np.uint16)
    assert np.asarray(open_rgb(saved(Image.fromarray(dim), "PNG"), "x")).max() == 1


def test_transparency_is_laid_on_black():
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert np.asarray(open_rgb(saved(clear, "PNG"), "x")).max() == 0


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    assert open_rgb(saved(gradient(60, 40), "JPEG", exif=exif.tobytes()), "x").size == (40, 60)


@pytest.mark.parametrize("data", [b"", b"no image", saved(gradient(), "JPEG")[:-200], saved(gradient(), "PNG")[:100]])
def test_what_cannot_be_read_whole_is_an_error_that_names_it(data):
    with pytest.raises(ValueError, match=r"Cannot decode the image lesion7\.jpg"):
        open_rgb(data, "lesion7.jpg")


def test_fits_do_what_they_are_called():
    wide = gradient(600, 450)
    assert fit(wide, (341, 256), "cover").size == fit(wide, (341, 256), "contain").size == (341, 256)
    white = Image.new("RGB", (100, 50), (255, 255, 255))
    assert np.asarray(fit(white, (50, 50), "cover")).min() == 255  # nothing added
    assert np.asarray(fit(white, (50, 50), "squeeze")).min() == 255
    padded = np.asarray(fit(white, (50, 50), "contain"))
    assert padded[0].max() == 0
    assert padded[25].min() == 255


def test_every_size_covers_every_other_one():
    """Where the aspect ratios are equal, rounding put the edge of the crop at -1e-14, which Pillow refuses."""
    image = gradient(200, 150)
    for width in range(8, 140):
        for size in ((width, round(0.75 * width)), (48, 36), (width, 36)):
            for original in (image.crop((0, 0, width, max(1, round(0.75 * width)))), image.crop((0, 0, width, 69))):
                assert fit(original, size, "cover").size == size


@pytest.mark.parametrize(("found", "stored"), [((168, 158), (40, 42)), ((127, 58), (74, 23)), ((185, 14), (35, 34))])
def test_cover_fits_sizes_whose_crop_rounds_to_a_little_below_0(found, stored):
    assert fit(gradient(*found), stored, "cover").size == stored


def test_squeeze_equals_the_plain_resize_and_cover_crops_the_centre():
    image = gradient(200, 100)
    squeezed = np.asarray(fit(image, (50, 50), "squeeze")).astype(int)
    assert abs(squeezed - np.asarray(image.resize((50, 50), Image.Resampling.BICUBIC))).max() <= 4
    covered = np.asarray(fit(image, (50, 50), "cover")).astype(int)
    centre = image.crop((50, 0, 150, 100)).resize((50, 50), Image.Resampling.BICUBIC)
    assert abs(covered - np.asarray(centre)).max() <= 4


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="cover, contain, squeeze"):
        fit(gradient(), (8, 8), "stretch")


def test_decoding_gives_back_what_was_encoded():
    out = np.empty((40, 60, 3), np.uint8)
    decode_into(encode(gradient(), 95), out)
    assert abs(out.astype(int) - np.asarray(gradient())).mean() < 3


def test_images_that_are_no_jpeg_decode_too():
    out = np.empty((40, 60, 3), np.uint8)
    decode_into(saved(gradient(), "PNG"), out)
    assert (out == np.asarray(gradient())).all()


@pytest.mark.parametrize("size", [(60, 41), (40, 60), (120, 80), (8, 8)])
def test_an_image_of_another_size_is_an_error(size):
    out = np.empty((40, 60, 3), np.uint8)
    with pytest.raises(ValueError):  # noqa: PT011 - the words differ with the decoder
        decode_into(encode(gradient(*size), 90), out)
