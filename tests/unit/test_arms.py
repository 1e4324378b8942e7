"""The arms of a leak study differ in how they split, and in nothing else: one unseen test set, of groups that no arm knows."""

import random

import pandas as pd
import pytest

from shards.arms import ARMS, split_arm
from shards.catalogue import Catalogue
from shards.leaks import check_split

CHANCE = random.Random(1)
GROUPS = [(f"g{number:03d}", "abc"[number % 3], CHANCE.randint(1, 4)) for number in range(150)]
IMAGES = pd.DataFrame(
    [(f"i{group}{n}", "", label, group) for group, label, images in GROUPS for n in range(images)],
    columns=["image_id", "path", "label", "group"],
)
SOURCE = Catalogue(IMAGES, ("a", "b", "c"), "study")
# Groups 0 and 3, 6 and 9, ... of one class are one.
UNITED = Catalogue(
    IMAGES.assign(group=IMAGES["group"].map(lambda name: f"g{int(name[1:]) // 6 * 6 + int(name[1:]) % 3:03d}")),
    ("a", "b", "c"),
    "study",
)


def groups_of(name: str, seed: int = 0) -> dict[str, set[str]]:
    """The united groups of each split of an arm."""
    _, split = split_arm(SOURCE, UNITED, name, seed, 0.2)
    return {part: set(UNITED.images["group"].iloc[rows]) for part, rows in split.rows.items()}


def test_all_arms_and_seeds_have_the_same_test_images():
    tests = {tuple(split_arm(SOURCE, UNITED, name, seed, 0.2)[1].rows["test"]) for name in ARMS for seed in (0, 1)}
    assert len(tests) == 1


@pytest.mark.parametrize("name", ARMS)
def test_nothing_of_the_test_set_is_left_for_an_arm_not_even_under_another_name(name):
    groups = groups_of(name)
    assert groups["test"]
    assert not groups["test"] & (groups["train"] | groups["val"])


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_may_be_packed(name):
    catalogue, split = split_arm(SOURCE, UNITED, name, 0, 0.2)
    check_split(catalogue.images, split)
    assert split.leaks == (name in ("notebook-leaky", "image"))


def test_arms_leak_less_and_less():
    shared = {
        name: len(groups["train"] & groups["val"]) / len(groups["val"]) for name in ARMS if (groups := groups_of(name))
    }
    assert shared["notebook-leaky"] == 1
    assert 0 < shared["lesion"] <= shared["image"]
    assert shared["lesion-united"] == 0


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="one of notebook-leaky, image"):
        split_arm(SOURCE, UNITED, "lesions", 0, 0.2)
