"""A score can only come from lesions that were not trained on, or it says so."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from harness.config import load_config
from launch import preview as show
from shards import cli
from shards import pack as packing
from shards.grouping import Split
from shards.groups import group_hashes, load_groups
from shards.ham10000 import read_ham10000
from shards.index import load, load_table
from shards.leaks import refuse_leak
from shards.split import split_by_lesion
from support.processes import launch


def pack_small(source, out, *words) -> Path:
    assert cli.main(["pack", str(source), str(out), "--size", "48x36", *words]) == 0
    return out


def test_the_recorded_groups_are_the_tables(dataset):
    for name in ("train", "val", "test"):
        table = pd.concat(load_table(dataset, shard) for shard in dataset.split(name))
        assert load_groups(dataset, name).tolist() == group_hashes(table["group"]).tolist()
        assert len(load_groups(dataset, name)) == table["group"].nunique()


@pytest.fixture
def leaking(source, tmp_path, monkeypatch) -> Path:
    """Shards in which a training lesion validates, without a word of it: no protocol of ours makes such."""
    catalogue = read_ham10000(source)
    split = split_by_lesion(catalogue.images)
    rows = split.rows | {"val": split.rows["train"][:9]}
    left_out = dict.fromkeys(split.rows["val"].tolist(), "test") | split.left_out
    monkeypatch.setattr(packing, "check_split", lambda images, split: None)
    packed = Split(split.protocol, rows, left_out)
    packing.pack(catalogue, packed, tmp_path / "leaking", packing.Packing(size=(48, 36)), quiet=True)
    return tmp_path / "leaking"


def test_training_refuses_shards_whose_training_lesions_are_evaluated(leaking, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"training lesions are also in the val split"):
        refuse_leak(load(leaking))
    done = launch("train", "--config", tiny, "--data.path", leaking)
    assert done.returncode == 1
    assert "would leak" in done.stderr
    assert "--protocol lesion" in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_on_leaking_shards_on_purpose_is_marked(leaking, tiny, tmp_path):
    done = launch("train", "--config", tiny, "--data.path", leaking, "--data.allow_leak", "true", "--run.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8").split("allow_leak:")[1].split()[0])
        is True
    )


def test_training_on_a_study_split_warns_and_the_warning_reaches_the_metrics(source, tiny, tmp_path):
    packed = pack_small(source, tmp_path / "leaky", "--protocol", "notebook-leaky")
    done = launch("train", "--config", tiny, "--data.path", packed, "--run.epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "warning: every validation image is a training image" in done.stdout
    warnings = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["warnings"]
    assert any("every validation image" in warning for warning in warnings)
    assert any(re.search(r"\d+ of \d+ lesions of the \w+ split were trained on", warning) for warning in warnings)


@pytest.mark.slow
def test_evaluating_on_trained_lesions_is_refused_or_marked(finished_run, source, tmp_path):
    other = pack_small(source, tmp_path / "other", "--seed", "5")  # the same lesions, split in another way
    words = [finished_run, "--data", other, "--out", tmp_path / "out"]
    done = launch("evaluate", *words)
    assert done.returncode == 1
    assert "were trained on" in done.stderr
    assert "--allow-leak" in done.stderr
    assert not (tmp_path / "out").exists()
    done = launch("evaluate", *words, "--allow-leak")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert "were trained on: the scores are too high" in " ".join(metrics["warnings"])
    assert metrics["dataset"] == load(other).fingerprint != metrics["trained_on"]
    assert "warning:" in done.stdout


def test_nothing_is_chosen_on_validation_images_that_are_evaluated_packed_anew(finished_run, source, tmp_path):
    """The same photos at another size: other shards, and the images that temperature and thresholds come from."""
    other = pack_small(source, tmp_path / "other", "--size", "64x48")
    done = launch(
        "evaluate", finished_run, "--data", other, "--split", "val", "--out", tmp_path / "out", "--allow-leak"
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert "calibration" not in metrics
    assert not metrics["operating_points"]
    assert "are also in the validation split that they are chosen on" in " ".join(metrics["warnings"])


def test_an_outside_set_is_evaluated_whole_and_never_trained_on(finished_run, tiny, tmp_path):
    assert cli.main(["demo", str(tmp_path / "drawn"), "--images", "42", "--seed", "9"]) == 0
    table = pd.read_csv(tmp_path / "drawn" / "HAM10000_metadata.csv").astype({"lesion_id": str})
    table.assign(lesion_id="other-" + table["lesion_id"]).to_csv(
        tmp_path / "drawn" / "HAM10000_metadata.csv", index=False
    )
    other = pack_small(tmp_path / "drawn", tmp_path / "other", "--protocol", "test")
    run = shutil.copytree(finished_run, tmp_path / "copy")
    done = launch("evaluate", run, "--data", other, "--views", "none")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(next(run.glob("evaluation-test-none-other-*/metrics.json")).read_text(encoding="utf-8"))
    assert metrics["center"]["images"] == len(table)  # also where a lesion has several
    assert metrics["warnings"] == []
    assert "calibration" in metrics
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(load_config(run / "config.yaml").data.path), "/gone"))
    done = launch("evaluate", run, "--data", other, "--views", "none", "--out", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "without" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["warnings"][0].startswith("no temperature and no thresholds: the validation split")
    assert "warning: no temperature" in done.stdout
    refused = launch("train", "--config", tiny, "--data.path", other)
    assert refused.returncode == 1
    assert "has no split 'train'. It has: test" in refused.stderr


def test_the_runs_own_test_split_is_no_leak(finished_run):
    assert json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))["warnings"] == []


def test_augmented_training_images_are_drawn_one_row_a_class(tiny, tmp_path, capsys):
    assert show.main(["--config", str(tiny), "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").height > 7 * 96
    assert show.main(["--config", str(tiny), "--data.path", "nowhere"]) == 1
    assert "No packed dataset" in capsys.readouterr().err
