"""Public data sets in the layout in which they are downloaded: one command each, and what it says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shards import cli
from shards.index import load, load_table
from shards.labels import read_labels
from shards.public_data import KNOWN, Columns, recognise
from shards.sources import read_source

RNG = np.random.default_rng(5)
N = 40


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)


def table(path: Path, columns: dict, **options) -> pd.DataFrame:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.DataFrame(columns)
    rows.to_csv(path, index=False, **options)
    return rows


def one_hot(classes: str, used: int) -> dict[str, list[float]]:
    names = classes.split(",")
    return {name: [float(row % used == place) for row in range(N)] for place, name in enumerate(names)}


def draw_ham10000(root: Path) -> None:
    ids = [f"ISIC_{30000 + row:07d}" for row in range(N)]
    for row, name in enumerate(ids):
        save(root / f"HAM10000_images_part_{1 + row % 2}" / f"{name}.jpg")
    kinds = ["MEL", "nv", "Bcc", "akiec"]  # in any case
    named = {"lesion_id": [f"HAM_{row // 2 // 4 * 4 + row % 4}" for row in range(N)], "image_id": ids}
    table(root / "the table.tab", named | {"dx": [kinds[row % 4] for row in range(N)]}, sep="\t")


def draw_isic2018(root: Path) -> None:
    """The challenge's three downloads, each unpacked into a folder of its own."""
    ids = [f"ISIC_{24306 + row:07d}" for row in range(N)]
    for name in ids:
        save(root / "ISIC2018_Task3_Training_Input" / f"{name}.jpg")
    truth = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    table(truth, {"image": ids} | one_hot("MEL,NV,BCC,AKIEC,BKL,DF,VASC", 4))
    lesions = {
        "lesion_id": [f"HAM_{row % 4}_{row // 8}" for row in range(N)],
        "diagnosis_confirm_type": "histopathology",
    }
    table(root / "ISIC2018_Task3_Training_LesionGroupings.csv", {"image": ids} | lesions)


@pytest.mark.parametrize("given", ["ISIC2018_Task3_Training_GroundTruth.csv", "."])
def test_the_table_of_lesions_is_found_from_wherever_the_truth_is_given(tmp_path, monkeypatch, given):
    """By a bare name in its own folder, without lesions, half of them were in train and in test."""
    draw_isic2018(tmp_path)
    monkeypatch.chdir(tmp_path / "ISIC2018_Task3_Training_GroundTruth")
    there = read_source(given, Columns(image_root=Path("..")))
    monkeypatch.chdir("/")
    named = read_source(tmp_path / "ISIC2018_Task3_Training_GroundTruth", Columns(image_root=tmp_path))
    pd.testing.assert_frame_equal(there.images.drop(columns="path"), named.images.drop(columns="path"))
    assert "lesions from ISIC2018_Task3_Training_LesionGroupings.csv" in there.what
    assert there.group_name == "lesion"


def draw_isic2019(root: Path) -> None:
    ids = [f"ISIC_{row:07d}{'_downsampled' * (row % 3 == 0)}" for row in range(N)]
    for name in ids:
        save(root / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input" / f"{name}.jpg")
    table(root / "ISIC_2019_Training_GroundTruth.csv", {"image": ids} | one_hot("MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", 4))
    lesions = [f"BCN_{row % 4}_{row // 8}" if row % 5 else "" for row in range(N)]
    table(
        root / "ISIC_2019_Training_Metadata.csv",
        {"image": ids, "age_approx": "55.0", "anatom_site_general": "torso", "lesion_id": lesions, "sex": "male"},
    )


def draw_isic2020(root: Path) -> None:
    """Kaggle's download: pictures of the test set lie beside those of the training set."""
    ids = [f"ISIC_{row:07d}" for row in range(N)]
    for row, name in enumerate(ids):
        save(root / "jpeg" / "train" / f"{name}.jpg")
        save(root / "jpeg" / "test" / f"ISIC_{9000 + row:07d}.jpg")
    kinds = ["malignant" if row % 5 == 0 else "benign" for row in range(N)]
    named = {"image_name": ids, "patient_id": [f"IP_{row // 4}" for row in range(N)], "sex": "male"}
    table(root / "train.csv", named | {"diagnosis": "unknown", "benign_malignant": kinds, "target": 0})
    table(root / "test.csv", {"image_name": ["ISIC_0009000"], "patient_id": ["IP_1"], "sex": ["male"]})


def draw_pad_ufes_20(root: Path) -> None:
    ids = [f"PAT_{row // 4}_{row}_{row * 7}.png" for row in range(N)]
    for row, name in enumerate(ids):
        save(root / "images" / f"imgs_part_{1 + row % 3}" / name)
    named = {"patient_id": [f"PAT_{row // 4}" for row in range(N)], "lesion_id": range(N), "smoke": ""}
    kinds = [["ACK", "BCC", "MEL", "NEV"][row % 4] for row in range(N)]
    table(root / "metadata.csv", named | {"diagnostic": kinds, "img_id": ids, "biopsed": "True"})


def draw_bcn20000(root: Path) -> None:
    ids = [f"BCN_{row:010d}.jpg" for row in range(N)]
    for name in ids:
        save(root / "BCN_20k_train" / "bcn_20k_train" / name)
    kinds = [["MEL", "NV", "BCC", "AK"][row % 4] for row in range(N)]
    lesions = {"lesion_id": [f"BCN_{row % 4}_{row // 8}" for row in range(N)], "capture_date": "2011", "split": "train"}
    table(root / "bcn_20k_train.csv", {"bcn_filename": ids, "age_approx": "55.0", "diagnosis": kinds} | lesions)


def draw_fitzpatrick17k(root: Path) -> None:
    hashes = [f"{row:032x}" for row in range(N)]
    for name in hashes:
        save(root / "data" / "finalfitz17k" / f"{name}.jpg")
    parts = [["benign", "malignant", "non-neoplastic"][row % 3] for row in range(N)]
    named = {"md5hash": hashes, "fitzpatrick_scale": 3, "label": "psoriasis", "nine_partition_label": "inflammatory"}
    table(root / "fitzpatrick17k.csv", named | {"three_partition_label": parts, "qc": "", "url": "none"})


def draw_isic_archive(root: Path) -> None:
    ids = [f"ISIC_{row:07d}" for row in range(N)]
    for name in ids:
        save(root / "images" / f"{name}.jpg")
    named = {"isic_id": ids, "patient_id": [f"IP_{row // 8}" if row % 2 else "" for row in range(N)]}
    kinds = [["Benign", "Malignant"][row // 2 % 2] for row in range(N)]
    table(root / "metadata.csv", named | {"lesion_id": [f"IL_{row // 2}" for row in range(N)], "diagnosis_1": kinds})


def draw_imagefolder(root: Path) -> None:
    for split in ("train", "validation", "test"):
        ids = [f"{row}.png" for row in range(N)]
        for name in ids:
            save(root / split / name)
        table(root / split / "metadata.csv", {"file_name": ids, "label": [["cat", "dog"][row % 2] for row in range(N)]})


def draw_flat_imagefolder(root: Path) -> None:
    ids = [f"images/{row}.png" for row in range(N)]
    for name in ids:
        save(root / name)
    table(
        root / "metadata.csv",
        {"file_name": ids, "label": [row % 2 for row in range(N)], "patient": [row // 4 for row in range(N)]},
    )


HAM = "mel nv bcc akiec bkl df vasc"
CASES = {
    "HAM10000": (draw_ham10000, [], HAM, "lesion", "CC BY-NC 4.0", ""),
    "ISIC 2018": (draw_isic2018, [], "mel nv bcc akiec", "lesion", "CC BY-NC 4.0", "lesions from ISIC2018_Task3_Training_LesionGroupings.csv"),
    "ISIC 2019": (draw_isic2019, [], "mel nv bcc ak", "lesion", "CC BY-NC 4.0", "without an image: BKL, DF, VASC, SCC, UNK), in small letters"),
    "ISIC 2020": (draw_isic2020, [], "benign malignant", "patient", "CC BY-NC 4.0", "groups from patient_id"),
    "PAD-UFES-20": (draw_pad_ufes_20, [], "ack bcc mel nev", "patient", "CC BY 4.0", "groups from patient_id and lesion_id"),
    "BCN20000": (draw_bcn20000, [], "ak bcc mel nv", "lesion", "", "images from bcn_filename"),
    "Fitzpatrick17k": (draw_fitzpatrick17k, ["--label-column", "three_partition_label"], "benign malignant non-neoplastic", "group", "", "no groups"),
    "ISIC Archive": (draw_isic_archive, ["--label-column", "diagnosis_1"], "Benign Malignant", "patient", "", "groups from patient_id and lesion_id"),
    "imagefolder in splits": (draw_imagefolder, [], "cat dog", "group", "", "in test, train, validation"),
    "imagefolder": (draw_flat_imagefolder, ["--class-names", "benign,malignant", "--group-column", "patient"], "benign malignant", "patient", "", "0 is benign, 1 is malignant"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_public_data_set_is_packed_by_one_command(tmp_path, capsys, name):
    draw, words, classes, group, terms, said = CASES[name]
    draw(tmp_path / "root")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out"), "--size", "12x9", *words]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    dataset = load(tmp_path / "out")
    about = dataset.description
    assert " ".join(dataset.classes) == classes
    assert about.group_name == group
    assert about.license == terms
    n = 3 * N if name == "imagefolder in splits" else N
    assert about.source["images"] == n
    of_split = {
        split: pd.concat(load_table(dataset, shard) for shard in dataset.split(split))
        for split in ("train", "val", "test")
    }
    assert sum(map(len, of_split.values())) + about.left_out == n
    groups = [set(rows["group"]) for rows in of_split.values()]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]


def test_images_of_isic_2019_without_a_lesion_are_groups_of_their_own_and_every_result_says_so(tmp_path):
    draw_isic2019(tmp_path / "root")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out"), "--size", "12x9"]) == 0
    dataset = load(tmp_path / "out")
    assert dataset.description.warnings == [
        "8 images have no lesion_id: others of the same lesion may be in other splits"
    ]


def test_two_tables_that_may_be_meant_are_refused_with_what_to_type(tmp_path, capsys):
    draw_isic2018(tmp_path / "root")
    draw_isic2020(tmp_path / "root")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "train.csv" in error
    assert "_GroundTruth.csv" in error
    assert "--image-root" in error
    words = ["pack", str(tmp_path / "root" / "train.csv"), str(tmp_path / "out"), "--size", "12x9"]
    assert cli.main(words) == 0


def test_a_known_table_whose_labels_are_a_choice_asks_for_it(tmp_path, capsys):
    draw_fitzpatrick17k(tmp_path / "root")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "fitzpatrick17k.csv (Fitzpatrick17k) needs --label-column" in error
    assert "three_partition_label" in error


def test_columns_named_for_a_folder_without_a_table_are_refused(tmp_path, source, capsys):
    for name in ("m/1.png", "n/2.png"):
        save(tmp_path / "root" / name)
    for folder in (tmp_path / "root", source):
        assert cli.main(["pack", str(folder), str(tmp_path / "out"), "--label-column", "dx"]) == 1
        assert "Give the table itself" in capsys.readouterr().err


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_each_public_data_set_is_recognised_by_its_own_marks(known):
    assert recognise(known.marks) is known
    assert recognise(known.marks[1:]) is not known


CELLS = pd.DataFrame(
    {"A": ["1", "0.0", "True"], "B": ["0", "1", "false"], "C": ["0", "0", "0"], "n": ["0", "1.0", "0"]}
)
ODD = pd.DataFrame({"A": ["1", "0", "", "0.5"], "B": ["1", "0", "1", "0.5"], "n": ["0", "1", "2", "x"]})


def test_one_hot_columns_and_numbers_become_names():
    labels = read_labels(CELLS, Path("t.csv"), "xyz", ["B", "A", "C"], ())
    assert (labels.values, labels.classes) == (["A", "B", "A"], ("B", "A"))
    assert "left out, without an image: C" in labels.said
    labels = read_labels(CELLS, Path("t.csv"), "xyz", ["n"], ["benign", "malignant"])
    assert (labels.values, labels.classes) == (["benign", "malignant", "benign"], ("benign", "malignant"))
    assert "0 is benign, 1 is malignant" in labels.said
    swapped = pd.DataFrame({"n": ["0", "2", "1"]})  # numbers that are the names, in an order of their user's
    labels = read_labels(swapped, Path("t.csv"), "xyz", ["n"], ["2", "1", "0"])
    assert (labels.values, labels.classes) == (["0", "2", "1"], ("2", "1", "0"))
    labels = read_labels(swapped[1:], Path("t.csv"), "yz", ["n"], ["1", "2", "3"])
    assert (labels.values, labels.classes) == (["2", "1"], ("1", "2"))
    ten = pd.DataFrame({"n": [str(number) for number in range(11)]})
    assert read_labels(ten, Path("t.csv"), "x" * 11, ["n"], ()).classes == tuple(ten["n"])


@pytest.mark.parametrize(
    ("columns", "names", "words"),
    [
        (["A", "B"], (), ["x, y, z and 1 more", "not exactly one of the columns A, B is 1"]),
        (["A", "B"], ("a", "b"), ["of --label-columns the columns are the names"]),
        (["n"], ("a", "b"), ["names the labels 0 to 1", "0, 1, 2, x"]),
        (["n"], ("a", "a"), ["a class twice"]),
    ],
)
def test_labels_that_are_not_one_class_each_are_refused(columns, names, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each word below
        read_labels(ODD, Path("t.csv"), "xyzw", columns, names)
    for word in words:
        assert word in str(caught.value)
