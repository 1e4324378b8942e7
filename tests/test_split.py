"""Every split protocol keeps its promise, for any catalogue."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.split import check_split, lesion, seed


@st.composite
def catalogues(draw, least_groups: int = 3):
    """Tables of some classes, each with some groups of some images, in any order of rows."""
    rows = []
    for label in range(draw(st.integers(1, 4))):
        for group in range(draw(st.integers(least_groups, 25))):
            for image in range(draw(st.integers(1, 4))):
                rows.append((f"i{label}-{group}-{image}", f"c{label}", f"g{label}-{group}"))
    table = pd.DataFrame(rows, columns=["image_id", "label", "group"])
    return table.sample(frac=1, random_state=draw(st.integers(0, 9))).reset_index(drop=True)


def check(table, split):
    check_split(table, split)
    placed = np.concatenate([*split.rows.values(), list(split.left_out)]).astype(int)
    assert sorted(placed) == list(range(len(table)))
    assert all(split.left_out.values())


@given(catalogues(), st.integers(0, 5))
def test_lesion_split_is_disjoint_stratified_and_complete(table, number):
    split = lesion(table, number)
    check(table, split)
    for _label, rows in table.groupby("label"):
        n = rows["group"].nunique()
        counts = {name: rows["group"][rows.index.isin(stored)].nunique() for name, stored in split.rows.items()}
        assert sum(counts.values()) == n
        assert counts["val"] == counts["test"] == max(1, int(0.15 * n + 0.5))
    for name in ("val", "test"):
        assert table["group"].iloc[split.rows[name]].is_unique
    train = set(table["group"].iloc[split.rows["train"]])
    assert set(table.index[table["group"].isin(train)]) == set(split.rows["train"])  # train keeps all of its images


@given(catalogues(), st.integers(0, 5))
def test_seed_split_is_the_notebooks_without_its_leak(table, number):
    split = seed(table, number)
    check(table, split)
    assert split.aliases == {"test": "val"}
    assert "doubles" in split.warnings[0]
    for label, rows in table.groupby("label"):
        n = rows["group"].nunique()
        assert (table["label"].iloc[split.rows["train"]] == label).sum() == int(0.8 * n)
        assert (table["label"].iloc[split.rows["val"]] == label).sum() == n - int(0.8 * n)
    stored = table.iloc[np.concatenate(list(split.rows.values()))]
    first = table[~table["group"].duplicated()]
    assert set(stored["image_id"]) == set(first["image_id"])


@given(catalogues(), st.randoms())
def test_lesion_split_of_groups_does_not_depend_on_the_order_of_rows(table, random):
    order = list(range(len(table)))
    random.shuffle(order)
    shuffled = table.iloc[order].reset_index(drop=True)
    for name, rows in lesion(table).rows.items():
        assert set(table["group"].iloc[rows]) == set(shuffled["group"].iloc[lesion(shuffled).rows[name]])


def test_another_seed_is_another_split():
    table = pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(60)], "label": "a", "group": [f"g{n}" for n in range(60)]}
    )
    assert set(lesion(table, 0).rows["val"]) != set(lesion(table, 1).rows["val"])


def test_a_class_with_fewer_groups_than_splits_is_refused():
    table = pd.DataFrame({"image_id": ["a", "b", "c"], "label": ["x"] * 3, "group": ["g", "g", "h"]})
    with pytest.raises(ValueError, match="Class x has 2 group"):
        lesion(table)


def test_fractions_must_be_shares_of_one():
    table = pd.DataFrame({"image_id": ["a"], "label": ["x"], "group": ["g"]})
    with pytest.raises(ValueError, match="fractions"):
        lesion(table, fractions=(0.7, 0.2, 0.2))


def test_a_group_in_two_splits_is_refused():
    table = pd.DataFrame({"image_id": ["a", "b"], "label": ["x"] * 2, "group": ["g", "g"]})
    leaking = seed(pd.DataFrame({"image_id": list("abc"), "label": ["x"] * 3, "group": list("ghi")}))
    object.__setattr__(leaking, "rows", {"train": np.array([0]), "val": np.array([1])})
    with pytest.raises(ValueError, match="Group g is in train and in val"):
        check_split(table, leaking)
