"""Several real processes: the same samples, a finished run, and the same scores from the same weights."""

import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.catalogue import Catalogue
from shards.files import sha256
from shards.ham10000 import read_ham10000
from shards.index import load
from shards.pack import Packing, pack
from shards.split import split_by_lesion
from support.processes import ROOT, SAVING, command, environment, fork, free_port, launch, weights


@pytest.fixture(scope="module")
def two_ranks(finished_run, tmp_path_factory):
    """The run of `finished_run`, on two processes."""
    run = tmp_path_factory.mktemp("ranks") / "run"
    words = command("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run, ranks=2)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)  # torchrun
    assert done.returncode == 0, done.stderr
    return run


def test_two_ranks_finish_and_print_as_one(two_ranks):
    assert json.loads((two_ranks / "state.json").read_text())["status"] == "finished"


def test_two_ranks_see_the_samples_of_one_at_the_same_steps(finished_run, two_ranks):
    logs = [map(json.loads, (run / "log.jsonl").read_text().splitlines()) for run in (finished_run, two_ranks)]
    alone, group_size = ([(e["step"], e["samples"]) for e in log if e["kind"] == "train"] for log in logs)
    assert alone == group_size
    assert len({samples for _, samples in alone}) == len(alone) > 5


@pytest.mark.parametrize(("ranks", "views"), [(2, "flips"), pytest.param(3, "spins:2", marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_bytes_of_results_from_the_same_weights(
    finished_run, tmp_path, ranks, views
):
    outs = []
    for number in (1, ranks):
        outs.append(tmp_path / str(number))
        done = launch("evaluate", finished_run, "--views", views, "--out", outs[-1], ranks=number)
        assert done.returncode == 0, done.stderr
    for name in ("predictions.csv", "metrics.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_evaluating_again_gives_the_runs_own_results(finished_run, tmp_path):
    done = launch("evaluate", finished_run, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == (finished_run / "predictions.csv").read_bytes()


@pytest.mark.slow
def test_statistics_of_batch_normalisation_are_those_of_all_ranks(finished_run, tmp_path):
    """With weights that stand still, the first layer's running mean follows from the images alone."""
    still, found = ("--optim.lr", "0", "--run.epochs", "1", "--data.global_batch_size", "12"), {}
    for ranks in (1, 2, 3):
        run = tmp_path / str(ranks)
        done = launch("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run, *still, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = weights(run)["conv1.1.running_mean"]
    torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[3], found[1], rtol=1e-4, atol=1e-6)


def repacked(source, folder, classes: tuple[str, ...]):
    """The images of these classes again, numbered in this order."""
    images = read_ham10000(source).images
    images = images[images["label"].isin(classes)].reset_index(drop=True)
    pack(Catalogue(images, classes, "other"), split_by_lesion(images), folder, Packing(size=(48, 36)), quiet=True)
    return folder


def test_classes_are_told_apart_by_name_in_whatever_order(finished_run, source, tmp_path):
    folder = repacked(source, tmp_path / "data", ("nv", "mel", "vasc", "df", "bkl", "akiec", "bcc"))
    done = launch("evaluate", finished_run, "--data", folder, "--out", tmp_path / "out", "--allow-leak")
    assert done.returncode == 0, done.stderr
    own, again = (pd.read_csv(out / "predictions.csv") for out in (finished_run, tmp_path / "out"))
    own, again = (rows.drop(columns="key").set_index("image_id").sort_index() for rows in (own, again))
    pd.testing.assert_frame_equal(own, again, rtol=1e-5)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["tta"]["per_class"]) == ["mel", "nv", "bcc", "akiec", "bkl", "df", "vasc"]  # the model's


def test_an_outside_set_may_have_some_of_the_classes_and_the_result_says_so(finished_run, source, tmp_path):
    folder = repacked(source, tmp_path / "data", ("nv", "mel"))
    before = (finished_run / "metrics.json").read_bytes()
    done = launch("evaluate", finished_run, "--data", folder, "--views", "spins:2", "--allow-leak")
    assert done.returncode == 0, done.stderr
    assert "has 2 of the model's 7 classes" in done.stdout
    out = finished_run / f"evaluation-test-spins2-data-{load(folder).fingerprint[:6]}"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["tta"]["per_class"]["bcc"]["recall"] is None  # not defined, not zero
    assert metrics["per_view"]["images"] == 2 * metrics["tta"]["images"]
    assert (finished_run / "metrics.json").read_bytes() == before
    shutil.rmtree(out)


def test_weights_are_evaluated_at_another_size_beside_the_runs_own_results(finished_run):
    done = launch("evaluate", finished_run, "--image-size", "36", "--prior-correction", "false", "--views", "none")
    assert done.returncode == 0, done.stderr
    out = finished_run / "evaluation-test-none-36px-prior-false"
    own, found = (json.loads((folder / "metrics.json").read_text()) for folder in (finished_run, out))
    assert (own["image_size"], found["image_size"]) == (32, 36)
    assert "prior_corrected" not in found
    assert found["tta"]["loss"] != own["tta"]["loss"]
    shutil.rmtree(out)
    refused = launch("evaluate", finished_run, "--image-size", "8")
    assert refused.returncode == 1
    assert "'eval.image_size' setting must be 0 or at least 16" in refused.stderr


def test_an_outside_set_with_unknown_classes_is_refused_by_their_names(finished_run, source, tmp_path):
    images = read_ham10000(source).images
    images["label"] = images["label"].replace({"df": "wart"})
    classes = tuple(sorted(set(images["label"])))
    pack(
        Catalogue(images, classes, "other"),
        split_by_lesion(images),
        tmp_path / "data",
        Packing(size=(48, 36)),
        quiet=True,
    )
    done = launch("evaluate", finished_run, "--data", tmp_path / "data")
    assert done.returncode == 1
    assert "does not know: wart" in done.stderr


def test_results_that_a_rank_lost_or_doubled_are_an_error(dataset, finished_run):
    from harness.evaluation.predict import find_incomplete
    from shards.reader import SplitReader

    reader = SplitReader(dataset, "test")
    keys = torch.tensor(pd.read_csv(finished_run / "predictions.csv")["key"].to_numpy())
    assert find_incomplete(keys, reader) is None
    assert "lost 1 samples" in find_incomplete(keys[1:], reader)
    assert "1 twice" in find_incomplete(torch.cat([keys[:1], keys]), reader)


def test_a_run_of_two_ranks_killed_and_continued_on_one_goes_on(finished_run, two_ranks, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "run")
    steps = sorted((run / "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])  # back to the end of the second epoch
    (run / "state.json").unlink()
    done = launch("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert "epoch   3/3" in done.stdout
    assert "epoch   2/3" not in done.stdout
    newest = load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in newest.values())


@pytest.fixture(scope="module")
def stopped(finished_run, tmp_path_factory):
    """A folder with a run, stopped at step 3, and the same in its subfolder `elsewhere`."""
    folder = tmp_path_factory.mktemp("stopped")
    words = ["--config", finished_run.parent / "tiny.yaml", *SAVING, "--run.folder", folder / "run"]
    assert launch("driven", *words, disturb="stop@3").returncode == 75
    shutil.copytree(folder / "run", folder / "elsewhere" / "run")
    return folder


def lose(newest) -> str:
    shutil.rmtree(newest)
    return r"rank 1 \(.*, process \d+\) sees none"


def train_differently(newest) -> str:
    tensors = load_file(newest / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, newest / "model.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["model.safetensors"] = sha256(newest / "model.safetensors")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    return r"rank 1 \(.*, process \d+\) sees another"


def flip(newest) -> str:
    data = bytearray((newest / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(data)
    return r"rank 1 \(.*, process \d+\) failed: ValueError: .*optimizer.pt is not what was written"


@pytest.mark.slow
@pytest.mark.parametrize("change", [lose, train_differently, flip])
def test_a_rank_that_sees_another_copy_of_the_checkpoint_is_named_and_none_trains_on(
    finished_run, stopped, tmp_path, change
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    word = change(tmp_path / "elsewhere" / "run" / "checkpoints" / "step-00000003")
    words = [*SAVING, "--config", finished_run.parent / "tiny.yaml", "--run.folder", "run"]
    done = launch("driven", *words, ranks=2, disturb="elsewhere@0:1", timeout=90, folder=tmp_path)
    assert done.returncode == 1
    assert re.search(word, done.stderr), done.stderr
    assert "step-00000003" in done.stderr
    assert json.loads((tmp_path / "run" / "state.json").read_text())["step"] == 3


@pytest.mark.slow
def test_more_ranks_than_images_in_a_batch_is_an_error_with_the_numbers(tiny):
    done = launch("train", "--config", tiny, "--data.global_batch_size", "2", ranks=3)
    assert done.returncode == 1
    assert done.stderr.count("2 images for 3 processes") == 1  # said once, not by each rank


def test_an_error_of_rank_0_ends_all_ranks_with_its_sentence(finished_run):
    words = ["--config", finished_run.parent / "tiny.yaml", "--optim.lr", "0.5"]
    done = launch("train", *words, ranks=2, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("optim.lr: 0.001 is now 0.5") == 1


def test_a_loss_that_is_no_number_names_its_cause_whichever_rank_is_first(tiny, tmp_path):
    done = launch("train", "--config", tiny, "--optim.lr", "1e30", "--optim.name", "sgd", ranks=2, timeout=60)
    assert done.returncode == 1
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "failed"
    assert "FloatingPointError" in state["error"]


def test_rows_of_uneven_number_come_to_rank_0_alone_bit_by_bit_in_pieces_of_any_size(tmp_path):
    shared = environment(MASTER_ADDR="localhost", MASTER_PORT=free_port(), PYTHONPATH=str(ROOT), WORLD_SIZE="3")
    program = [str(ROOT / "tests" / "support" / "gathering.py"), str(tmp_path / "out")]
    done = fork(program, [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "012"], 60, ROOT)
    assert done.returncode == 0, done.stderr
    first, *others = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in range(3))
    assert first == [[list(range(-1, 41)), True]] * 3
    assert others == [[[[], True]] * 3] * 2


def test_ranks_leave_whatever_the_groups_own_threads_are_at():
    """Without the pin, torch 2.7 hangs here within a second; if the interpreter were taken down, torch would abort (code -6)."""
    shared = environment(MASTER_PORT=free_port(), PYTHONPATH=str(ROOT))
    program = [str(ROOT / "tests" / "support" / "leaving.py")]
    done = fork(program, [shared | {"RANK": rank} for rank in "01"], 30, ROOT)
    assert done.returncode == 0, done.stderr
