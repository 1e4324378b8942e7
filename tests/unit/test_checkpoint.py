"""A checkpoint is whole or it is not used, and nothing is deleted before its successor is safe."""

import copy
import errno
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harness.run import checkpoint, recovery
from harness.run.progress import Progress
from harness.run.provenance import Provenance

ORIGIN = Provenance("m", ("a", "b"), "d", np.array([3, 7], dtype=np.uint64), "o")


class Killed(BaseException):
    """The end of the process: nothing tidies up after it."""


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def one_step(model, optimizer):
    model(torch.ones(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run, step: int, keep: int = 2, best_step: int = 0):
    model, optimizer = trained(step)
    checkpoint.save_step(run, Progress(step=step, best_step=best_step), ORIGIN, model, optimizer, None, keep)
    return model, optimizer


def names(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_continuing_from_a_checkpoint_equals_never_having_stopped(tmp_path):
    save(tmp_path, 3)
    model, optimizer = trained(0)
    found = recovery.latest_valid(tmp_path)
    assert found.progress.step == 3
    assert found.provenance.classes == ("a", "b")
    assert found.provenance.train_groups.tolist() == [3, 7]
    checkpoint.restore(found, model, optimizer, None)
    for _ in range(2):
        one_step(model, optimizer)
    undisturbed, _ = trained(5)
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_newest_are_kept_and_the_best(tmp_path):
    model, _ = trained(1)
    checkpoint.save_best(tmp_path, Progress(step=1, best_step=1), ORIGIN, model)
    for step in (1, 2, 3):
        save(tmp_path, step, best_step=1)
    assert names(tmp_path) == ["best-00000001", "step-00000002", "step-00000003"]
    checkpoint.save_best(tmp_path, Progress(step=4, best_step=4), ORIGIN, model)
    assert "best-00000001" in names(tmp_path)  # until a checkpoint points to the new one
    save(tmp_path, 4, best_step=4)  # step 3 still names the old one
    assert names(tmp_path) == ["best-00000001", "best-00000004", "step-00000003", "step-00000004"]
    save(tmp_path, 5, best_step=4)
    assert names(tmp_path) == ["best-00000004", "step-00000004", "step-00000005"]
    assert recovery.find_best(tmp_path).progress.best_step == 4


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "progress.json", "manifest.json", "train-groups.npy"]
)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, how, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "checkpoints" / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data if how == "flip" else data[:-5])
    assert recovery.latest_valid(tmp_path).progress.step == 1
    assert "step-00000002 is damaged" in caplog.messages[0]


def test_the_best_weights_that_an_older_checkpoint_names_stay_as_long_as_it_does(tmp_path):
    for step in (1, 2):
        model, _ = trained(step)
        checkpoint.save_best(tmp_path, Progress(step=step, best_step=step), ORIGIN, model)
        save(tmp_path, step, best_step=step)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"damaged")
    found = recovery.latest_valid(tmp_path)
    assert found.progress.step == 1
    assert recovery.find_best(tmp_path, found.progress).progress.step == 1


@pytest.mark.parametrize("kept", [True, False])
def test_best_weights_that_are_damaged_are_made_again_from_their_step_or_refused(tmp_path, kept, caplog):
    model, _ = trained(1)
    checkpoint.save_best(tmp_path, Progress(step=1, best_step=1), ORIGIN, model)
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3 if kept else 2, best_step=1)
    (tmp_path / "checkpoints" / "best-00000001" / "model.safetensors").write_bytes(b"damaged")
    progress = recovery.latest_valid(tmp_path).progress
    if not kept:
        with pytest.raises(ValueError, match=r"best weights .* are damaged .*Restore a copy"):
            recovery.repair_best(tmp_path, progress)
        return
    recovery.repair_best(tmp_path, progress)
    assert "made again from" in caplog.messages[0]
    again, _ = trained(0)
    checkpoint.load_model(recovery.find_best(tmp_path, progress), again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not (tmp_path / "checkpoints" / "best-00000001" / "optimizer.pt").exists()


def test_an_average_of_weights_is_saved_restored_and_the_best(tmp_path):
    model, optimizer = trained(3)
    average = copy.deepcopy(model)
    with torch.no_grad():
        average[0].weight.add_(1)
    progress = Progress(epoch=1, step=3, best=0.5, best_step=3, best_epoch=1)
    checkpoint.save_best(tmp_path, progress, ORIGIN, average)
    checkpoint.save_step(tmp_path, progress, ORIGIN, model, optimizer, None, 2, average)
    found, (other, _) = recovery.latest_valid(tmp_path), trained(1)
    again = copy.deepcopy(other)
    checkpoint.restore(found, other, optimizer, None, again)
    assert torch.equal(again[0].weight, average[0].weight)
    assert torch.equal(other[0].weight, model[0].weight)
    (tmp_path / "checkpoints" / "best-00000003" / "model.safetensors").write_bytes(b"")
    recovery.repair_best(tmp_path, progress)
    checkpoint.load_model(recovery.find_best(tmp_path), other)
    assert torch.equal(other[0].weight, average[0].weight)  # what was judged


def test_an_average_that_was_not_kept_starts_from_the_weights(tmp_path):
    model, optimizer = trained(3)
    checkpoint.save_step(tmp_path, Progress(step=3), ORIGIN, model, optimizer, None, 2)
    other, average = trained(1)[0], trained(1)[0]
    checkpoint.restore(recovery.latest_valid(tmp_path), other, optimizer, None, average)
    assert torch.equal(average[0].weight, model[0].weight)


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_whole_one(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000002" / "optimizer.pt").unlink()
    assert recovery.latest_valid(tmp_path).progress.step == 1
    model, optimizer = trained(1)
    checkpoint.save_step(tmp_path, Progress(step=1, samples_seen=5), ORIGIN, model, optimizer, None, 2)  # not yet at 2
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000007.tmp").mkdir(parents=True)
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-00000008"]


def test_when_none_is_whole_it_is_an_error_not_a_fresh_start(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"No checkpoint .* is whole"):
        recovery.latest_valid(tmp_path)


def test_what_a_crash_left_half_written_is_not_seen(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.tmp").mkdir()
    assert recovery.latest_valid(tmp_path).progress.step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("second", [1, 2])
def test_a_crash_at_any_call_leaves_a_checkpoint_to_continue_from(tmp_path, monkeypatch, second):
    """Fail at the n-th operation on the file system, for every n: the newest valid step is 1 or the second, never none."""
    for n in range(1, 40):
        run = tmp_path / str(n)
        save(run, 1)
        calls = 0

        def failing(function):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls >= n:  # noqa: B023 - used at once
                    raise Killed
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for module, name in (
                (os, "rename"),
                (os, "fsync"),
                (checkpoint.shutil, "rmtree"),
                (checkpoint, "save"),
            ):
                patched.setattr(module, name, failing(getattr(module, name)))
            try:
                save(run, second, keep=1)
                survived = True
            except Killed:
                survived = False
        assert recovery.latest_valid(run).progress.step in ((second,) if survived else (1, second))
        if survived:
            return
    raise AssertionError("never survived")


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    model, optimizer = trained(1)
    again = replace(Progress(step=1), best=0.5)
    checkpoint.save_step(tmp_path, again, ORIGIN, model, optimizer, None, 2)
    assert recovery.latest_valid(tmp_path).progress.best == 0.5


def test_a_disk_that_refuses_to_rename_leaves_the_only_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def refuse_new(old, new, rename=os.rename):
        if str(old).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse_new)
        with pytest.raises(OSError, match="Those before it are whole"):
            save(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert recovery.latest_valid(tmp_path).progress.step == 1


@pytest.mark.parametrize("left", [".step-00000001.tmp", "step-00000001.old"])
def test_a_whole_checkpoint_that_a_crash_left_under_another_name_is_used(tmp_path, left):
    save(tmp_path, 1)
    os.rename(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / left)
    (tmp_path / "checkpoints" / "step-00000001").mkdir()  # what is left of the one that was removed
    assert recovery.latest_valid(tmp_path).progress.step == 1
    assert names(tmp_path) == ["step-00000001"]


def test_a_newer_format_says_to_update(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.run.provenance.FORMAT", 99)
    save(tmp_path, 1)
    monkeypatch.setattr("harness.run.provenance.FORMAT", 1)
    with pytest.raises(ValueError, match=r"format 99.*Update"):
        recovery.latest_valid(tmp_path)


def test_no_best_weights_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="Train first"):
        recovery.find_best(tmp_path)
