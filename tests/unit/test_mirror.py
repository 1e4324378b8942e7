"""Checkpoints that are saved on one disk and copied to another survive the loss of either."""

import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from harness.run import checkpoint, recovery
from harness.run.mirror import CheckpointMirror, _mirror
from harness.run.progress import Progress
from harness.run.provenance import Provenance
from support.processes import assert_equal_weights, launch, state, weights

ORIGIN = Provenance("m", ("a", "b"), "d", np.array([1], dtype=np.uint64), "o")


class Killed(BaseException):
    """The end of the process: nothing tidies up after it."""


@pytest.fixture
def places(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run", tmp_path / "local"


def save(mirror: CheckpointMirror, step: int, best_step: int = 0) -> None:
    torch.manual_seed(step)
    model = nn.Linear(2, 2)
    progress = Progress(step=step, best_step=best_step)
    mirror.wait()
    if best_step == step:
        checkpoint.save_best(mirror.directory(), progress, ORIGIN, model)
    checkpoint.save_step(mirror.directory(), progress, ORIGIN, model, torch.optim.SGD(model.parameters()), None, 2)
    mirror.start()


def names(place) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_the_run_folder_gets_what_was_saved_and_loses_what_was_removed(places):
    run, local = places
    with CheckpointMirror(run, str(local)) as mirror:
        for step in (1, 2, 3):
            save(mirror, step, best_step=1)
        mirror.wait()
        assert names(mirror.directory()) == names(run) == ["best-00000001", "step-00000002", "step-00000003"]
    assert recovery.latest_valid(run).progress.step == 3


def test_without_a_local_folder_the_run_folder_is_the_place(places):
    run, _ = places
    with CheckpointMirror(run, "") as mirror:
        mirror.sync_on_start()
        save(mirror, 1)
        assert mirror.directory() == run
        assert names(run) == ["step-00000001"]


def test_a_new_machine_continues_from_the_run_folder(places):
    run, local = places
    with CheckpointMirror(run, str(local)) as mirror:
        save(mirror, 1, best_step=1)
    shutil.rmtree(local)
    with CheckpointMirror(run, str(local)) as mirror:
        mirror.sync_on_start()
        assert names(mirror.directory()) == ["best-00000001", "step-00000001"]


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped"])
def test_a_copy_that_is_not_whole_is_made_again(places, damage):
    run, local = places
    with CheckpointMirror(run, str(local)) as mirror:
        save(mirror, 1)
        save(mirror, 2)
    file = run / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if damage == "lost":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(data if damage == "flipped" else data[:-9])
    with CheckpointMirror(run, str(local)) as mirror:
        mirror.sync_on_start()
    assert recovery.latest_valid(run).progress.step == 2


@pytest.mark.parametrize("n", range(6))
def test_a_copy_that_is_replaced_is_never_missing(places, monkeypatch, n):
    """Killed at the n-th rename or removal, with the machine and its local folder: the run folder has a whole copy."""
    run, local = places
    with CheckpointMirror(run, str(local)) as mirror:
        save(mirror, 1, best_step=1)
        place = mirror.directory()
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
    with CheckpointMirror(run, str(local)) as mirror:
        save(mirror, 5)
    other = tmp_path / "other"
    other.mkdir()
    with CheckpointMirror(other, str(local)) as mirror:
        mirror.sync_on_start()
        assert not (mirror.directory() / "checkpoints").exists()
    assert recovery.latest_valid(other) is None


def test_a_copy_that_cannot_be_made_is_said_before_the_next_is_saved(places):
    run, local = places
    with CheckpointMirror(run, str(local)) as mirror:
        save(mirror, 1)
        mirror.wait()
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("in the way")
        mirror.start()
        with pytest.raises(OSError, match=r"Cannot copy checkpoints to .*They are whole in"):
            mirror.wait()


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
