"""Other sources than HAM10000: the ISIC 2018 test images, class folders, CSV and Parquet."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shards import cli
from shards.catalogue import NO_GROUPS
from shards.ham10000 import read_ham10000, read_isic2018
from shards.index import load, load_table, verify
from shards.leaks import check_split
from shards.public_data import Columns
from shards.sources import read_class_folders, read_table
from shards.split import split_isic2018

RNG = np.random.default_rng(0)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (60, 45)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    noise.convert(mode).save(path)
    return path


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes in folders: images of any kind, mode and size."""
    kinds = [
        ("a.jpg", "RGB", (60, 45)),
        ("b.png", "RGBA", (33, 80)),
        ("c.png", "L", (10, 10)),
        ("d.webp", "RGB", (200, 9)),
    ]
    kinds += [
        ("e.jpg", "L", (64, 64)),
        ("f.png", "P", (50, 40)),
        ("g.png", "LA", (40, 50)),
        ("h.jpeg", "CMYK", (45, 60)),
    ]
    for label in ("benign", "malignant"):
        for name, mode, size in kinds:
            save(tmp_path / "tree" / label / name, mode, size)
    return tmp_path / "tree"


@pytest.fixture
def table(tmp_path) -> Path:
    """A CSV of 24 images of 12 patients, some paths without their ending."""
    rows = []
    for number in range(24):
        path = save(tmp_path / "csv" / "images" / f"p{number}.jpg")
        name = str(path.relative_to(tmp_path / "csv"))
        name = name.removesuffix(".jpg") if number % 2 else name
        rows.append(
            {"file": name, "diagnosis": "mn"[number // 2 % 2], "patient": f"P{number // 2}", "camera": number % 3}
        )
    pd.DataFrame(rows).to_csv(tmp_path / "csv" / "table.csv", index=False)
    return tmp_path / "csv" / "table.csv"


COLUMNS = ["--image-column", "file", "--label-column", "diagnosis", "--group-column", "patient"]


def test_class_folders_pack_whatever_the_kind_of_image(tree, tmp_path, capsys):
    assert cli.main(["pack", str(tree), str(tmp_path / "out"), "--size", "32x24"]) == 0
    dataset = load(tmp_path / "out")
    assert dataset.classes == ("benign", "malignant")
    assert sum(shard.samples for shard in dataset.shards) == 16
    assert NO_GROUPS in dataset.description.warnings
    assert NO_GROUPS in capsys.readouterr().out
    assert read_class_folders(tree).images["image_id"].is_unique


def test_a_csv_keeps_groups_together_and_carries_its_other_columns(table, tmp_path):
    assert cli.main(["pack", str(table), str(tmp_path / "out"), "--size", "32x24", *COLUMNS]) == 0
    dataset = load(tmp_path / "out")
    rows = pd.concat(load_table(dataset, shard) for shard in dataset.shards)
    assert set(rows.columns) == {"key", "offset", "size", "label", "group", "image_id", "camera"}
    assert dataset.classes == ("m", "n")
    assert (dataset.group_name, dataset.groups_name) == ("patient", "patients")
    assert dataset.description.warnings == []
    train = set(pd.concat(load_table(dataset, shard) for shard in dataset.split("train"))["group"])
    assert not train & set(pd.concat(load_table(dataset, shard) for shard in dataset.split("val"))["group"])


@pytest.mark.parametrize(
    ("column", "name"),
    [("patient", "patient"), ("Patient_ID", "patient"), ("id", "group"), ("imaging day", "imaging day")],
)
def test_a_csvs_group_column_says_what_a_group_is(table, column, name):
    pd.read_csv(table).rename(columns={"patient": column}).to_csv(table, index=False)
    assert read_table(table, Columns("file", ("diagnosis",), (column,))).group_name == name
    assert read_table(table, Columns("file", ("diagnosis",))).group_name == "group"


def test_citation_and_license_of_a_source_are_kept_and_shown(tree, tmp_path, capsys):
    words = ["--size", "32x24", "--citation", "Müller (2024)", "--license", "CC0"]
    assert cli.main(["pack", str(tree), str(tmp_path / "out"), *words]) == 0
    about = load(tmp_path / "out").description
    assert (about.format, about.citation, about.license, about.group_name) == (2, "Müller (2024)", "CC0", "group")
    assert "citation: Müller (2024)\nlicense: CC0" in capsys.readouterr().out


def test_parquet_is_read_as_csv_is(table, tmp_path):
    pytest.importorskip("pyarrow")
    pd.read_csv(table).to_parquet(table.with_suffix(".parquet"))
    columns = Columns("file", ("diagnosis",), ("patient",))
    pd.testing.assert_frame_equal(
        read_table(table.with_suffix(".parquet"), columns).images.astype(str),
        read_table(table, columns).images.astype(str),
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.assign(file=t["file"] + "x"), ["no such image", "--image-root"]),
        (lambda t: t.assign(patient=["", *t["patient"][1:]]), ["blank group", "row(s) 2"]),
        (lambda t: t.assign(diagnosis=["", *t["diagnosis"][1:]]), ["blank label"]),
        (lambda t: t.drop(columns="patient"), ["no column 'patient' (--group-column)", "camera"]),
        (lambda t: pd.concat([t, t[:1]]), ["repeated"]),
    ],
)
def test_a_bad_csv_is_one_error_and_nothing_is_written(table, tmp_path, capsys, spoil, words):
    spoil(pd.read_csv(table)).to_csv(table, index=False)
    assert cli.main(["pack", str(table), str(tmp_path / "out"), *COLUMNS]) == 1
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not list(tmp_path.glob("out*"))


def test_one_image_under_two_names_is_refused(table, tmp_path, capsys):
    rows = pd.read_csv(table)
    again = rows[:1].assign(file=f"../csv/{rows['file'][0]}", patient="P99")
    pd.concat([rows, again]).to_csv(table, index=False)
    assert cli.main(["pack", str(table), str(tmp_path / "out"), *COLUMNS]) == 1
    assert "image repeated" in capsys.readouterr().err


def test_rows_longer_than_the_header_are_refused(table, tmp_path, capsys):
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join([lines[0], *(f"{line}," for line in lines[1:])]), encoding="utf-8")
    assert cli.main(["pack", str(table), str(tmp_path / "out"), *COLUMNS]) == 1
    assert "is not a CSV file" in capsys.readouterr().err


def test_outputs_of_one_pass_must_differ(source, tmp_path, capsys):
    words = ["pack", str(source), str(tmp_path / "a"), "--also", f"{tmp_path / 'a'}=32x24"]
    assert cli.main(words) == 1
    assert "must be different folders" in capsys.readouterr().err


def test_a_csv_without_its_columns_named_says_which_options(table, tmp_path, capsys):
    assert cli.main(["pack", str(table), str(tmp_path / "out")]) == 1
    assert "--image-column and --label-column" in capsys.readouterr().err


def test_a_folder_that_is_no_source_says_what_one_looks_like(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["pack", str(tmp_path / "empty"), str(tmp_path / "out")]) == 1
    assert "neither HAM10000_metadata.csv nor images" in capsys.readouterr().err


@pytest.fixture
def challenge(tmp_path) -> Path:
    """The challenge's test set: seven images, one a class, and the easter egg."""
    names = [f"ISIC_{34524 + number:07d}" for number in range(7)] + ["ISIC_0035068"]
    for name in names:
        save(tmp_path / "challenge" / "ISIC2018_Task3_Test_Input" / f"{name}.jpg")
    hot = pd.DataFrame(
        np.vstack([np.eye(7), np.eye(7)[:1]]), columns=["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
    )
    hot.insert(0, "image", names)
    hot.to_csv(tmp_path / "challenge" / "ISIC2018_Task3_Test_GroundTruth.csv", index=False)
    return tmp_path / "challenge"


def test_isic2018_trains_on_ham10000_and_tests_on_the_challenge(source, challenge, tmp_path):
    words = ["--protocol", "isic2018", "--test-source", str(challenge), "--size", "32x24"]
    assert cli.main(["pack", str(source), str(tmp_path / "out"), *words]) == 0
    dataset = load(tmp_path / "out")
    assert dataset.description.counts["test"] == dict.fromkeys(dataset.classes, 1)
    left_out = pd.read_csv(tmp_path / "out" / "left_out.csv").set_index("image_id")["reason"]
    assert "easter egg" in left_out["ISIC_0035068"]
    assert dataset.group_name == "lesion"
    assert "1902.03368" in dataset.description.citation
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.rename(columns={"DF": "SCC"}), ["image, MEL, NV", "SCC"]),
        (lambda t: t.assign(NV=1.0), ["not exactly one of the columns"]),
        (lambda t: pd.concat([t, t[:1].assign(image="ISIC_9999999")]), ["ISIC_9999999", "no image"]),
    ],
)
def test_a_bad_ground_truth_is_named(source, challenge, change, words):
    path = challenge / "ISIC2018_Task3_Test_GroundTruth.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_isic2018(source, challenge)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--protocol", "isic2018"], "needs --test-source"),
        (
            ["--protocol", "lesions"],
            "must be one of lesion, notebook, isic2018, column:NAME, test, image, notebook-leaky",
        ),
        (["--protocol", "notebook", "--folds", "5"], "--folds goes with --protocol lesion"),
        (["--protocol", "column:sex", "--holdout", "0.2"], "a test split of its own"),
        (["--protocol", "test", "--holdout", "0.2"], "a test split of its own"),
        (["--holdout", "2"], "'--holdout' must be a share"),
        (["--folds", "2"], "'--folds' must be at least 3"),
    ],
)
def test_options_that_do_not_go_together_are_refused(source, tmp_path, capsys, words, expected):
    assert cli.main(["pack", str(source), str(tmp_path / "out"), *words]) == 1
    assert expected in capsys.readouterr().err


def test_study_protocols_are_marked_in_the_dataset(source, tmp_path):
    assert (
        cli.main(["pack", str(source), str(tmp_path / "out"), "--protocol", "notebook-leaky", "--size", "32x24"]) == 0
    )
    content = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert content["protocol"] == {"name": "notebook-leaky", "seed": 0, "leaks": True}
    assert "scores mean nothing" in content["warnings"][0]


def test_two_sizes_of_one_pass_equal_two_passes(source, tmp_path):
    words = ["pack", str(source), str(tmp_path / "a"), "--size", "48x36", "--also", f"{tmp_path / 'b'}=32x32:squeeze"]
    assert cli.main(words) == 0
    for name, size, how in (("a", "48x36", "cover"), ("b", "32x32", "squeeze")):
        alone = tmp_path / f"alone-{name}"
        assert cli.main(["pack", str(source), str(alone), "--size", size, "--fit", how]) == 0
        files = sorted(path.name for path in alone.iterdir())
        assert files == sorted(path.name for path in (tmp_path / name).iterdir())
        assert all((alone / file).read_bytes() == (tmp_path / name / file).read_bytes() for file in files)


def test_columns_named_as_the_shards_own_are_renamed(table, tmp_path):
    pd.read_csv(table).rename(columns={"camera": "size"}).assign(**{"class": "x"}).to_csv(table, index=False)
    assert cli.main(["pack", str(table), str(tmp_path / "out"), "--size", "32x24", *COLUMNS]) == 0
    dataset = load(tmp_path / "out")
    rows = load_table(dataset, dataset.shards[0])
    assert set(rows["source_size"]) == {"0", "1", "2"}
    assert set(rows["source_class"]) == {"x"}
    assert rows["size"].min() > 100


def test_show_draws_a_sheet_beside_the_dataset_and_not_into_it(packed, tmp_path, capsys):
    folder = shutil.copytree(packed, tmp_path / "data")
    assert cli.main(["show", str(folder)]) == 0
    sheet = Image.open(tmp_path / "data-sheet.png")
    assert sheet.height > 21 * 96  # seven classes, three splits
    assert str(tmp_path / "data-sheet.png") in capsys.readouterr().out
    assert verify(folder) == []


def test_a_full_disk_while_packing_is_said_and_nothing_is_left(source, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert cli.main(["pack", str(source), str(small / "out"), "--quality", "95"]) == 1
        error = capsys.readouterr().err
        assert "is full" in error
        assert "Free space" in error
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_challenges_test_images_keep_their_lesions_where_dataverse_names_them(source, challenge):
    """Dataverse serves the ground truth as a table with lesions; beside ISIC's own it is the one that is taken."""
    ids = pd.read_csv(challenge / "ISIC2018_Task3_Test_GroundTruth.csv")["image"].tolist()
    rows = {"lesion_id": [f"HAM_9{place // 2}" for place in range(len(ids))], "image_id": ids, "dx": "NV", "age": "50"}
    pd.DataFrame(rows).to_csv(challenge / "ISIC2018_Task3_Test_GroundTruth.tab", sep="\t", index=False)
    catalogue = read_isic2018(source, challenge)
    test = catalogue.images[catalogue.images["part"] == "test"]
    assert test["group"].tolist() == rows["lesion_id"]
    assert set(test["label"]) == {"nv"}
    assert "with their lesions" in catalogue.what
    split = split_isic2018(catalogue.images)
    assert len(split.rows["test"]) == len(ids) - 1  # one of the challenge shows no lesion


def test_a_lesion_of_the_challenges_test_that_is_also_trained_on_is_refused(source, challenge):
    ham = read_ham10000(source).images
    ids = pd.read_csv(challenge / "ISIC2018_Task3_Test_GroundTruth.csv")["image"].tolist()
    rows = {"lesion_id": ham["group"].iloc[0], "image_id": ids, "dx": ham["label"].iloc[0]}
    (challenge / "ISIC2018_Task3_Test_GroundTruth.csv").unlink()
    pd.DataFrame(rows).to_csv(challenge / "ISIC2018_Task3_Test_GroundTruth.tab", sep="\t", index=False)
    images = read_isic2018(source, challenge).images
    with pytest.raises(ValueError, match="scores would leak"):
        check_split(images, split_isic2018(images))
