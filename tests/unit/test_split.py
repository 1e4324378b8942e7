"""Every split protocol keeps its promise, for any catalogue."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.grouping import VAL_IS_TEST
from shards.leaks import check_split
from shards.split import (
    FRACTIONS,
    NOT_A_LESION,
    PROTOCOLS,
    choose_protocol,
    describe_protocols,
    external_test,
    split_by_column,
    split_by_fold,
    split_by_image,
    split_by_lesion,
    split_isic2018,
    split_notebook,
    split_notebook_leaky,
)
from shards.stratify import with_holdout


@st.composite
def catalogues(draw, least_groups: int = 3):
    """Tables of some classes, each with some groups of some images, in any order of rows."""
    rows = []
    for label in range(draw(st.integers(1, 4))):
        for group in range(draw(st.integers(least_groups, 25))):
            for number in range(draw(st.integers(1, 4))):
                rows.append((f"i{label}-{group}-{number}", f"c{label}", f"g{label}-{group}"))
    table = pd.DataFrame(rows, columns=["image_id", "label", "group"])
    return table.sample(frac=1, random_state=draw(st.integers(0, 9))).reset_index(drop=True)


def check(table, split):
    check_split(table, split)
    placed = np.concatenate([*split.rows.values(), list(split.left_out)]).astype(int)
    assert sorted(set(placed) if split.leaks else placed) == list(range(len(table)))
    assert all(split.left_out.values())


@given(catalogues(), st.integers(0, 5))
def test_lesion_split_is_disjoint_stratified_and_complete(table, number):
    split = split_by_lesion(table, number)
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
def test_notebook_split_is_the_notebooks_without_its_leak(table, number):
    split = split_notebook(table, number)
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
    for name, rows in split_by_lesion(table).rows.items():
        assert set(table["group"].iloc[rows]) == set(shuffled["group"].iloc[split_by_lesion(shuffled).rows[name]])


def test_another_seed_is_another_split():
    table = pd.DataFrame(
        {"image_id": [f"i{n}" for n in range(60)], "label": "a", "group": [f"g{n}" for n in range(60)]}
    )
    assert set(split_by_lesion(table, 0).rows["val"]) != set(split_by_lesion(table, 1).rows["val"])


def test_a_class_with_fewer_groups_than_splits_is_refused():
    table = pd.DataFrame({"image_id": ["a", "b", "c"], "label": ["x"] * 3, "group": ["g", "g", "h"]})
    with pytest.raises(ValueError, match="Class x has 2 group"):
        split_by_lesion(table)


def test_fractions_must_be_shares_of_one():
    table = pd.DataFrame({"image_id": ["a"], "label": ["x"], "group": ["g"]})
    with pytest.raises(ValueError, match="fractions"):
        split_by_lesion(table, fractions=(0.7, 0.2, 0.2))


def test_a_group_in_two_splits_is_refused():
    table = pd.DataFrame({"image_id": ["a", "b"], "label": ["x"] * 2, "group": ["g", "g"]})
    leaking = split_notebook(pd.DataFrame({"image_id": list("abc"), "label": ["x"] * 3, "group": list("ghi")}))
    object.__setattr__(leaking, "rows", {"train": np.array([0]), "val": np.array([1])})
    with pytest.raises(ValueError, match="Group g is in train and in val"):
        check_split(table, leaking)


@given(catalogues(), st.integers(0, 5))
def test_image_split_is_stratified_keeps_every_image_and_says_that_it_leaks(table, number):
    split = split_by_image(table, number)
    assert split.leaks
    assert "too high" in split.warnings[0]
    assert not split.left_out
    check(table, split)
    placed = np.concatenate(list(split.rows.values()))
    assert len(placed) == len(table)
    for label, rows in table.groupby("label"):
        counts = {name: (table["label"].iloc[stored] == label).sum() for name, stored in split.rows.items()}
        assert counts["val"] == counts["test"] == max(1, int(0.15 * len(rows) + 0.5))


@given(catalogues(), st.integers(0, 5))
def test_the_leaky_split_is_the_notebooks_mistake(table, number):
    split = split_notebook_leaky(table, number)
    check(table, split)
    assert split.leaks
    assert "training image" in split.warnings[0]
    train, val = (set(split.rows[name]) for name in ("train", "val"))
    for label, rows in table.groupby("label"):
        n = rows["group"].nunique()
        of_class = set(np.flatnonzero(table["label"] == label))
        assert len(train & of_class) == int(0.8 * n)
        assert len(val & of_class) == n - int(0.8 * n)
        if n >= 5:
            assert val & of_class <= train  # the leak
    assert train == set(split_notebook(table, number).rows["train"])  # the honest split differs in validation alone


@given(catalogues(least_groups=5), st.integers(0, 3), st.integers(3, 5))
def test_folds_test_each_group_exactly_once_over_all_of_them(table, number, n):
    tested: list[str] = []
    for fold in range(n):
        split = split_by_fold(table, number, n, fold)
        check(table, split)
        assert split.protocol["fold"] == fold
        tested += list(table["group"].iloc[split.rows["test"]])
    assert sorted(tested) == sorted(table["group"].unique())
    sizes = pd.Series(tested).map(dict(zip(table["group"], table["label"], strict=True))).value_counts()
    assert sizes.to_dict() == table.groupby("label")["group"].nunique().to_dict()


def test_folds_that_cannot_be_are_refused():
    table = pd.DataFrame({"image_id": list("abcd"), "label": ["x"] * 4, "group": list("ghij")})
    for n, fold in ((2, 0), (4, 4), (4, -1)):
        with pytest.raises(ValueError, match="--folds"):
            split_by_fold(table, 0, n, fold)
    for fold in (0, 2):
        with pytest.raises(ValueError, match=f"--fold {fold} is one of several folds: give their number as --folds"):
            choose_protocol("lesion", fold=fold)
    with pytest.raises(ValueError, match="fewer than the 5 folds"):
        split_by_fold(table, 0, 5, 0)


def two_parts(share=FRACTIONS[0] / (FRACTIONS[0] + FRACTIONS[1])):
    return (share, 1 - share)


@given(catalogues(least_groups=4), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_protocols_with_the_same_holdout_are_tested_on_the_same_unseen_images(table, number, fraction):
    protocols = [
        lambda images: split_by_lesion(images, number, two_parts()),
        lambda images: split_by_image(images, number + 1, two_parts()),
        lambda images: split_notebook(images, number),
        lambda images: split_notebook_leaky(images, number),
    ]
    tests = []
    for protocol in protocols:
        split = with_holdout(table, fraction, protocol)
        check(table, split)
        assert split.protocol["holdout"] == fraction
        assert "test" not in split.aliases
        assert VAL_IS_TEST not in split.warnings
        tests.append(split.rows["test"].tolist())
        seen = np.concatenate([split.rows["train"], split.rows["val"]])
        assert not set(table["group"].iloc[seen]) & set(table["group"].iloc[split.rows["test"]])
    assert tests.count(tests[0]) == len(tests)
    assert table["group"].iloc[tests[0]].is_unique


@given(catalogues(), st.integers(0, 3))
def test_isic2018_tests_on_the_challenges_images_and_on_nothing_else(table, number):
    classes = table["label"].unique()
    challenge = pd.DataFrame(
        {"image_id": [f"t{n}" for n in range(9)] + [NOT_A_LESION], "label": [*classes, *["c0"] * 10][:10]}
    )
    table = pd.concat(
        [table.assign(part="train"), challenge.assign(group=challenge["image_id"], part="test")], ignore_index=True
    )
    split = split_isic2018(table, number)
    check(table, split)
    assert sorted(table["image_id"].iloc[split.rows["test"]]) == [f"t{n}" for n in range(9)]
    assert "easter egg" in split.left_out[int(np.flatnonzero(table["image_id"] == NOT_A_LESION)[0])]
    assert (table["part"].iloc[np.concatenate([split.rows["train"], split.rows["val"]])] == "train").all()


def said(words) -> pd.DataFrame:
    n = len(words)
    return pd.DataFrame(
        {"image_id": [f"i{k}" for k in range(n)], "label": "x", "group": [f"g{k}" for k in range(n)], "part": words}
    )


def test_a_column_that_says_train_val_or_test_is_followed():
    table = said(["train", "Validation", "test", "training", "val"])
    split = split_by_column(table, "part")
    assert {name: sorted(rows) for name, rows in split.rows.items()} == {"train": [0, 3], "val": [1, 4], "test": [2]}
    without = split_by_column(said(["train", "val", "val"]), "part")
    assert without.aliases == {"test": "val"}
    assert without.warnings == (VAL_IS_TEST,)


@given(catalogues())
def test_an_outside_set_is_all_test(table):
    split = external_test(table)
    check(table, split)
    assert list(split.rows) == ["test"]


def test_a_column_that_says_something_else_is_refused():
    with pytest.raises(ValueError, match=r"must say train, val or test.*'holiday'"):
        split_by_column(said(["train", "holiday"]), "part")
    with pytest.raises(ValueError, match="no val rows"):
        split_by_column(said(["train", "test"]), "part")
    with pytest.raises(ValueError, match="no column 'fold'"):
        split_by_column(said(["train"]), "fold")


def test_a_column_that_puts_one_group_in_two_splits_is_refused():
    table = said(["train", "val"]).assign(group="g")
    with pytest.raises(ValueError, match=r"Group g is in train and in val.*--protocol lesion"):
        check_split(table, split_by_column(table, "part"))


def test_test_classes_unknown_to_train_are_refused():
    table = said(["train", "val", "test"])
    table.loc[2, "label"] = "rare"
    with pytest.raises(ValueError, match=r"test split has classes that train lacks: rare"):
        check_split(table, split_by_column(table, "part"))


def test_a_holdout_that_is_no_share_is_refused():
    for fraction in (-0.1, 1.0):
        with pytest.raises(ValueError, match="--holdout"):
            with_holdout(said(["train"] * 4), fraction, split_notebook)


def test_every_protocol_is_described_and_can_be_chosen_by_its_name():
    table = said(["train", "val", "test", "train", "val"] * 4)
    for name in PROTOCOLS:
        assert f"  {name} " in describe_protocols()
        split = choose_protocol(name.replace("NAME", "part"))(table)
        assert split.protocol["name"] == name.replace("NAME", "part")
        assert split.leaks == PROTOCOLS[name].is_study
        assert ("test" in split.rows) or split.aliases == {"test": "val"}


@pytest.mark.parametrize(("old", "new"), [("seed", "notebook"), ("seed-leaky", "notebook-leaky")])
def test_a_renamed_protocol_is_refused_by_its_new_name(old, new):
    with pytest.raises(ValueError, match=f"^The '--protocol' {old} is now called {new}\\.$"):
        choose_protocol(old)
