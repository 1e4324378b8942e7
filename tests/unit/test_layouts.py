"""Folders and tables as people have them: taken for what they are, in one line, or refused with what to type."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, features

from shards import cli
from shards.catalogue import Catalogue, unite_copies, validate
from shards.folders import ImageFinder, find_classes, walk
from shards.grouping import Split
from shards.ham10000 import read_ham10000
from shards.image import decode_into
from shards.index import load, load_table, verify
from shards.public_data import Columns
from shards.reader import SplitReader
from shards.sources import read_class_folders, read_table
from shards.tables import find_separator, read_table_file
from shards.unreadable import without

RNG = np.random.default_rng(1)


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(path)
    return path


def packed(source: Path, out: Path, *words: str):
    assert cli.main(["pack", str(source), str(out), "--size", "12x9", *words]) == 0
    return load(out)


@pytest.mark.parametrize("name", ["HAM10000_metadata.tab", "HAM10000_metadata", "HAM10000_metadata.csv"])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_ham10000s_table_is_read_under_each_of_its_names_whatever_separates_it(source, tmp_path, name, separator):
    folder = shutil.copytree(source, tmp_path / "HAM10000")
    table = pd.read_csv(folder / "HAM10000_metadata.csv", dtype=str, keep_default_na=False)
    (folder / "HAM10000_metadata.csv").unlink()
    table.to_csv(folder / name, sep=separator, index=False)
    pd.testing.assert_frame_equal(
        read_ham10000(folder).images.drop(columns="path"), read_ham10000(source).images.drop(columns="path")
    )


def test_a_table_with_spaces_blank_rows_repeated_headers_and_line_breaks_is_tidied(tmp_path):
    text = 'id ;note\n a ;"two\r\nlines"\nid ;note\n;\n;\n'
    (tmp_path / "t.csv").write_bytes(text.encode())
    table, said = read_table_file(tmp_path / "t.csv")
    assert table.to_dict("records") == [{"id": "a", "note": "two lines"}]
    assert said == "semicolons, 1 repeated headers left out"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("id,site\n001,Rücken\n".encode(), "commas"),
        ("id,site\n001,Rücken\n".encode("utf-8-sig"), "commas"),
        ("id,site\n001,Rücken\n".encode("cp1252"), "commas, Windows-1252"),
        ("id\tsite\n001\tRücken\n".encode("utf-16"), "tabs, UTF-16"),
        (gzip.compress(b"id,site\n001,R\xc3\xbccken\n", mtime=0), "commas"),
    ],
)
def test_text_is_read_in_the_encoding_it_has_and_stays_text(tmp_path, data, said):
    (tmp_path / "t.csv.gz").write_bytes(data)
    table, found = read_table_file(tmp_path / "t.csv.gz")
    assert table.to_dict("records") == [{"id": "001", "site": "Rücken"}]
    assert found == said


@pytest.mark.parametrize(
    ("name", "word"), [("t.zip", "Unpack it"), ("t.xlsx", "Save it as CSV"), ("t.csv", "is empty")]
)
def test_what_is_no_table_says_what_to_do(tmp_path, name, word):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=word):
        read_table_file(tmp_path / name)


def test_a_separator_inside_quotes_is_none():
    assert find_separator('"a;b;c","d"\n') == ","
    assert find_separator("name\n") == ","


@pytest.mark.parametrize("words", [("train", "val", "test"), ("training", "valid", "test"), ("Train", "validation")])
def test_folders_named_train_val_and_test_are_taken_as_they_are(tmp_path, words, capsys):
    for split in words:
        for number in range(6):
            save(tmp_path / "root" / split / "mn"[number % 2] / f"{number}.png")
    dataset = packed(tmp_path / "root", tmp_path / "out")
    assert dataset.classes == ("m", "n")
    assert {name: sum(shard.samples for shard in dataset.split(name)) for name in ("train", "val", "test")} == {
        "train": 6,
        "val": 6,
        "test": 6,
    }
    assert ("test" in dataset.description.aliases) == (len(words) == 2)
    printed = capsys.readouterr().out
    assert f"class folders in {', '.join(sorted(words))}; {6 * len(words)} images, 2 classes" in printed
    assert ("validation doubles as the test split" in printed) == (len(words) == 2)
    ids = {name for shard in dataset.split("val") for name in load_table(dataset, shard)["image_id"]}
    assert f"{words[1]}/m/0" in ids


def test_the_same_bytes_in_two_splits_of_a_source_are_a_leak(tmp_path, capsys):
    for split in ("train", "val", "test"):
        for number in range(4):
            save(tmp_path / "root" / split / "mn"[number % 2] / f"{number}.png")
    shutil.copy(tmp_path / "root/train/m/0.png", tmp_path / "root/test/m/copy.png")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out"), "--size", "12x9"]) == 1
    error = capsys.readouterr().err
    assert "test/m/copy" in error
    assert "scores would leak" in error
    packed(tmp_path / "root", tmp_path / "again", "--protocol", "lesion")  # united, the copies are in one split


def test_two_files_that_would_be_one_image_id_are_named(tmp_path):
    for name in ("m/1.png", "m/2.png", "n/1.png", "m/1.jpg"):
        save(tmp_path / "root" / name)
    with pytest.raises(ValueError, match=r"m/1 of root: 1\.jpg and 1\.png would be one image id\. Keep one"):
        read_class_folders(tmp_path / "root")
    (tmp_path / "table.csv").write_text("image,label\nroot/m/1.png,m\nroot/m/1.jpg,m\nroot/n/1.png,n\n")
    with pytest.raises(ValueError, match=r"1\.png and 1\.jpg would be one image id"):
        read_table(tmp_path / "table.csv", Columns(image="image", labels=("label",)))


def test_copies_are_in_one_group(tmp_path):
    for number in range(8):
        save(tmp_path / "root" / "mn"[number % 2] / f"{number}.png")
    shutil.copy(tmp_path / "root/m/0.png", tmp_path / "root/m/0 (1).png")
    images = read_class_folders(tmp_path / "root").images.set_index("image_id")["group"]
    assert images["m/0 (1)"] == images["m/0"]
    assert images.nunique() == 8
    pd.testing.assert_series_equal(
        unite_copies(read_class_folders(tmp_path / "root").images)["group"], images.reset_index(drop=True)
    )


TREES = {
    "parts of one set": (["HAM10000_images_part_1/a.jpg", "HAM10000_images_part_2/b.jpg"], "look like parts"),
    "parts, as PAD-UFES-20 has them": (["imgs_part_1/a.jpg", "imgs_part_2/b.jpg"], "look like parts"),
    "splits without classes": (["train/a.jpg", "test/b.jpg"], "is in no class folder"),
    "splits beside classes": (["train/m/a.jpg", "extra/b.jpg"], "folders named as splits"),
    "one class": (["m/a.jpg", "m/b.jpg"], "in one class folder alone"),
    "a table beside": (["m/a.jpg", "n/b.jpg", "labels.csv"], "has a table (labels.csv) beside"),
    "a table in a text file": (["m/a.jpg", "n/b.jpg", "labels.txt"], "has a table (labels.txt) beside"),
    "nothing": (["notes.md"], "No source"),
}


@pytest.mark.parametrize(("files", "word"), TREES.values(), ids=TREES)
def test_folders_that_may_be_no_classes_are_refused_with_what_to_type(tmp_path, files, word):
    for name in files:
        save(tmp_path / name) if name.endswith("jpg") else (tmp_path / name).write_text("id,label\n")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        find_classes(tmp_path)
    assert word in str(refused.value)


def test_notes_beside_class_folders_are_no_table(tmp_path):
    for name in ("m/a.jpg", "n/b.jpg"):
        save(tmp_path / name)
    (tmp_path / "README.txt").write_text("Photos of moles, taken in 2020, by two clinics; see the paper for more.\n")
    rows, what = find_classes(tmp_path)
    assert [row["label"] for row in rows] == ["m", "n"]
    assert what == "class folders; not images, left out: 1 .txt"


def test_a_data_set_of_one_class_is_refused_from_a_table_too(tmp_path):
    for number in range(4):
        save(tmp_path / f"{number}.jpg")
    pd.DataFrame({"file": [f"{number}.jpg" for number in range(4)], "label": "m"}).to_csv(
        tmp_path / "t.csv", index=False
    )
    with pytest.raises(ValueError, match=r"All 4 images of t.csv have one label \(m\)"):
        read_table(tmp_path / "t.csv", Columns("file", ("label",)))


def test_hidden_files_are_no_images_deeper_folders_belong_to_their_class_and_the_rest_is_counted(tmp_path):
    for name in ("m/a.jpg", "m/patient1/b.jpg", "n/c.jpg", "n/deep/er/d.jpg"):
        save(tmp_path / name)
    for name in (
        "m/._a.jpg",
        "m/.DS_Store",
        "n/Thumbs.db",
        ".ipynb_checkpoints/x.jpg",
        "__MACOSX/m/a.jpg",
        "n/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows, what = find_classes(tmp_path)
    assert {row["image_id"]: row["label"] for row in rows} == {
        "m/a": "m",
        "m/patient1/b": "m",
        "n/c": "n",
        "n/deep/er/d": "n",
    }
    assert what == "class folders; not images, left out: 1 .txt"


def test_linked_folders_are_followed_and_a_link_upwards_is_not(tmp_path):
    save(tmp_path / "elsewhere" / "a.jpg")
    save(tmp_path / "root" / "n" / "b.jpg")
    (tmp_path / "root" / "m").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "n" / "up").symlink_to(tmp_path / "root")
    rows, _ = find_classes(tmp_path / "root")
    assert [row["image_id"] for row in rows] == ["m/a", "n/b"]


@pytest.mark.parametrize("ending", ["bmp", "tif", "gif", "jfif", "JPG", "ppm", "avif"])
def test_whatever_is_read_is_an_image(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for number in range(8):
        save(tmp_path / "root" / "mn"[number % 2] / f"{number}.{ending if number else 'jpg'}")
    dataset = packed(tmp_path / "root", tmp_path / "out")
    assert sum(shard.samples for shard in dataset.shards) == 8


@pytest.fixture
def scattered(tmp_path) -> Path:
    """Images in folders beside and below which tables name them in every way."""
    for name in ("train/ISIC_0000001.jpg", "train/ISIC_0000002_downsampled.JPG", "more/deep/0034567.png", "more/x.tif"):
        save(tmp_path / "images" / name)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ISIC_0000001", "train/ISIC_0000001.jpg"),
        ("ISIC_0000001.jpg", "train/ISIC_0000001.jpg"),
        ("train/ISIC_0000001", "train/ISIC_0000001.jpg"),
        ("train\\ISIC_0000001.jpg", "train/ISIC_0000001.jpg"),
        ("isic_0000001.JPEG", "train/ISIC_0000001.jpg"),
        ("ISIC_0000002", "train/ISIC_0000002_downsampled.JPG"),
        ("ISIC_0000002.jpg", "train/ISIC_0000002_downsampled.JPG"),
        ("34567", "more/deep/0034567.png"),
        ("x", "more/x.tif"),
        ("y", None),
        ("", None),
    ],
)
def test_an_image_is_found_by_its_path_or_by_a_name_that_it_has_alone(scattered, name, file):
    assert ImageFinder(scattered).find(name) == (scattered / file if file else None)


def test_a_name_that_two_images_have_is_refused_with_both(scattered):
    save(scattered / "again" / "ISIC_0000001.jpg")
    with pytest.raises(ValueError, match=r"Several images are named ISIC_0000001: .*again.* and .*train"):
        ImageFinder(scattered).find("ISIC_0000001")
    assert ImageFinder(scattered).find("train/ISIC_0000001") == scattered / "train/ISIC_0000001.jpg"


def test_a_table_elsewhere_names_its_images_by_image_root(tmp_path):
    for number in range(24):
        save(tmp_path / "images" / "a" / f"{number:04d}.png")
    table = pd.DataFrame({"id": [f" {number} " for number in range(24)], "dx": list("mn" * 12)})
    (tmp_path / "tables").mkdir()
    table.to_csv(tmp_path / "tables" / "t.tsv", sep="\t", index=False)
    words = ["--image-column", "id", "--label-column", "dx", "--image-root", str(tmp_path / "images")]
    dataset = packed(tmp_path / "tables" / "t.tsv", tmp_path / "out", *words)
    assert sum(shard.samples for shard in dataset.shards) == 24


@pytest.mark.parametrize(
    ("column", "one", "other"),
    [
        ("label", "MEL", "mel"),
        ("group", "IL_1", "IL 1 ".replace(" ", "_", 1).lower()),
        ("group", "Mu\u0308ller", "M\u00fcller"),
        ("image_id", "a b", "ab"),
        ("label", "nv", "\uff4e\uff56"),
    ],
)
def test_names_that_people_take_for_one_are_never_silently_two(tmp_path, column, one, other):
    rows = pd.DataFrame({"image_id": ["i1", "i2", "i3"], "label": ["x", "y", "x"], "group": ["g1", "g2", "g3"]})
    rows.loc[0, column], rows.loc[1, column] = one, other
    catalogue = Catalogue(rows.assign(path=str(save(tmp_path / "a.png"))), tuple(sorted(set(rows["label"]))), "t")
    with pytest.raises(ValueError, match="differ by case, white space or the form of their letters alone"):
        validate(catalogue)


def test_a_missing_image_is_not_taken_for_another_of_its_name(tmp_path):
    """A mask, or the photo of another patient."""
    for name in ("images/01.jpg", "masks/01.png", "masks/02.png", "p1/1.png", "p3/3.png"):
        save(tmp_path / name)
    finder = ImageFinder(tmp_path)
    assert finder.find("images/02.jpg") is finder.find("p1/3.png") is finder.find("02.jpg") is None
    assert finder.find("p2/3.png") == tmp_path / "p3/3.png"  # from folders that are not here at all: by the name alone
    assert finder.find("/home/somebody/images/01.jpeg") == tmp_path / "images/01.jpg"
    assert finder.find("3.tif") == tmp_path / "p3/3.png"  # no file here is a TIFF: they were all converted


def test_a_folder_that_is_reached_twice_is_found_twice_and_one_above_is_not_entered(tmp_path):
    save(tmp_path / "root/a/1.png")
    save(tmp_path / "root/b/2.png")
    (tmp_path / "root/aa").symlink_to(tmp_path / "root/a")
    (tmp_path / "root/b/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/a/across").symlink_to(tmp_path / "root/b")
    (tmp_path / "root/b/back").symlink_to(tmp_path / "root/a")
    found = {str(path.relative_to(tmp_path / "root")) for path in walk(tmp_path / "root")}
    assert {"a/1.png", "aa/1.png", "b/2.png", "a/across/2.png", "b/back/1.png"} <= found
    assert not any("up" in name for name in found)
    with pytest.raises(ValueError, match="are the same file under two labels"):
        read_class_folders(tmp_path / "root")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    for name in "abc":
        save(tmp_path / name / "1.png")

    def scandir(folder, real=os.scandir):
        if Path(folder).name == "c":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"The folder .*c cannot be read .Permission denied.*Make it readable"):
        read_class_folders(tmp_path)


def test_images_beside_the_class_folders_are_counted(tmp_path):
    for number in range(24):
        save(tmp_path / "mn"[number % 2] / f"{number}.png")
    save(tmp_path / "loose.png")
    assert read_class_folders(tmp_path).what == "class folders; in no folder, left out: 1 image"


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "@SUM(1)", "+1+cmd|x", "-2+3"])
def test_names_that_a_spreadsheet_would_run_are_refused(tmp_path, name):
    rows = pd.DataFrame({"image_id": [name, "i2"], "label": ["x", "y"], "group": ["g1", "-5.5"]})
    with pytest.raises(ValueError, match="would run it as a formula"):
        validate(Catalogue(rows.assign(path=str(save(tmp_path / "a.png"))), ("x", "y"), "t"))


def test_names_that_are_no_utf8_are_refused(tmp_path):
    """As in old archives."""
    for name in ("m/1", "n/2"):
        save(tmp_path / f"{name}.png")
    os.rename(tmp_path / "m/1.png", os.fsencode(tmp_path) + b"/m/photo\xe9.png")
    with pytest.raises(
        ValueError, match=r"photo.udce9.png' has bytes that are no letters in UTF-8; 1 such name.s.\. Rename"
    ):
        read_class_folders(tmp_path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("path,label, label\na,b,c\n")
    with pytest.raises(ValueError, match="has the column 'label' twice"):
        read_table_file(tmp_path / "t.csv")


def test_ham10000_with_columns_of_our_names_is_read(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "HAM10000")
    table = pd.read_csv(folder / "HAM10000_metadata.csv", dtype=str, keep_default_na=False)
    table.assign(label="theirs", group="theirs", path="theirs").to_csv(folder / "HAM10000_metadata.csv", index=False)
    found = read_ham10000(folder).images
    pd.testing.assert_frame_equal(
        found[read_ham10000(source).images.columns].drop(columns="path"),
        read_ham10000(source).images.drop(columns="path"),
    )
    assert set(found["source_label"]) == {"theirs"}


@pytest.fixture
def damaged(tmp_path) -> Path:
    """40 images of two classes, five of them damaged."""
    for number in range(40):
        save(tmp_path / "root" / "mn"[number % 2] / f"{number:02d}.png")
    for number in (3, 8, 11, 24, 39):
        path = tmp_path / "root" / "mn"[number % 2] / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "root"


def test_images_that_cannot_be_read_are_named_all_at_once_and_nothing_is_kept(damaged, tmp_path, capsys):
    assert cli.main(["pack", str(damaged), str(tmp_path / "out"), "--size", "12x9", "--shard-samples", "7"]) == 1
    error = capsys.readouterr().err
    assert "5 image(s) cannot be read, and nothing was kept" in error
    assert "--on-bad-image skip" in error
    for number in (3, 8, 11, 24, 39):
        assert f"{number:02d}.png" in error
    assert not list(tmp_path.glob("out*"))


def test_images_that_cannot_be_read_are_left_out_and_listed_where_asked(damaged, tmp_path):
    words = ["--on-bad-image", "skip", "--shard-samples", "7", "--also", f"{tmp_path / 'small'}=16x12"]
    dataset = packed(damaged, tmp_path / "out", *words)
    assert verify(tmp_path / "out") == []
    assert dataset.description.left_out == 5
    left_out = pd.read_csv(tmp_path / "out" / "left_out.csv")
    assert set(left_out["image_id"]) == {"n/03", "m/08", "n/11", "m/24", "n/39"}
    assert left_out["reason"].str.contains("Cannot decode").all()
    assert "5 of 40 images could not be read and are left out" in dataset.description.warnings
    rows = pd.concat(load_table(dataset, shard) for shard in dataset.shards)
    assert rows["key"].tolist() == list(range(35))
    assert sum(sum(counts.values()) for counts in dataset.description.counts.values()) == 35
    for out in ("out", "small"):
        reader = SplitReader(load(tmp_path / out), "train")
        pixels = np.empty((reader.dataset.height, reader.dataset.width, 3), np.uint8)
        for shard, size in enumerate(reader.shard_sizes):
            reader.labels_and_keys(np.full(size, shard), np.arange(size))
            for _, jpeg in reader.read(np.full(size, shard), np.arange(size)):
                decode_into(jpeg, pixels)


def test_empty_files_are_named_at_once_before_anything_is_packed_and_may_be_left_out(tmp_path, capsys):
    for number in range(40):
        path = save(tmp_path / "root" / "mn"[number % 2] / f"{number:02d}.png")
        if number in (5, 6):
            path.write_bytes(b"")
    words = ["pack", str(tmp_path / "root"), str(tmp_path / "out"), "--size", "12x9"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "2 image(s) cannot be read" in error
    assert "05.png: 0 bytes" in error
    assert "06.png: 0 bytes" in error
    assert cli.main([*words, "--on-bad-image", "skip"]) == 0
    assert load(tmp_path / "out").description.left_out == 2


def test_what_is_left_out_beside_an_image_that_cannot_be_read_says_so():
    groups = pd.Series(["g1", "g2", "g2", "g2", "g3", "g3"])
    kept = "val keeps one image a group, and another of {} is kept"
    rows = {"train": np.array([0]), "val": np.array([1, 4])}
    split = Split({"name": "lesion"}, rows, {2: kept.format("g2"), 3: kept.format("g2"), 5: kept.format("g3")})
    found = without(split, {1: "Cannot decode"}, pd.Series(list("aaaabb")), groups)
    told = "val keeps one image a group, and that of g2 cannot be read"
    assert found.left_out == {1: "Cannot decode", 2: told, 3: told, 5: kept.format("g3")}
    assert found.rows["val"].tolist() == [4]


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    for number in range(12):
        save(tmp_path / "root" / ("train", "val")[number % 2] / "mn"[number // 2 % 2] / f"{number}.png")
    for path in (tmp_path / "root" / "val").rglob("*.png"):
        path.write_bytes(b"x")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out"), "--on-bad-image", "skip"]) == 1
    assert not list(tmp_path.glob("out*"))


def test_what_was_done_to_images_is_counted_and_said(tmp_path, capsys):
    for number in range(8):
        path = save(tmp_path / "root" / "mn"[number % 2] / f"{number}.jpg")
        if number < 3:
            path.write_bytes(path.read_bytes()[:-2])
    dataset = packed(tmp_path / "root", tmp_path / "out", "--protocol", "test")
    said = "a JPEG without its end marker: all rows are there"
    assert dataset.description.source[said] == 3
    assert f"3 images: {said}" in capsys.readouterr().out
    assert verify(tmp_path / "out") == []


def test_a_split_without_a_class_that_is_trained_is_packed_with_a_warning(tmp_path, capsys):
    for split, classes in (("train", "mno"), ("val", "mn"), ("test", "mo")):
        for number, label in enumerate(classes * 3):
            save(tmp_path / "root" / split / label / f"{number}.png")
    dataset = packed(tmp_path / "root", tmp_path / "out")
    assert dataset.description.warnings[-2:] == [
        "the val split has no image of o: its scores say nothing of that",
        "the test split has no image of n: its scores say nothing of that",
    ]
    assert "warning: the test split has no image of n" in capsys.readouterr().out


def test_one_file_under_two_labels_is_refused_by_both_names(tmp_path, capsys):
    for number in range(4):
        save(tmp_path / "root" / "mn"[number % 2] / f"{number}.png")
    shutil.copy(tmp_path / "root/m/0.png", tmp_path / "root/n/copy.png")
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "root/m/0.png and" in error
    assert "root/n/copy.png are the same file under two labels (m and n)" in error
