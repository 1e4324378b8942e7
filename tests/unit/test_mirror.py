"""Checkpoints that are saved on one disk and copied to another survive the loss of either."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from harness.run import checkpoint
from harness.run.checkpoint import Origin
from harness.run.mirror import Copies
from harness.run.progress import Progress
from support.processes import assert_equal_weights, launch, state, weights

ORIGIN = Origin("m", ("a", "b"), "d", np.array([1], dtype=np.uint64), "o")


@pytest.fixture
def places(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run", tmp_path / "local"


def save(copies: Copies, step: int, best_step: int = 0) -> None:
    torch.manual_seed(step)
    model = nn.Linear(2, 2)
    progress = Progress(step=step, best_step=best_step)
    copies.finish()
    if best_step == step:
        checkpoint.save_best(copies.place(), progress, ORIGIN, model)
    checkpoint.save_step(copies.place(), progress, ORIGIN, model, torch.optim.SGD(model.parameters()), None, 2)
    copies.begin()


def names(place) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_the_run_folder_gets_what_was_saved_and_loses_what_was_removed(places):
    run, local = places
    with Copies(run, str(local)) as copies:
        for step in (1, 2, 3):
            save(copies, step, best_step=1)
        copies.finish()
        assert names(copies.place()) == names(run) == ["best-00000001", "step-00000002", "step-00000003"]
    assert checkpoint.newest(run).progress.step == 3


def test_without_a_local_folder_the_run_folder_is_the_place(places):
    run, _ = places
    with Copies(run, "") as copies:
        copies.reconcile()
        save(copies, 1)
        assert copies.place() == run
        assert names(run) == ["step-00000001"]


def test_a_new_machine_continues_from_the_run_folder(places):
    run, local = places
    with Copies(run, str(local)) as copies:
        save(copies, 1, best_step=1)
    shutil.rmtree(local)
    with Copies(run, str(local)) as copies:
        copies.reconcile()
        assert names(copies.place()) == ["best-00000001", "step-00000001"]


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_copy_that_is_not_whole_is_made_again(places, damage):
    run, local = places
    with Copies(run, str(local)) as copies:
        save(copies, 1)
        save(copies, 2)
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "lost":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(data if damage == "flipped" else data[:-9])
    with Copies(run, str(local)) as copies:
        copies.reconcile()
    assert checkpoint.newest(run, pytest.fail).progress.step == 2


def test_the_local_folder_of_another_run_is_not_taken_for_this_ones(places, tmp_path):
    run, local = places
    with Copies(run, str(local)) as copies:
        save(copies, 5)
    other = tmp_path / "other"
    other.mkdir()
    with Copies(other, str(local)) as copies:
        copies.reconcile()
        assert not (copies.place() / "checkpoints").exists()
    assert checkpoint.newest(other) is None


def test_a_copy_that_cannot_be_made_is_said_before_the_next_is_saved(places):
    run, local = places
    with Copies(run, str(local)) as copies:
        save(copies, 1)
        copies.finish()
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("in the way")
        copies.begin()
        with pytest.raises(OSError, match=r"Cannot copy checkpoints to .*They are whole in"):
            copies.finish()


@pytest.mark.slow
def test_a_run_whose_machine_is_lost_ends_with_the_same_bits(finished_run, tmp_path):
    config, run = finished_run.parent / "tiny.yaml", tmp_path / "run"
    words = ["--config", config, "--run.folder", run, "--run.checkpoint_dir", tmp_path / "local"]
    assert launch("driven", *words, disturb="stop@7").returncode == 75
    shutil.rmtree(tmp_path / "local")
    done = launch("train", *words)
    assert done.returncode == 0, done.stderr
    assert state(run)["status"] == "finished"
    assert_equal_weights(weights(run), weights(finished_run))
    assert (run / "metrics.json").read_bytes() == (finished_run / "metrics.json").read_bytes()
