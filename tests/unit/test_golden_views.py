"""Stored JPEGs, decoded and augmented: the pixels that the model sees stay what they were.

The images are four drawn lesions, kept as JPEG so that neither the drawing nor an encoder takes part. A change that means
to move the values runs `python tests/unit/test_golden_views.py` and says so in its commit message.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from harness.config import Augment
from harness.data.augment import evaluation_views, mix, training_view
from shards.image import decode_into
from support.processes import ROOT

GOLDEN = ROOT / "tests" / "golden" / "views.json"
# Normalised units, where a grey level is 0.017. Sines and fused products of another processor move a view's mean by 1e-6.
TOLERANCE = 1e-4
SEED, SIZE = 7, 32
POSITIONS = torch.arange(40, 44)
AUGMENT = Augment(cutout=0.3, mixup_prob=0.5, cutmix_prob=0.5)


def decoded() -> torch.Tensor:
    """(4, 3, 48, 64) uint8."""
    pixels = np.empty((4, 48, 64, 3), np.uint8)
    for path, out in zip(sorted((ROOT / "tests" / "golden" / "lesions").glob("*.jpg")), pixels, strict=True):
        decode_into(path.read_bytes(), out)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def quadrants(views: torch.Tensor) -> list:
    """Means of the four quadrants of each image and channel, so that a flip or a shift shows: (B, 3, 2, 2) as lists."""
    return [[round(value, 5) for value in image] for image in F.adaptive_avg_pool2d(views, 2).flatten(1).tolist()]


def measured() -> dict:
    """What is kept in the golden file."""
    images = decoded()
    found = {"decoded": hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).hexdigest()}
    for epoch in (0, 1):
        views = training_view(images, POSITIONS, epoch, SEED, AUGMENT, SIZE)
        mixed, shares = mix(views, POSITIONS, epoch, SEED, AUGMENT)
        found |= {f"training, epoch {epoch}": quadrants(views), f"mixed, epoch {epoch}": quadrants(mixed)}
        found |= {f"shares, epoch {epoch}": [round(share, 5) for share in shares.tolist()]}
    for kind in ("none", "spins:1"):
        found[kind] = quadrants(next(evaluation_views(kind, images, POSITIONS, SEED, AUGMENT, SIZE)))
    return found


def test_the_decoder_gives_the_same_bytes():
    # libjpeg-turbo's accurate integer DCT and merged upsampling are bit-exact on all its processors: its own tests compare MD5s.
    assert measured()["decoded"] == json.loads(GOLDEN.read_text(encoding="utf-8"))["decoded"]


def test_the_views_of_fixed_images_are_what_they_were():
    golden, found = json.loads(GOLDEN.read_text(encoding="utf-8")), measured()
    assert found.keys() == golden.keys()
    for name in found.keys() - {"decoded"}:
        assert np.array(found[name]) == pytest.approx(np.array(golden[name]), abs=TOLERANCE), name


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in measured().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
