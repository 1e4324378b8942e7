"""A whole run: what it leaves behind, and that neither kills nor stops nor the number of ranks change what it computes."""

import json
import os
import re
import shutil
import signal

import pandas as pd
import pytest

from harness.config import load_config
from shards.index import load, load_table
from support.processes import (
    Begun,
    assert_equal_weights,
    command,
    deterministic_log,
    launch,
    state,
    wait_for_step,
    weights,
)


def test_a_finished_run_holds_all_that_was_promised(finished_run, dataset):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        *("config.yaml", "dataset.json", "state.json", "log.jsonl", "tensorboard", "checkpoints"),
        *("metrics.json", "predictions.csv", "confusion.png", "report.html", "starts.jsonl", "images"),
        "console.log",
    }
    assert state(finished_run)["status"] == "finished"
    assert state(finished_run)["epoch"] == 3
    assert json.loads((finished_run / "dataset.json").read_text())["checksum"] == dataset.fingerprint
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert metrics["dataset"] == dataset.fingerprint
    assert metrics["protocol"]["name"] == "lesion"
    assert load_config(finished_run / "config.yaml").optim.name == "adamw"
    assert {path.name[:5] for path in (finished_run / "checkpoints").iterdir()} == {"step-", "best-"}


def test_predictions_name_every_image_of_the_split_once(finished_run, dataset):
    rows = pd.read_csv(finished_run / "predictions.csv", dtype={"group": str})
    table = pd.concat([load_table(dataset, shard) for shard in dataset.split("test")])
    assert rows["image_id"].tolist() == table["image_id"].tolist()
    assert rows["label"].tolist() == [dataset.classes[label] for label in table["label"]]
    probabilities = rows[[f"p_{name}" for name in dataset.classes]]
    assert (abs(probabilities.sum(axis=1) - 1) < 1e-5).all()
    assert (probabilities.idxmax(axis=1).str.removeprefix("p_") == rows["prediction"]).all()


def test_tensorboard_has_the_promised_scalars(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(finished_run / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/loss", "train/accuracy", "train/lr", "train/images_per_s", "val/loss", "val/accuracy"} <= set(tags)
    assert "epoch/rss_bytes" in tags


def test_each_epoch_says_what_memory_it_took(finished_run):
    epochs = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines() if '"epoch"' in line]
    assert [entry["epoch"] for entry in epochs] == [1, 2, 3]
    for entry in epochs:
        assert 10**8 < entry["rss_bytes"] < 10**11
        assert "peak_gpu_bytes" not in entry  # there is no GPU
        assert "mfu" not in entry
    assert re.search(
        r"<dt>memory</dt><dd>at most \d\.\d GB of the process</dd>", (finished_run / "report.html").read_text()
    )


@pytest.mark.slow
def test_deterministic_kernels_give_the_same_bits_and_are_said(finished_run, tmp_path):
    config, runs = finished_run.parent / "tiny.yaml", [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        done = launch("train", "--config", config, "--run.folder", run, "--run.deterministic", "true")
        assert done.returncode == 0, done.stderr
        assert "1 process on CPU, fp32 (as asked), deterministic, torch" in done.stdout
    assert_equal_weights(weights(runs[0]), weights(runs[1]))
    assert_equal_weights(weights(runs[0]), weights(finished_run))  # on a CPU nothing else changes


def test_a_finished_run_started_again_shows_its_results_and_computes_nothing(finished_run):
    before = (finished_run / "state.json").stat().st_mtime_ns, (finished_run / "metrics.json").read_bytes()
    again = launch("train", "--config", finished_run.parent / "tiny.yaml")
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    assert "balanced accuracy" in again.stdout
    assert before == ((finished_run / "state.json").stat().st_mtime_ns, (finished_run / "metrics.json").read_bytes())


def begin(config, folder, *words):
    return Begun(command("train", "--config", config, "--run.folder", folder, *words))


@pytest.mark.slow
def test_a_new_run_asked_to_stop_while_it_starts_stops_at_once_and_continues(finished_run, tmp_path, monkeypatch):
    config, run = finished_run.parent / "tiny.yaml", tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()  # as a job script does when its nodes are wanted
    monkeypatch.setenv("JOB_BEGAN", "0")
    asked = launch("train", "--config", config, "--run.folder", run)
    monkeypatch.delenv("JOB_BEGAN")
    assert asked.returncode == 75, asked.stderr
    assert (state(run)["status"], state(run)["step"]) == ("stopped", 0)
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(weights(run), weights(finished_run))
    assert (run / "metrics.json").read_bytes() == (finished_run / "metrics.json").read_bytes()


def test_a_killed_run_continues_and_ends_with_the_same_bits(finished_run, tmp_path):
    config, run = finished_run.parent / "tiny.yaml", tmp_path / "run"
    for step in (0, 1, 9):  # before the first checkpoint, at it, and later
        process = begin(config, run)
        wait_for_step(process, run, step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert state(run)["status"] == "running"
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stdout
    assert_equal_weights(weights(run), weights(finished_run))
    assert_equal_weights(weights(run, "best-"), weights(finished_run, "best-"))
    assert deterministic_log(run) == deterministic_log(finished_run)
    for name in ("metrics.json", "predictions.csv"):
        assert (run / name).read_bytes() == (finished_run / name).read_bytes()


@pytest.mark.parametrize("how", ["signal", pytest.param("file", marks=pytest.mark.slow)])
def test_a_run_stopped_in_an_epoch_exits_with_75_and_continues_with_the_same_bits(finished_run, tmp_path, how):
    config, run = finished_run.parent / "tiny.yaml", tmp_path / "run"
    process = begin(config, run, "--run.sync_every", "1")
    wait_for_step(process, run, 0)
    if how == "signal":
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)  # SLURM sends it twice
    else:
        (run / "stop").touch()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "the same command continues" in out
    assert state(run)["status"] == "stopped"
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert not (run / "stop").exists()
    assert_equal_weights(weights(run), weights(finished_run))
    assert (run / "metrics.json").read_bytes() == (finished_run / "metrics.json").read_bytes()


def test_the_run_folder_of_other_settings_is_refused_with_the_keys(finished_run):
    done = launch("train", "--config", finished_run.parent / "tiny.yaml", "--optim.lr", "0.5")
    assert done.returncode == 1
    assert "optim.lr: 0.001 is now 0.5" in done.stderr
    assert state(finished_run)["status"] == "finished"  # untouched


def test_a_folder_that_holds_something_else_is_refused(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("keep me")
    done = launch("train", "--config", tiny)
    assert done.returncode == 1
    assert "is not empty and holds no run" in done.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_start_that_was_killed_before_it_wrote_its_settings_starts_again(tiny_config, dataset, tmp_path):
    from harness.run.folder import claim_folder
    from harness.run.lock import RunLock

    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.123.tmp").write_text("half")
    with RunLock(run) as lock:
        claim_folder(run, tiny_config, dataset, lock)
    assert load_config(run / "config.yaml") == tiny_config
    (run / "dataset.json").unlink()  # killed between the two files
    with RunLock(run) as lock:
        claim_folder(run, tiny_config, dataset, lock)
    assert (run / "dataset.json").is_file()


def test_a_dataset_that_is_not_there_is_one_sentence_not_a_traceback(tiny):
    done = launch("train", "--config", tiny, "--data.path", "nowhere")
    assert done.returncode == 1
    assert "error: No packed dataset in nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_dataset_under_the_same_run_is_refused(finished_run, source, tmp_path):
    from shards.ham10000 import read_ham10000
    from shards.pack import Packing, pack
    from shards.split import split_by_lesion

    catalogue = read_ham10000(source)
    other = tmp_path / "other"
    pack(
        catalogue,
        split_by_lesion(catalogue.images, seed=9),
        other,
        Packing(size=(48, 36), shard_samples=10),
        quiet=True,
    )
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "state.json").unlink()  # as if it had been interrupted
    words = ["--config", finished_run.parent / "tiny.yaml", "--run.folder", run, "--data.path", other]
    done = launch("train", *words)
    assert done.returncode == 1
    assert f"{load(other).fingerprint[:12]}" in done.stderr
    assert "dataset of before" in done.stderr


def with_a_damaged_sample(packed, tmp_path):
    """A copy of the dataset in which the first training image is none; its key."""
    folder = shutil.copytree(packed, tmp_path / "data")
    shard = load(folder).split("train")[0]
    row = load_table(load(folder), shard).iloc[0]
    data = bytearray((folder / shard.file).read_bytes())
    data[int(row["offset"]) : int(row["offset"]) + 2] = b"no"
    (folder / shard.file).write_bytes(data)
    return folder, f"{row['key']:08d}"


def test_a_damaged_shard_fails_the_run_with_the_samples_name_and_a_word_in_its_folder(packed, tiny, tmp_path):
    folder, key = with_a_damaged_sample(packed, tmp_path)
    done = launch("train", "--config", tiny, "--data.path", folder, "--run.epochs", "5")
    assert done.returncode == 1
    assert f"sample {key}" in done.stderr
    failed = state(tmp_path / "run")
    assert failed["status"] == "failed"
    assert f"{key}" in failed["error"]
    assert "Traceback" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()


def test_a_damaged_training_sample_may_be_skipped_and_is_reported(packed, tiny, tmp_path):
    folder, key = with_a_damaged_sample(packed, tmp_path)
    words = ["--data.path", folder, "--data.on_bad_sample", "skip", "--run.epochs", "5"]
    done = launch("train", "--config", tiny, *words)
    assert done.returncode == 0, done.stderr
    assert f"skipped 1 samples that cannot be decoded, keys {key}" in done.stdout


def test_a_loss_that_is_no_number_fails_the_run(tiny, tmp_path):
    done = launch("train", "--config", tiny, "--optim.lr", "1e30", "--optim.name", "sgd")
    assert done.returncode == 1
    assert "Lower optim.lr" in done.stderr
    assert state(tmp_path / "run")["status"] == "failed"
