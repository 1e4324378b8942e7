"""The demo and the real data set, from end to end. Slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from shards import cli
from shards.index import load, load_table, verify
from support.processes import ROOT, launch, start, state

NOTEBOOK_TABLE = {
    "train": {"mel": 491, "nv": 4322, "bcc": 261, "akiec": 182, "bkl": 581, "df": 58, "vasc": 78},
    "val": {"mel": 123, "nv": 1081, "bcc": 66, "akiec": 46, "bkl": 146, "df": 15, "vasc": 20},
}


@pytest.fixture(scope="module")
def ham10000() -> Path:
    if "HAM10000_DIR" not in os.environ:
        pytest.skip("HAM10000_DIR does not name the folder of the data set")
    return Path(os.environ["HAM10000_DIR"])


@pytest.mark.slow
def test_the_demo_learns_shapes(tmp_path):
    """Mean colour gives at most 0.4 (see test_pack); the demo's ResNet50 gives at least 0.6."""
    run = Path(os.environ.get("DEMO_RUN", tmp_path / "run"))
    if not (run / "metrics.json").is_file():
        words = ["--data.path", tmp_path / "data", "--run.folder", run]
        done = launch("train", *words, timeout=600)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tta"]["balanced_accuracy"] >= 0.6
    assert metrics["tta"]["images"] == 81


@pytest.mark.slow
def test_all_of_ham10000_is_packed_without_a_shared_lesion_and_trains(ham10000, tmp_path):
    out = tmp_path / "ham10000"
    assert cli.main(["pack", str(ham10000), str(out)]) == 0
    assert verify(out) == []
    dataset = load(out)
    assert sum(shard.samples for shard in dataset.shards) + dataset.description.left_out == 10015
    lesions = [
        set(pd.concat(load_table(dataset, s) for s in dataset.split(name))["group"])
        for name in ("train", "val", "test")
    ]
    assert sum(map(len, lesions)) == len(set.union(*lesions)) == 7470
    words = ["--config", ROOT / "configs" / "ham10000.yaml", "--data.path", out, "--data.image_size", "32"]
    words += ["--model.name", "shufflenet_v2_x0_5", "--model.weights", "none", "--run.epochs", "1"]
    done = launch("train", *words, "--run.folder", tmp_path / "run", timeout=600)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tta"]["images"] == 1120


@pytest.mark.slow
def test_the_notebooks_split_has_its_counts(ham10000, tmp_path):
    words = [
        sys.executable,
        "-m",
        "shards",
        "pack",
        str(ham10000),
        str(tmp_path / "notebook"),
        "--protocol",
        "notebook",
    ]
    done = subprocess.run([*words, "--size", "280x224", "--fit", "squeeze"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "notebook").description.counts == NOTEBOOK_TABLE
    assert "test is val under another name" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_a_run_needs_no_name_that_only_linux_has(system, tiny, tmp_path):
    program = ROOT / "tests" / "support" / "elsewhere.py"
    words = [
        "--data.path",
        tmp_path / "data",
        "--data.demo_images",
        "84",
        "--run.epochs",
        "1",
        "--data.image_size",
        "64",
    ]
    process = start(
        [sys.executable, str(program), system, "--config", *map(str, [tiny, *words])], CUDA_VISIBLE_DEVICES=""
    )
    out, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "1 process on CPU" in out
    assert state(tmp_path / "run")["status"] == "finished"
