"""What a file says beside its pixels, or lacks: profiles, end markers, chunks, depths. Nothing turns grey, nothing is lost for a trifle."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards import image as whole
from shards.colour import CONVERTED, IGNORED
from shards.image import open_noted, open_rgb

RNG = np.random.default_rng(2)
PICTURE = Image.fromarray(RNG.integers(0, 255, (64, 48, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1))
D50_COLOURS = {  # of each primary, adapted to D50: sRGB's (IEC 61966-2-1) and Display P3's (Apple's profile)
    "sRGB": ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)),
    "P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def profile_of(primaries: str) -> bytes:
    """sRGB's profile with other primaries: the tone curve stays."""
    data = bytearray(SRGB)
    (n,) = struct.unpack(">I", data[128:132])
    for tag in range(n):
        name, offset, _ = struct.unpack(">4sII", data[132 + 12 * tag : 144 + 12 * tag])
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            numbers = D50_COLOURS[primaries]["rgb".index(name[:1].decode())]
            data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(65536 * number) for number in numbers))
    return bytes(data)


def in_srgb(colours: np.ndarray) -> np.ndarray:
    """Display P3 to sRGB by their definitions, clipped: linear light, both matrices, the tone curve."""
    share = colours / 255
    light = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz, from_xyz = np.array(D50_COLOURS["P3"]).T, np.linalg.inv(np.array(D50_COLOURS["sRGB"]).T)
    light = (light @ to_xyz.T @ from_xyz.T).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def test_colours_of_a_phone_are_converted_to_srgb():
    opened, notes = open_noted(saved(PICTURE, "PNG", icc_profile=profile_of("P3")), "x")
    assert notes == [CONVERTED]
    assert np.abs(np.asarray(opened) - in_srgb(np.asarray(PICTURE))).max() < 3
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(PICTURE)).max() > 20


@pytest.mark.parametrize("profile", [SRGB, profile_of("sRGB")])
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_that_are_srgb_keep_their_values(mode, profile):
    picture = PICTURE.convert(mode)
    opened, notes = open_noted(saved(picture, "PNG", icc_profile=profile), "x")
    assert notes == []
    assert np.array_equal(opened, picture.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"none" * 99), ("L", SRGB), ("RGB", SRGB[:300])])
def test_a_profile_that_cannot_be_used_is_ignored_and_noted(kind, mode, profile):
    picture = PICTURE.convert(mode)
    opened, notes = open_noted(saved(picture, kind, icc_profile=profile), "x")
    assert notes == [IGNORED]
    assert np.array_equal(opened, open_rgb(saved(picture, kind), "x"))


def test_a_profile_applies_to_what_is_not_transparent():
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    assert np.asarray(open_rgb(saved(clear, "PNG", icc_profile=profile_of("P3")), "x")).max() == 0


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_was_cut_and_closed_again_is_no_image(mode, progressive):
    """libjpeg fills the rest with grey and only warns; Pillow says nothing."""
    data = saved(PICTURE.convert(mode), "JPEG", progressive=progressive)
    open_rgb(data, "x")
    for kept in (0.4, 0.7, 0.97):
        cut = data[: int(kept * len(data))] + whole.JPEG_END
        with pytest.raises(ValueError, match=r"Cannot decode the image x"):
            open_rgb(cut, "x")
        with pytest.raises(ValueError, match=r"Cannot decode the image x"):
            open_rgb(cut.removesuffix(whole.JPEG_END), "x")


@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_whole(missing):
    data = saved(PICTURE, "JPEG", quality=90)
    opened, notes = open_noted(data[:-missing], "x")
    assert notes == [whole.NO_END]
    assert np.array_equal(opened, open_rgb(data, "x"))


def test_a_progressive_jpeg_without_its_end_marker_may_lack_more_and_is_no_image():
    data = saved(PICTURE, "JPEG", progressive=True)
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    for cut in (data[: scans[-1]], data[:-2]):
        with pytest.raises(ValueError, match=r"Cannot decode the image x"):
            open_rgb(cut, "x")


def test_what_follows_a_jpeg_and_bytes_before_a_marker_are_no_damage():
    data = saved(PICTURE, "JPEG")
    for other in (data + b"\0" * 100, data[:-2] + b"\0" + data[-2:]):
        assert np.array_equal(open_rgb(other, "x"), open_rgb(data, "x"))


def chunk(kind: bytes, content: bytes, wrong: bool = False) -> bytes:
    check = zlib.crc32(kind + content) ^ wrong
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"eXIf", b"MM\0*\0\0", wrong=True),
        chunk(b"iCCP", b"name\0\0not deflated"),
        chunk(b"zTXt", b"note\0\0not deflated"),
        chunk(b"tEXt", b"note\0text", wrong=True),
    ],
    ids=["eXIf", "iCCP", "zTXt", "tEXt"],
)
def test_a_broken_chunk_that_pixels_do_not_need_spoils_no_png(broken):
    data = saved(PICTURE, "PNG")
    header = 8 + 25  # the signature and IHDR
    opened, notes = open_noted(data[:header] + broken + data[header:], "x")
    assert np.array_equal(opened, PICTURE)
    assert len(notes) <= 1
    with pytest.raises(ValueError, match="Cannot decode"):
        open_rgb(data[:header] + broken + data[header:-600], "x")


def test_damaged_exif_is_ignored_and_noted():
    opened, notes = open_noted(saved(PICTURE, "PNG", exif=b"Exif\0\0no header of TIFF"), "x")
    assert notes == [whole.EXIF_IGNORED]
    assert opened.size == PICTURE.size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_every_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[whole.ORIENTATION] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    opened = open_rgb(saved(PICTURE, kind, exif=exif.tobytes(), **options), "x")
    turned = PICTURE if orientation == 1 else PICTURE.transpose(whole.UPRIGHT[orientation])
    assert opened.size == turned.size
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(turned)).mean() < 20  # other turns: 80


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_thirty_two_bits_a_channel_are_refused_since_their_range_is_unknown(dtype):
    data = saved(Image.fromarray(np.arange(64 * 48).reshape(64, 48).astype(dtype)), "TIFF")
    with pytest.raises(ValueError, match="save it with 8 or 16"):
        open_rgb(data, "x")


def test_sixteen_bit_pngs_with_a_transparent_grey_keep_their_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    plain = np.asarray(open_rgb(saved(Image.fromarray(ramp), "PNG"), "x"))
    clear = np.asarray(open_rgb(saved(Image.fromarray(ramp), "PNG", transparency=int(ramp[4, 0])), "x"))
    assert np.ptp(plain) == 255
    assert clear[4, 0].tolist() == [0, 0, 0]  # as all that is transparent
    assert np.array_equal(np.delete(clear.reshape(64, 3), 32, 0), np.delete(plain.reshape(64, 3), 32, 0))


def test_sixteen_bit_tiffs_keep_their_range():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert np.ptp(np.asarray(open_rgb(saved(Image.fromarray(ramp), "TIFF"), "x"))) == 255
