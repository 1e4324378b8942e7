"""Copies are planted as they are named, and what is found of them is counted."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from launch.bench.changes import KINDS, make_copy
from launch.bench.planted import choose, count, plant
from shards.audit.collection import Collection

SIZE = (120, 90)


def texture(seed: int) -> bytes:
    """A JPEG with many places that are like no other."""
    noise = np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    held = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)).save(held, "JPEG", quality=95)
    return held.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)


def collection(groups: list[str]) -> Collection:
    """An image a group's name, in order."""
    n = len(groups)
    names = [f"image {row}" for row in range(n)]
    table = pd.DataFrame({"data": "here", "split": "", "image_id": names, "group": groups, "label": "a"})
    return Collection(table, texture, [str(row) for row in range(n)], {})


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_again_and_only_its_seed_and_id_decide_what_is_random(kind):
    data = texture(0)
    copy = make_copy(data, kind, "a", 0)
    assert copy == make_copy(data, kind, "a", 0)
    assert (copy == data) == (kind == "same bytes")
    is_random = kind in ("crop area", "crop sides", "shift", "recolour", "turn", "all", "all mirrored")
    assert (make_copy(data, kind, "a", 1) != copy) == is_random
    assert (make_copy(data, kind, "b", 0) != copy) == is_random


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("JPEG 50", lambda image: image),
        ("JPEG 20", lambda image: image),
        ("flip horizontal", lambda image: image[:, ::-1]),
        ("flip vertical", lambda image: image[::-1]),
        ("turn 90", np.rot90),
        ("transpose", np.transpose),
    ],
)
def test_a_copy_shows_what_its_kind_says(kind, expected):
    grey, others = (pixels(texture(seed)).mean(2) for seed in (0, 1))
    copy = pixels(make_copy(texture(0), kind, "a", 0)).mean(2)
    assert copy.shape == expected(grey).shape
    assert np.corrcoef(copy.ravel(), expected(grey).ravel())[0, 1] > 0.8
    assert np.corrcoef(copy.ravel(), expected(others).ravel())[0, 1] < 0.2


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("half", (60, 45)),
        ("third", (40, 30)),
        ("crop area", (113, 85)),
        ("crop sides", SIZE),
        ("shift", SIZE),
        ("turn", SIZE),
    ],
)
def test_a_copy_is_as_large_as_its_kind_says(kind, size):
    assert Image.open(io.BytesIO(make_copy(texture(0), kind, "a", 0))).size == size


def test_what_a_shift_leaves_empty_is_black_and_the_rest_is_the_original():
    white = io.BytesIO()
    Image.new("RGB", (100, 80), "white").save(white, "PNG")
    shares = [(pixels(make_copy(white.getvalue(), "shift", str(name), 0)) < 128).mean() for name in range(20)]
    assert np.mean(shares) > 0
    assert max(shares) <= 1 - 0.9 * 0.9 + 0.02  # edges of a JPEG are soft


def test_copies_stand_behind_the_images_in_groups_of_their_own():
    own = collection([f"group {row}" for row in range(5)])
    planted = plant(own, 2, "JPEG 20", 0)
    assert len(planted.table) == len(planted.versions) == 7
    assert len(set(planted.group_keys)) == len(set(planted.names)) == len(set(planted.versions)) == 7
    assert [planted.read(row) for row in range(5)] == [own.read(row) for row in range(5)]
    assert planted.read(6) == make_copy(own.read(1), "JPEG 20", "image 1", 0)


def test_one_image_of_each_group_is_chosen_by_the_seed():
    source = collection([f"group {row // 3}" for row in range(30)])
    chosen = choose(source, 4, 5, 0)
    assert len(set(chosen.group_keys)) == 9
    assert [chosen.read(row) for row in range(9)] == [
        source.read(int(name.split()[-1])) for name in chosen.table["image_id"]
    ]
    assert chosen.names == choose(source, 4, 5, 0).names != choose(source, 4, 5, 1).names
    with pytest.raises(ValueError, match="there are 10"):
        choose(source, 6, 5, 0)


def test_copies_and_pairs_that_nobody_planted_are_counted():
    # 10 images, then copies of the first four; the copy of row 3 is nowhere.
    ranked = [(0, 10), (4, 5), (1, 11), (6, 12), (7, 8), (2, 12)]
    numbers = count(ranked, ranked[:5], n_own=10, n=14)
    assert numbers["found"] == 2 / 4
    assert numbers["listed"] == 3 / 4
    assert numbers["above_weakest"] == 1  # (4, 5) before (1, 11)
    assert numbers["unplanted_per_1000"] == pytest.approx(1000 * 3 / 14)


def test_the_rank_without_the_weakest_leaves_out_one_copy_of_twenty():
    planted = [(row, row + 100) for row in range(20)]
    ranked = [*planted[:19], *[(row, row + 1) for row in range(0, 14, 2)], planted[19]]
    numbers = count(ranked, ranked, n_own=100, n=120)
    assert numbers["above_weakest"] == 7
    assert numbers["above_weakest_5_percent"] == 0


def test_without_copies_only_the_images_own_pairs_are_counted():
    assert count([(0, 1)], [(0, 1)], n_own=10, n=10) == {"unplanted_per_1000": 100.0}


def test_nothing_found_has_no_rank():
    numbers = count([], [], n_own=10, n=14)
    assert numbers["found"] == numbers["above_weakest"] == numbers["unplanted_per_1000"] == 0
