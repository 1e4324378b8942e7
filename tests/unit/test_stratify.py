"""Groups with images of several classes stay whole, and the shares of the classes are as near as that allows."""

import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards import cli
from shards.index import load, load_table
from shards.split import choose_protocol, split_by_fold, split_by_lesion
from shards.stratify import connect, deviation_bound, deviations, has_mixed_groups, share_out

FRACTIONS = st.sampled_from([(0.7, 0.15, 0.15), (0.85, 0.15), (0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.2,) * 5])


@st.composite
def tables(draw, least: int = 1):
    """Images of up to 40 groups, each with up to 8 images of up to 4 classes."""
    groups = draw(st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), min_size=least, max_size=40))
    rows = [(f"g{number}", label) for number, labels in enumerate(groups) for label in labels]
    table = pd.DataFrame(rows, columns=["group", "label"])
    return table.assign(image_id=[f"i{row}" for row in range(len(table))])


@given(tables(), st.integers(0, 5), FRACTIONS)
def test_deviations_keep_below_the_bound_of_a_random_choice(images, seed, fractions):
    part_of = share_out(images, seed, fractions)
    assert set(part_of) == set(images["group"])
    found = deviations(images, part_of, fractions)
    assert np.square(found).sum() <= deviation_bound(images, fractions) + 1e-9
    assert np.allclose(found.sum(0), 0)


@given(tables(), st.integers(0, 5), st.randoms())
def test_which_part_a_group_is_in_does_not_depend_on_the_order_of_the_rows(images, seed, chance: random.Random):
    order = list(range(len(images)))
    chance.shuffle(order)
    shuffled = images.iloc[order].reset_index(drop=True)
    assert share_out(images, seed, (0.7, 0.3)) == share_out(shuffled, seed, (0.7, 0.3))


def patients(n: int = 60) -> pd.DataFrame:
    """Patients with one to six images of three classes, two of five of one class and one of ten."""
    chance = random.Random(3)
    rows = [(f"p{patient}", chance.choice("aabbc")) for patient in range(n) for _ in range(chance.randint(1, 6))]
    table = pd.DataFrame(rows, columns=["group", "label"])
    return table.assign(image_id=[f"i{row}" for row in range(len(table))])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_split_places_every_image_once_and_keeps_patients_whole(seed):
    images = patients()
    assert has_mixed_groups(images)
    split = split_by_lesion(images, seed)
    assert sorted(np.concatenate(list(split.rows.values()))) == list(range(len(images)))
    assert split.left_out == {}
    names = {name: set(images["group"].iloc[rows]) for name, rows in split.rows.items()}
    assert not names["train"] & names["val"] | names["train"] & names["test"] | names["val"] & names["test"]
    for label, of_label in images.groupby("label"):
        for name, share in zip(("train", "val", "test"), (0.7, 0.15, 0.15), strict=True):
            found = of_label.index.isin(split.rows[name]).mean()
            assert abs(found - share) < 0.04, (label, name, found)
    assert split.notes[0].startswith("groups with several classes stay whole: shares of the classes are within 0.0")


def test_another_seed_gives_another_split_and_the_same_seed_the_same():
    first, again, other = (split_by_lesion(patients(), seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first.rows[name], again.rows[name]) for name in first.rows)
    assert set(first.rows["test"]) != set(other.rows["test"])


def test_folds_share_out_every_patient_once_as_test():
    images, tested = patients(), []
    for fold in range(5):
        split = split_by_fold(images, 0, 5, fold)
        tested += images["group"].iloc[split.rows["test"]].unique().tolist()
        assert set(split.rows) == {"train", "val", "test"}
    assert sorted(tested) == sorted(set(images["group"]))


def test_a_holdout_is_the_same_under_every_seed_and_no_patient_of_it_is_elsewhere():
    images, held = patients(), []
    for seed in (0, 1):
        split = choose_protocol("lesion", seed, holdout=0.2)(images)
        held.append(set(images["group"].iloc[split.rows["test"]]))
        rest = set(images["group"].iloc[np.concatenate([split.rows["train"], split.rows["val"]])])
        assert not held[-1] & rest
    assert held[0] == held[1]


def test_rows_that_share_a_patient_or_a_lesion_are_one_group():
    table = pd.DataFrame({"patient": ["p2", "p2", "p1", "p3", "p4"], "lesion": ["l1", "l2", "l2", "", ""]})
    assert connect(table, ["patient", "lesion"]) == ["p1", "p1", "p1", "p3", "p4"]
    assert connect(table.iloc[::-1], ["patient", "lesion"]) == ["p4", "p3", "p1", "p1", "p1"]


@pytest.mark.parametrize("column", ["patient_id", "patient_id,lesion_id"])
def test_a_table_of_patients_with_several_lesions_packs(tmp_path, capsys, column):
    images, rows = patients(20), []
    for row, image in enumerate(images.to_dict("records")):
        Image.fromarray(np.full((9, 12, 3), row % 250, np.uint8)).save(tmp_path / f"{row}.png")
        rows.append(
            {"file": f"{row}.png", "dx": image["label"], "patient_id": image["group"], "lesion_id": f"l{row // 2}"}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    words = ["--image-column", "file", "--label-column", "dx", "--group-column", column, "--size", "12x9"]
    assert cli.main(["pack", str(tmp_path / "t.csv"), str(tmp_path / "out"), *words]) == 0
    assert "groups with several classes stay whole" in capsys.readouterr().out
    dataset = load(tmp_path / "out")
    assert dataset.group_name == "patient"
    groups = {
        name: {group for shard in dataset.split(name) for group in load_table(dataset, shard)["group"]}
        for name in ("train", "val", "test")
    }
    assert not groups["train"] & (groups["val"] | groups["test"]) | groups["val"] & groups["test"]
