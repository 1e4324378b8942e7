"""The catalogue accepts HAM10000 as people have it and names what is wrong with anything else."""

import shutil

import pandas as pd
import pytest

from shards.ham10000 import HAM10000_CLASSES, read_ham10000


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "copy")


def metadata(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "HAM10000_metadata.csv", dtype=str, keep_default_na=False)


def rewrite(folder, table: pd.DataFrame) -> None:
    table.to_csv(folder / "HAM10000_metadata.csv", index=False)


def test_every_metadata_row_becomes_one_checked_image(source):
    catalogue = read_ham10000(source)
    assert len(catalogue.images) == 84
    assert catalogue.classes == HAM10000_CLASSES
    assert set(catalogue.images["label"]) == set(HAM10000_CLASSES)
    assert catalogue.extra_columns == ["dx_type", "age", "sex", "localization"]


def test_the_demo_is_nobodys_and_ham10000_has_its_citation_and_licence(copy):
    drawn = read_ham10000(copy)
    assert (drawn.group_name, drawn.citation, drawn.license) == ("lesion", "drawn by the demo", "no limits")
    rewrite(copy, metadata(copy).assign(dx_type="histo"))
    real = read_ham10000(copy)
    assert (real.group_name, real.license) == ("lesion", "CC BY-NC 4.0")
    assert "doi:10.1038/sdata.2018.161" in real.citation


def test_images_may_lie_in_one_folder_beside_the_csv_or_twice(copy):
    for path in list((copy / "HAM10000_images_part_2").iterdir()):
        shutil.copy(path, copy)
    shutil.rmtree(copy / "HAM10000_images_part_2")
    shutil.copytree(copy / "HAM10000_images_part_1", copy / "ham10000_images_part_1")  # as in Kaggle's download
    (copy / "HAM10000_metadata.csv").rename(copy / "HAM10000_metadata")  # as in Dataverse's
    assert len(read_ham10000(copy).images) == 84


def drop_column(folder):
    rewrite(folder, metadata(folder).drop(columns="lesion_id"))


def drop_image(folder):
    next((folder / "HAM10000_images_part_1").iterdir()).unlink()


def unknown_label(folder):
    table = metadata(folder)
    table.loc[5, "dx"] = "wart"
    rewrite(folder, table)


def repeated_id(folder):
    table = metadata(folder)
    rewrite(folder, pd.concat([table, table.iloc[:1]]))


def torn_lesion(folder):
    table = metadata(folder)
    table.loc[len(table) - 1, "lesion_id"] = table.loc[0, "lesion_id"]
    rewrite(folder, table)


def blank_lesion(folder):
    table = metadata(folder)
    table.loc[7, "lesion_id"] = " "
    rewrite(folder, table)


def no_metadata(folder):
    (folder / "HAM10000_metadata.csv").unlink()


def no_rows(folder):
    rewrite(folder, metadata(folder).iloc[:0])


def empty_metadata(folder):
    (folder / "HAM10000_metadata.csv").write_text("", encoding="utf-8")


def two_images_of_one_name(folder):
    first, second = sorted((folder / "HAM10000_images_part_1").iterdir())[:2]
    shutil.copy(second, folder / first.name)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop_column, ["lesion_id", "Found: image_id"]),
        (drop_image, ["DEMO_", "no image", "Unpack every part"]),
        (unknown_label, ["DEMO_0000005", "wart", "Known classes: mel"]),
        (repeated_id, ["DEMO_0000000", "repeated"]),
        (torn_lesion, ["DRAWN_0000000", "mel", "vasc"]),
        (blank_lesion, ["blank group", "row(s) 9"]),
        (no_metadata, ["HAM10000_metadata.csv", "shards demo"]),
        (no_rows, ["no images"]),
        (empty_metadata, ["is empty"]),
        (two_images_of_one_name, ["Two different images", "DEMO_"]),
    ],
)
def test_bad_input_is_one_error_that_names_it_and_the_next_step(copy, spoil, words):
    spoil(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_ham10000(copy)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_ham10000(tmp_path / "nowhere")
