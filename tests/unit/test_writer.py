"""Checkpoints are of one moment though they are written later, and those on two disks survive the loss of either."""

import os
import shutil
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from harness.run import checkpoint, recovery
from harness.run.progress import Progress
from harness.run.provenance import Provenance
from harness.run.state import note_saved
from harness.run.writer import CheckpointWriter, _mirror
from support.processes import SAVING, assert_equal_weights, launch, state, weights

ORIGIN = Provenance("m", ("a", "b"), "d", np.array([1], dtype=np.uint64), "o")


class Killed(BaseException):
    """The end of the process: nothing tidies up after it."""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run", tmp_path / "local"


def save(writer: CheckpointWriter, step: int, best_step: int = 0) -> None:
    torch.manual_seed(step)
    model = nn.Linear(2, 2)
    progress = Progress(step=step, best_step=best_step)

    def write() -> None:
        if best_step == step:
            checkpoint.save_best(writer.directory(), progress, ORIGIN, model)
        checkpoint.save_step(writer.directory(), progress, ORIGIN, model, torch.optim.SGD(model.parameters()), None, 2)

    writer.start(write)


def names(place) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_the_run_folder_gets_what_was_saved_and_loses_what_was_removed(places):
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        for step in (1, 2, 3):
            save(writer, step, best_step=1)
        writer.wait()
        assert names(writer.directory()) == names(run) == ["best-00000001", "step-00000002", "step-00000003"]
    assert recovery.latest_valid(run).progress.step == 3


def test_without_a_local_folder_the_run_folder_is_the_place(places):
    run, _ = places
    with CheckpointWriter(run, "") as writer:
        writer.sync_on_start()
        save(writer, 1)
        writer.wait()
        assert writer.directory() == run
        assert names(run) == ["step-00000001"]


def test_a_new_machine_continues_from_the_run_folder(places):
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        save(writer, 1, best_step=1)
    shutil.rmtree(local)
    with CheckpointWriter(run, str(local)) as writer:
        writer.sync_on_start()
        assert names(writer.directory()) == ["best-00000001", "step-00000001"]


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_copy_that_is_not_whole_is_made_again(places, damage):
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        save(writer, 1)
        save(writer, 2)
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "lost":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(data if damage == "flipped" else data[:-9])
    with CheckpointWriter(run, str(local)) as writer:
        writer.sync_on_start()
    assert recovery.latest_valid(run).progress.step == 2


@pytest.mark.parametrize("n", range(6))
def test_a_copy_that_is_replaced_is_never_missing(places, monkeypatch, n):
    """Killed at the n-th rename or removal, with the machine and its local folder: the run folder has a whole copy."""
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        save(writer, 1, best_step=1)
        writer.wait()
        place = writer.directory()
    shutil.copytree(place, other := local / "other")
    for name in ("step-00000001", "best-00000001"):  # the same step saved again: another manifest
        path = other / "checkpoints" / name / "manifest.json"
        path.write_text(path.read_text() + "\n")
    calls = iter(range(100))

    def killed(function):
        def call(*arguments, **options):
            if next(calls) >= n:
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for module, name in ((os, "rename"), (shutil, "rmtree")):
            patched.setattr(module, name, killed(getattr(module, name)))
        with suppress(Killed):
            _mirror(other, run)
    found = recovery.latest_valid(run)
    assert found.progress.step == 1
    assert recovery.find_best(run, found.progress).progress.best_step == 1


def test_the_local_folder_of_another_run_is_not_taken_for_this_ones(places, tmp_path):
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        save(writer, 5)
    other = tmp_path / "other"
    other.mkdir()
    with CheckpointWriter(other, str(local)) as writer:
        writer.sync_on_start()
        assert not (writer.directory() / "checkpoints").exists()
    assert recovery.latest_valid(other) is None


def test_a_copy_that_cannot_be_made_is_said_before_the_next_is_saved(places):
    run, local = places
    with CheckpointWriter(run, str(local)) as writer:
        save(writer, 1)
        writer.wait()
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("in the way")
        writer.start(lambda: None)
        with pytest.raises(OSError, match=r"Cannot copy checkpoints to .*They are whole in"):
            writer.wait()


def test_a_checkpoint_that_cannot_be_written_is_said_before_the_next_one(places):
    run, _ = places
    (run / "checkpoints").write_text("in the way")
    with CheckpointWriter(run, "") as writer:
        save(writer, 1)
        with pytest.raises(OSError, match=r"Cannot save the checkpoint .*Those before it are whole"):
            save(writer, 2)
        (run / "checkpoints").unlink()
        save(writer, 3)
        writer.wait()
    assert names(run) == ["step-00000003"]


def test_a_checkpoint_is_of_the_moment_it_was_begun(places):
    """Steps are made while it is written, and the memory of its snapshots is used for the next one."""
    run, _ = places
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    go, then = threading.Event(), []

    def step() -> None:
        model(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()

    with CheckpointWriter(run, "") as writer:
        for number in (1, 2):
            step()
            progress = Progress(step=number)
            checkpoint.save_step(run / "at-once", progress, ORIGIN, model, optimizer, None, 2)
            writer.wait()
            go.clear()
            writer.snapshots = taken = checkpoint.snapshots((model, optimizer, None), writer.snapshots)
            then.append([tensor.data_ptr() for tensor in taken[0].state_dict().values()])

            def write(progress=progress, taken=taken) -> None:
                assert go.wait(20)
                checkpoint.save_step(run, progress, ORIGIN, *taken, 2)

            writer.start(write)
            step()
            go.set()
        writer.wait()
    assert then[0] == then[1]
    for number in (1, 2):
        name = f"checkpoints/step-{number:08d}"
        beside, at_once = run / name, run / "at-once" / name
        assert (beside / "optimizer.pt").read_bytes() == (at_once / "optimizer.pt").read_bytes()
        for key, tensor in load_file(at_once / "model.safetensors").items():
            assert torch.equal(load_file(beside / "model.safetensors")[key], tensor), key


def test_what_went_wrong_with_a_checkpoint_is_said_where_something_else_ends_the_run(places, caplog):
    run, _ = places
    (run / "checkpoints").write_text("in the way")
    with suppress(KeyError), CheckpointWriter(run, "") as writer:
        save(writer, 1)
        raise KeyError("a bug")
    assert "Cannot save the checkpoint" in caplog.text


def test_a_checkpoint_that_is_written_after_a_failure_leaves_word_of_it(places):
    run, _ = places
    note_saved(run, Progress(step=1))
    assert state(run)["status"] == "running"
    (run / "state.json").write_text('{"status": "failed", "step": 1, "error": "a bug"}')
    note_saved(run, Progress(step=2))
    assert (state(run)["status"], state(run)["step"], state(run)["error"]) == ("failed", 2, "a bug")


def test_training_goes_on_while_a_checkpoint_is_written(finished_run, tmp_path):
    """The checkpoint of step 2 is written only once step 3 is made, or fails."""
    words = ["--config", finished_run.parent / "tiny.yaml", *SAVING, "--run.folder", tmp_path / "run"]
    done = launch("driven", *words, disturb="late-save@2")
    assert done.returncode == 0, done.stderr
    assert state(tmp_path / "run")["status"] == "finished"
    assert_equal_weights(weights(tmp_path / "run"), weights(finished_run))


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
