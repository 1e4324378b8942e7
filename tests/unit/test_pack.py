"""Packed shards are whole, reproducible, readable by the stock library, and checked to the last bit."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import cli
from shards.ham10000 import read_ham10000
from shards.index import load, load_table, verify
from shards.pack import Packing, pack
from shards.split import split_by_lesion


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_no_group_is_in_two_splits_of_the_packed_tables(dataset):
    groups = {}
    for name in ("train", "val", "test"):
        tables = [load_table(dataset, shard) for shard in dataset.split(name)]
        groups[name] = set(pd.concat(tables)["group"])
    assert not groups["train"] & groups["val"]
    assert not groups["train"] & groups["test"]
    assert not groups["val"] & groups["test"]


def test_every_image_is_stored_once_or_listed_as_left_out(dataset, source):
    stored = pd.concat(load_table(dataset, shard) for shard in dataset.shards)
    left_out = pd.read_csv(dataset.folder / "left_out.csv")
    names = [*stored["image_id"], *left_out["image_id"]]
    assert sorted(names) == sorted(read_ham10000(source).images["image_id"])
    assert stored["key"].tolist() == list(range(len(stored)))
    assert left_out["reason"].str.contains("keeps one image a group").all()


def test_stock_webdataset_reads_the_shards(dataset):
    webdataset = pytest.importorskip("webdataset")
    shards = dataset.split("train")
    pattern = str(dataset.folder / f"train-{{000000..{len(shards) - 1:06d}}}.tar")
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    table = pd.concat(load_table(dataset, shard) for shard in shards)
    assert [int(sample["__key__"]) for sample in samples] == table["key"].tolist()
    assert [sample["cls"] for sample in samples] == table["label"].tolist()
    assert [sample["json"]["image_id"] for sample in samples] == table["image_id"].tolist()
    assert all(sample["jpg"].shape == (36, 48, 3) for sample in samples)
    assert set(samples[0]["json"]) == {"image_id", "group", "label", "class", "dx_type", "age", "sex", "localization"}


def test_the_same_input_gives_the_same_bytes_with_any_number_of_threads(source, packed, tmp_path):
    for threads in (1, 3):
        catalogue = read_ham10000(source)
        out = tmp_path / str(threads)
        pack(
            catalogue, split_by_lesion(catalogue.images), out, Packing((48, 36), shard_samples=10), threads, quiet=True
        )
        assert digests(out) == digests(packed)


def test_a_dataset_as_packed_has_no_problems(packed):
    assert verify(packed) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=st.data())
def test_verify_finds_every_flipped_bit_truncation_missing_and_extra_file(packed, tmp_path_factory, choice):
    folder = shutil.copytree(packed, tmp_path_factory.mktemp("spoiled") / "data")
    path = choice.draw(st.sampled_from(sorted(folder.iterdir())), label="file")
    data = bytearray(path.read_bytes())
    how = choice.draw(st.sampled_from(["flip", "truncate", "remove", "add"]), label="how")
    if how == "flip":
        bit = choice.draw(st.integers(0, 8 * len(data) - 1), label="bit")
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: choice.draw(st.integers(0, len(data) - 1), label="length")])
    elif how == "remove":
        path.unlink()
    else:
        path = folder / "extra.txt"
        path.write_text("", encoding="utf-8")
    problems = verify(folder)
    assert problems
    if path.name != "dataset.json":  # without it, nothing says what belongs
        assert any(path.name in problem for problem in problems)
    shutil.rmtree(folder.parent)


def test_an_output_folder_that_exists_is_refused_and_left_as_it_was(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me", encoding="utf-8")
    assert cli.main(["pack", str(source), str(tmp_path / "out")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_left_behind(source, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "source")
    victim = sorted((folder / "HAM10000_images_part_2").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:2000])
    assert cli.main(["pack", str(folder), str(tmp_path / "out")]) == 1
    assert victim.name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_killed_pack_left_is_removed_by_the_next(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "train-000000.tar").write_bytes(b"half")
    assert cli.main(["pack", str(source), str(tmp_path / "out"), "--size", "48x36"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify(tmp_path / "out") == []


def test_show_prints_the_class_table_and_that_validation_doubles_as_test(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert cli.main(["pack", str(source), out, "--protocol", "notebook", "--size", "48x36", "--fit", "squeeze"]) == 0
    capsys.readouterr()
    assert cli.main(["show", out]) == 0
    shown = capsys.readouterr().out
    assert "test is val under another name" in shown
    assert "warning: validation doubles as the test split" in shown
    assert load(out).split("test") == load(out).split("val")


def test_verify_command_names_the_file_and_fails(packed, tmp_path, capsys):
    folder = shutil.copytree(packed, tmp_path / "copy")
    data = bytearray((folder / "val-000000.tar").read_bytes())
    data[4000] ^= 1
    (folder / "val-000000.tar").write_bytes(data)
    assert cli.main(["verify", str(folder)]) == 1
    assert "val-000000.tar differs from what was packed" in capsys.readouterr().out


def test_a_dataset_of_a_newer_format_says_to_update(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8")) | {"format": 99}
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"format 99.*Update"):
        load(folder)


def as_format_1(folder):
    """Rewrite a dataset's description as the first format had it: no group name, citation or licence."""
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    old = {name: content[name] for name in content if name not in ("group_name", "citation", "license", "checksum")}
    old |= {"format": 1, "protocol": old["protocol"] | {"name": "seed"}}
    checksum = hashlib.sha256(json.dumps(old, ensure_ascii=False).encode()).hexdigest()
    text = json.dumps(old | {"checksum": checksum}, indent=1, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    return checksum


def test_a_dataset_of_format_1_is_read_and_still_verifies(packed, tmp_path, capsys):
    folder = shutil.copytree(packed, tmp_path / "old")
    checksum = as_format_1(folder)
    dataset = load(folder)
    assert verify(folder) == []
    assert dataset.fingerprint == checksum
    assert (dataset.group_name, dataset.groups_name, dataset.description.citation) == ("group", "groups", "")
    assert cli.main(["show", str(folder)]) == 0
    assert "protocol seed (" in capsys.readouterr().out


@pytest.mark.parametrize("change", [("citation", "x"), ("format", 2), ("quality", 91)])
def test_a_changed_dataset_of_format_1_is_refused(packed, tmp_path, change):
    folder = shutil.copytree(packed, tmp_path / "old")
    as_format_1(folder)
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8")) | dict([change])
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"was changed after packing|is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("one", "many"), [("lesion", "lesions"), ("patient", "patients"), ("body", "bodies"), ("series", "series")]
)
def test_groups_are_named_in_the_plural(dataset, one, many):
    assert replace(dataset, description=replace(dataset.description, group_name=one)).groups_name == many


def test_no_dataset_says_how_to_pack_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m shards pack"):
        load(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"size": (4, 4)}, {"fit": "stretch"}, {"quality": 0}, {"quality": 101}, {"shard_samples": 0}]
)
def test_packing_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Packing(**wrong)


def test_mean_colour_says_next_to_nothing_about_a_drawn_lesions_class(tmp_path):
    from PIL import Image
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    cli.main(["demo", str(tmp_path / "demo"), "--images", "700"])
    catalogue = read_ham10000(tmp_path / "demo")
    images, rows = catalogue.images, split_by_lesion(catalogue.images).rows
    colours = np.array([np.asarray(Image.open(path).reduce(10)).mean((0, 1)) for path in images["path"]])
    scaler = StandardScaler().fit(colours[rows["train"]])
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit(scaler.transform(colours[rows["train"]]), images["label"].iloc[rows["train"]])
    seen = model.predict(scaler.transform(colours[rows["test"]]))
    assert balanced_accuracy_score(images["label"].iloc[rows["test"]], seen) <= 0.4
