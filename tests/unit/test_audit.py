"""The audit finds one thing under two names, and nothing else; and what it found unites groups."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from shards import cli
from shards.audit import features as features_module
from shards.audit.collection import join, open_collection
from shards.audit.features import extract, key_points
from shards.audit.geometry import MIRRORED, match, mirror
from shards.audit.pairs import find_pairs, to_table
from shards.audit.record import audit_warnings, find_audit
from shards.duplicates import merge_duplicates
from shards.index import load, load_table
from shards.public_data import Columns
from shards.sources import read_source
from support.remote import serving

WIDTH, HEIGHT = 320, 240


def texture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture with many places that are like no other: soft noise of several sizes."""
    chance = np.random.default_rng(seed)
    layers = [
        np.asarray(
            Image.fromarray(chance.integers(0, 256, (side * 3 // 4, side, 3), np.uint8)).resize((width, height), 3),
            float,
        )
        for side in (8, 20, 60)
    ]
    return Image.fromarray(np.clip(sum(layers) / 3, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def turned(image: Image.Image, way: Image.Transpose) -> Image.Image:
    return image.transpose(way)


def recoloured(image: Image.Image) -> Image.Image:
    pale = ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(0.8)).enhance(0.5)
    return Image.fromarray(np.clip(np.asarray(pale) * [1.1, 1.0, 0.9], 0, 255).astype(np.uint8))


def shifted(image: Image.Image) -> Image.Image:
    moved = Image.new("RGB", image.size)
    moved.paste(image, (25, -18))
    return moved


CHANGES = {
    "re-encoded": lambda image: image,
    "half as large": lambda image: image.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.LANCZOS),
    "twice as large": lambda image: image.resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC),
    "flipped": lambda image: turned(image, Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: turned(image, Image.Transpose.FLIP_TOP_BOTTOM),
    "turned by 90 degrees": lambda image: turned(image, Image.Transpose.ROTATE_90),
    "transposed": lambda image: turned(image, Image.Transpose.TRANSPOSE),
    "turned by 33 degrees": lambda image: image.rotate(33),
    "cropped": lambda image: image.crop((20, 5, 308, 221)),
    "shifted": shifted,
    "recoloured": recoloured,
}


def write(folder: Path, images: dict[str, Image.Image | bytes], groups: dict[str, str], labels: dict[str, str]) -> Path:
    """A source: images and a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        if isinstance(image, bytes):
            (folder / f"{name}.jpg").write_bytes(image)
        else:
            image.save(folder / f"{name}.jpg", quality=80)
    rows = [
        {"image": f"{name}.jpg", "label": labels.get(name, "ab"[number // 2 % 2]), "lesion": groups.get(name, name)}
        for number, name in enumerate(images)
    ]
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    return folder / "images.csv"


COLUMNS = Columns("image", ("label",), ("lesion",))
OPTIONS = ["--image-column", "image", "--label-column", "label", "--group-column", "lesion"]


def audit(*words: object) -> int:
    return cli.main(["audit", *map(str, words), *OPTIONS])


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """Ten originals, and a changed copy of each under another name."""
    images: dict[str, Image.Image | bytes] = {}
    for number, (name, change) in enumerate(CHANGES.items()):
        images[f"original {name}"] = texture(number)
        images[f"copy {name}"] = change(texture(number))
    return write(tmp_path_factory.mktemp("changed"), images, {}, {})


@pytest.fixture(scope="module")
def table(changed, tmp_path_factory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("audit")
    assert audit(changed, "--out", out) == 0  # nothing is split yet, so nothing leaks
    return pd.read_csv(out / "audit.csv", dtype=str, keep_default_na=False)


def test_every_changed_copy_is_found_and_nothing_else(table):
    found = table[table["same"] == "yes"]
    pairs = {
        frozenset(name.split(" ", 1)[1] for name in ends)
        for ends in zip(found["image_id_a"], found["image_id_b"], strict=True)
    }
    assert pairs == {frozenset([name]) for name in CHANGES}
    assert len(found) == len(CHANGES)


def test_an_alignment_says_how_the_copy_was_changed(table):
    rows = table.set_index(table["image_id_a"].str.split(" ", n=1).str[1])
    back = {True: 1, False: -1}  # a pair's images stand in the order of the source: the original first

    def of(name: str) -> tuple[float, float, bool]:
        row = rows.loc[name]
        sign = back[row["image_id_a"].startswith("original")]
        return float(row["scale"]) ** sign, sign * float(row["angle"]), row["mirrored"] == "yes"

    scale, angle, mirrored = of("half as large")
    assert (scale, angle, mirrored) == (pytest.approx(160 / 300, rel=0.05), pytest.approx(0, abs=2), False)
    assert of("turned by 33 degrees")[1] == pytest.approx(-33, abs=2)  # anticlockwise on the screen
    assert of("flipped") == (pytest.approx(1, rel=0.05), pytest.approx(0, abs=2), True)
    assert rows.loc["re-encoded", "kind"] == "bytes"  # saved with the same settings


def test_a_mirrored_descriptor_is_that_of_the_mirrored_image():
    grey = np.asarray(texture(5).convert("L"))
    points, descriptors = key_points(grey)
    points_of_mirror, of_mirror = key_points(np.ascontiguousarray(grey[:, ::-1]))
    pairs = match(descriptors[:, MIRRORED], of_mirror)
    assert len(pairs) > 100
    distance = mirror(points, WIDTH)[pairs[:, 0]] - points_of_mirror[pairs[:, 1]]
    assert np.median(np.abs(distance)) < 1.5


def test_images_of_one_group_are_no_pair(tmp_path):
    images = {"a": texture(1), "b": texture(1).rotate(5), "c": texture(2), "d": texture(3)}
    source = write(tmp_path, images, {"a": "x", "b": "x"}, {})
    collection = open_collection(source, COLUMNS)
    assert find_pairs(collection, extract(collection, tmp_path / "out")) == []


def test_any_number_of_threads_finds_the_same(changed, tmp_path):
    collection = open_collection(changed, COLUMNS)
    one, three = (
        to_table(find_pairs(collection, extract(collection, tmp_path / str(n), n), n), collection, 7) for n in (1, 3)
    )
    assert one.equals(three)


def test_identical_files_and_identical_pixels_are_told_apart(tmp_path):
    held = io.BytesIO()
    texture(1).save(held, "PNG")
    source = write(tmp_path, {"a": texture(9), "b": texture(9), "c": texture(1)}, {}, {})
    (tmp_path / "d.png").write_bytes(held.getvalue())
    held = io.BytesIO()
    texture(1).save(held, "BMP")
    (tmp_path / "e.bmp").write_bytes(held.getvalue())
    rows = [{"image": f"{n}", "label": n[-1], "lesion": n} for n in ("a.jpg", "b.jpg", "d.png", "e.bmp")]
    pd.DataFrame(rows).to_csv(source, index=False)
    assert audit(source, "--out", tmp_path / "out") == 0
    found = pd.read_csv(tmp_path / "out" / "audit.csv", dtype=str, keep_default_na=False)
    assert found["kind"].tolist() == ["bytes", "pixels"]


def pack(source: Path, out: Path, *words: str) -> None:
    assert cli.main(["pack", str(source), str(out), "--size", "320x240", *OPTIONS, *words]) == 0


@pytest.fixture(scope="module")
def leaking(tmp_path_factory) -> tuple[Path, Path]:
    """A source of 24 lesions, of which one has two names, and its packed dataset, in which these are in two splits."""
    folder = tmp_path_factory.mktemp("leaking")
    images = {f"i{number:02d}": texture(number) for number in range(24)}
    source = write(folder / "source", images, {}, {f"i{number:02d}": "ab"[number % 2] for number in range(24)})
    pack(source, folder / "first")
    splits = splits_of(folder / "first")
    one = next(name for name, split in splits.items() if split == "train")
    other = next(name for name, split in splits.items() if split == "test" and int(name[1:]) % 2 == int(one[1:]) % 2)
    images[other] = texture(int(one[1:])).rotate(180)
    write(folder / "source", images, {}, {f"i{number:02d}": "ab"[number % 2] for number in range(24)})
    pack(source, folder / "packed")
    assert splits_of(folder / "packed") == splits
    return source, folder / "packed"


def splits_of(folder: Path) -> dict[str, str]:
    dataset = load(folder)
    return {name: shard.split for shard in dataset.shards for name in load_table(dataset, shard)["image_id"]}


def test_a_leak_between_splits_has_an_exit_code_of_its_own_and_is_named(leaking, capsys):
    _, packed = leaking
    assert audit(packed) == 1
    assert "1 pairs in test and train" in capsys.readouterr().out
    folder = packed.with_name("packed-audit")
    summary = json.loads((folder / "audit.json").read_bytes())
    assert (summary["pairs"], summary["leaks"], summary["images"]) == (1, 1, 24)
    assert find_audit(load(packed)) == summary
    assert "1 pairs of images of one thing in the test split" in audit_warnings(load(packed), "test")[0]
    assert audit_warnings(load(packed), "val") == []


def test_a_dataset_behind_a_url_is_audited_as_a_folder_is(leaking, tmp_path, monkeypatch):
    _, packed = leaking
    monkeypatch.chdir(tmp_path)
    with serving(packed) as server:
        assert audit(f"{server.url}/set", "--cache-dir", tmp_path / "cache") == 1
    found = json.loads((tmp_path / "set-audit" / "audit.json").read_bytes())
    assert (found["pairs"], found["leaks"], found["splits"]) == (1, 1, {"test and train": 1})


def test_an_audit_of_other_bytes_is_none(leaking, tmp_path):
    _, packed = leaking
    audit(packed)
    dataset, path = load(packed), packed.with_name("packed-audit") / "audit.json"
    assert find_audit(dataset)
    path.write_text(path.read_text().replace(dataset.fingerprint, "0" * 64))
    assert find_audit(dataset) is None
    path.write_text('{"pairs": "many"}')
    assert find_audit(dataset) is None


def test_confirmed_pairs_are_packed_as_one_group(leaking, tmp_path):
    source, packed = leaking
    audit(packed, "--out", tmp_path / "audit")
    pack(source, tmp_path / "united", "--merge-duplicates", str(tmp_path / "audit" / "audit.csv"))
    found = pd.read_csv(tmp_path / "audit" / "audit.csv", dtype=str).iloc[0]
    splits = splits_of(tmp_path / "united")
    ends = [splits.get(found[f"image_id_{end}"]) for end in "ab"]
    assert ends[0] == ends[1] or None in ends  # an evaluation split keeps one image of the group
    assert load(tmp_path / "united").description.protocol["united_pairs"] == 1
    assert audit(tmp_path / "united") == 0


def test_an_audit_continues_where_it_was_interrupted(changed, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "PER_PART", 5)
    collection, asked = open_collection(changed, COLUMNS), []

    def read(row: int) -> bytes:
        asked.append(row)
        if len(asked) == 13:
            raise KeyboardInterrupt
        return collection.read(row)

    with pytest.raises(KeyboardInterrupt):
        extract(replace(collection, read=read), tmp_path, 1)
    del asked[:-1]
    again = extract(replace(collection, read=lambda row: asked.append(row) or collection.read(row)), tmp_path, 1)
    assert sorted(asked[1:]) == list(range(10, len(collection.table)))
    whole = extract(collection, tmp_path / "anew")
    assert np.array_equal(again.descriptors, whole.descriptors)
    assert np.array_equal(again.pixels, whole.pixels)


def test_an_image_that_changed_under_its_name_is_looked_at_again(tmp_path):
    source = write(tmp_path / "source", {"a": texture(1), "b": texture(2)}, {}, {"b": "b"})
    before = extract(open_collection(source, COLUMNS), tmp_path / "out")
    texture(3).save(tmp_path / "source" / "b.jpg", quality=80)
    os.utime(tmp_path / "source" / "b.jpg", (1, 1))
    after = extract(open_collection(source, COLUMNS), tmp_path / "out")
    assert before.pixels[0] == after.pixels[0]
    assert before.pixels[1] != after.pixels[1]


def test_two_datasets_of_other_sizes_and_classes_are_compared(tmp_path):
    first = write(tmp_path / "first", {f"a{n}": texture(n) for n in range(6)}, {}, {"a0": "b"})
    images = {"b0": texture(3, 640, 480).rotate(90, expand=True), "b1": texture(50), "b2": texture(51)}
    second = write(tmp_path / "second", images, {}, {"b0": "c"})
    assert audit(first, second, "--out", tmp_path / "out") == 0
    found = pd.read_csv(tmp_path / "out" / "audit.csv", dtype=str, keep_default_na=False)
    found = found[found["same"] == "yes"]
    assert found[["image_id_a", "image_id_b"]].values.tolist() == [["a3", "b0"]]
    collection = open_collection(first, COLUMNS)
    with pytest.raises(ValueError, match="the same dataset"):
        join(collection, collection)


def test_an_audit_of_two_datasets_is_none_of_either(leaking, tmp_path):
    source, packed = leaking[0], shutil.copytree(leaking[1], tmp_path / "packed")
    assert audit(packed) == 1
    own = (packed.with_name("packed-audit") / "audit.csv").read_bytes()
    other = write(tmp_path / "clinic", {"i00": texture(0), "i01": texture(900)}, {}, {"i01": "b"})
    pack(other, tmp_path / "other", "--protocol", "test")
    audit(packed, tmp_path / "other")
    both = packed.with_name("packed-and-other-audit")
    assert set(json.loads((both / "audit.json").read_bytes())["fingerprints"]) == {str(packed), str(tmp_path / "other")}
    assert (packed.with_name("packed-audit") / "audit.csv").read_bytes() == own
    assert find_audit(load(packed))["images"] == 24
    (both / "audit.json").replace(packed.with_name("packed-audit") / "audit.json")
    assert find_audit(load(packed)) is None
    with pytest.raises(ValueError, match=r"is an audit of .*other and .*packed, whose images may have equal names"):
        merge_duplicates(read_source(source, COLUMNS), both / "audit.csv")


def test_what_a_person_corrected_stays_when_the_audit_is_made_again(leaking, tmp_path, capsys):
    packed = shutil.copytree(leaking[1], tmp_path / "packed")
    folder = packed.with_name("packed-audit")

    def rows() -> pd.DataFrame:
        return pd.read_csv(folder / "audit.csv", dtype=str, keep_default_na=False)

    def answer(place: int, word: str) -> None:
        rows().assign(same=[word if row == place else same for row, same in enumerate(rows()["same"])]).to_csv(
            folder / "audit.csv", index=False
        )

    assert audit(packed) == 1
    untouched = (folder / "audit.csv").read_bytes()
    assert audit(packed) == 1
    assert (folder / "audit.csv").read_bytes() == untouched
    assert "corrected row" not in capsys.readouterr().out
    for word, kept, code in (("", "no", 0), ("No", "no", 0), ("perhaps", "perhaps", 0), ("yes", "yes", 1)):
        answer(0, word)
        assert audit(packed) == code
        assert rows()["same"][0] == kept
        assert ("1 corrected row(s)" in capsys.readouterr().out) == (word != "yes")
    answer(0, "no")
    lines = (folder / "audit.csv").read_text().replace(rows()["image_id_a"][0], "gone")
    (folder / "audit.csv").write_text(lines)
    assert audit(packed) == 1
    assert (folder / "audit.csv.before").read_text() == lines
    assert "has 1 corrected row(s) that are found no more; it is audit.csv.before now" in capsys.readouterr().out
    (folder / "audit.csv").write_text("what is this")
    assert audit(packed) == 1
    assert (folder / "audit.csv.before-2").read_text() == "what is this"
    assert (folder / "audit.csv").read_bytes() == untouched


def test_another_threshold_is_no_correction(changed, tmp_path):
    audit(changed, "--out", tmp_path / "out", "--threshold", "1000")
    few = pd.read_csv(tmp_path / "out" / "audit.csv", dtype=str, keep_default_na=False)["same"]
    audit(changed, "--out", tmp_path / "out")
    many = pd.read_csv(tmp_path / "out" / "audit.csv", dtype=str, keep_default_na=False)["same"]
    audit(changed, "--out", tmp_path / "anew")
    assert (few == "yes").sum() < (many == "yes").sum()
    assert (tmp_path / "out" / "audit.csv").read_bytes() == (tmp_path / "anew" / "audit.csv").read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:3000], lambda data: data[:-900] + b"x" + data[-899:], lambda data: b""]
)
def test_damaged_key_points_are_computed_again_and_old_ones_removed(tmp_path, damage):
    source = write(tmp_path / "source", {"a": texture(1), "b": texture(2)}, {}, {"b": "b"})
    before = extract(open_collection(source, COLUMNS), tmp_path / "out")
    (part,) = (tmp_path / "out").glob("*.npz")
    part.write_bytes(damage(part.read_bytes()))
    np.savez(tmp_path / "out" / "older.npz", counts=np.zeros(2))
    after = extract(open_collection(source, COLUMNS), tmp_path / "out")
    assert np.array_equal(before.descriptors, after.descriptors)
    assert list((tmp_path / "out").glob("*.npz")) == [part]
    np.savez(part, counts=np.zeros(2))
    assert np.array_equal(extract(open_collection(source, COLUMNS), tmp_path / "out").descriptors, before.descriptors)


def test_an_audit_that_cannot_be_written_says_so(leaking, capsys):
    _, packed = leaking
    assert audit(packed, "--out", packed / "dataset.json") == 1
    assert "cannot be made" in (said := capsys.readouterr().err)
    assert "--out" in said


def test_images_of_one_colour_and_damaged_ones_are_named_and_never_a_pair(tmp_path, capsys):
    black = Image.new("RGB", (WIDTH, HEIGHT))
    images = {"a": texture(1), "black 1": black, "black 2": black, "torn": b"\xff\xd8\xff torn"}
    source = write(tmp_path / "source", images, {}, {})
    assert audit(source, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "black 1 is of one colour" in said
    assert "torn" in said
    assert len(pd.read_csv(tmp_path / "out" / "audit.csv")) == 0
    assert json.loads((tmp_path / "out" / "audit.json").read_bytes())["pairs"] == 0


def test_no_text_of_a_source_gets_into_the_page_unescaped(tmp_path):
    name = "<script>alert(1)<"
    source = write(tmp_path / "source", {"a": texture(1), "b": texture(1).rotate(9)}, {"a": name}, {"b": "b"})
    assert audit(source, "--out", tmp_path / "out") == 0
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", "")  # it needs no network


@pytest.fixture
def catalogue(tmp_path):
    labels = {"a": "mel", "b": "mel", "c": "nv", "d": "nv", "e": "nv"}
    return read_source(write(tmp_path / "source", {name: texture(1) for name in labels}, {}, labels), COLUMNS)


def merge_table(path: Path, *rows: tuple[str, str, str]) -> Path:
    pd.DataFrame(rows, columns=["same", "image_id_a", "image_id_b"]).to_csv(path, index=False)
    return path


def test_united_groups_are_those_connected_by_pairs_that_say_yes(catalogue, tmp_path):
    path = merge_table(tmp_path / "m.csv", ("yes", "c", "d"), ("Y", "d", "e"), ("no", "a", "b"), ("", "a", "c"))
    merged, united = merge_duplicates(catalogue, path)
    groups = merged.images.set_index("image_id")["group"]
    assert groups["c"] == groups["d"] == groups["e"]
    assert len(set(groups)) == 3
    assert united == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("yes", "a", "z")], "names z, which .* does not have"),
        ([("yes", "a", "c")], r"two labels.*a \(mel\) and c \(nv\).*--allow-mixed-labels"),
        ([("maybe", "a", "b")], "must say yes or no, or nothing. Found also: maybe"),
    ],
)
def test_a_merge_table_that_does_not_fit_is_refused(catalogue, tmp_path, rows, words):
    with pytest.raises(ValueError, match=words):
        merge_duplicates(catalogue, merge_table(tmp_path / "m.csv", *rows))


def test_pairs_with_two_labels_may_be_allowed(catalogue, tmp_path):
    path = merge_table(tmp_path / "m.csv", ("yes", "a", "c"))
    merged, _ = merge_duplicates(catalogue, path, allow_mixed_labels=True)
    assert merged.mixed_groups
    assert merged.images.set_index("image_id")["group"]["c"] == "a"


def test_a_table_that_is_no_audit_is_refused(catalogue, tmp_path):
    (tmp_path / "m.csv").write_text("one,other\na,b\n")
    with pytest.raises(ValueError, match="no column same"):
        merge_duplicates(catalogue, tmp_path / "m.csv")
