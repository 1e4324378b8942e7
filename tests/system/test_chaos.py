"""A run that is killed at any moment, damaged between its starts, or out of disk space ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.processes import (
    SAVING,
    Begun,
    assert_equal_weights,
    bare_ranks,
    command,
    deterministic_log,
    launch,
    state,
    weights,
)
from support.processes import wait_for_step as wait

pytestmark = pytest.mark.chaos
KILLS = 14
LONG = ("--run.epochs", "8", "--run.patience", "8")


def assert_undisturbed(run, undisturbed) -> None:
    """Weights, results and the log are those of a run that nothing happened to, and no step stands twice."""
    assert state(run)["status"] == "finished"
    for kind in ("step-", "best-"):
        assert_equal_weights(weights(run, kind), weights(undisturbed, kind))
    for name in ("metrics.json", "predictions.csv"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert deterministic_log(run) == deterministic_log(undisturbed)
    steps = [entry["step"] for entry in deterministic_log(run) if entry["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == steps


@pytest.fixture(scope="module")
def config(finished_run):
    return finished_run.parent / "tiny.yaml"


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    for process in bare_ranks(config, run, "", *LONG):
        assert process.wait(timeout=120) == 0, process.stderr.read()
    return run


def test_a_run_of_two_ranks_that_is_killed_at_random_moments_ends_with_the_same_bits(
    config, undisturbed, tmp_path, capsys
):
    run, chance, kills = tmp_path / "run", random.Random(7), {"starting": 0, "training": 0, "saving": 0}
    torn = 0  # saves that were cut in the middle
    while sum(kills.values()) < KILLS:
        kind = chance.choice(["starting", "training", "training", "saving", "saving"])
        ranks = bare_ranks(config, run, "slow@1", *LONG)
        wait_for_moment(kind, run, ranks, chance)
        assert all(rank.poll() is None for rank in ranks), ranks[0].stderr.read() + ranks[1].stderr.read()
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.communicate()
        kills[kind] += 1
        torn += any((run / "checkpoints").glob(".*.tmp"))
    before = state(run)["step"]
    ranks = bare_ranks(config, run, "", *LONG)
    for rank in ranks:
        assert rank.wait(timeout=120) == 0, rank.stderr.read()
    with capsys.disabled():
        print(f"\n{sum(kills.values())} kills by step {before} ({kills}; {torn} inside a save): nothing lost")
    assert torn >= 1
    assert_undisturbed(run, undisturbed)


def wait_for_moment(kind: str, run, ranks, chance: random.Random) -> None:
    """Until the moment to kill: any while starting; some steps into training; in the middle of a save."""
    if kind == "starting":
        time.sleep(chance.uniform(0, 3))
        return
    before = state(run).get("step", -1)
    wait(ranks[0], run, before + 1)
    if kind == "training":
        time.sleep(chance.uniform(0, 0.7))
        return
    while not any((run / "checkpoints").glob(".step*.tmp")):
        assert ranks[0].poll() is None, ranks[0].stderr.read()
    time.sleep(chance.uniform(0, 0.01))


def latest_valid(run, kind: str = "step-"):
    return max((run / "checkpoints").glob(f"{kind}*"))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# What is damaged while the run is down, and the word that the next start has for it.
DAMAGES = [
    (lambda run: cut(latest_valid(run) / "model.safetensors"), "model.safetensors is not what was written"),
    (lambda run: flip(latest_valid(run) / "optimizer.pt"), "optimizer.pt is not what was written"),
    (lambda run: (latest_valid(run) / "progress.json").unlink(), "progress.json"),
    (lambda run: (latest_valid(run) / "manifest.json").write_text("{"), "is damaged"),
    (lambda run: shutil.rmtree(latest_valid(run)), "continuing"),
    (lambda run: cut(run / "state.json"), "continuing"),
    (lambda run: (run / "state.json").unlink(), "continuing"),
    (lambda run: cut(run / "dataset.json"), "dataset.json is damaged: written anew"),
    (lambda run: (run / "lock.json").write_text("{"), "continuing"),
    (lambda run: (run / "log.jsonl").open("a").write('{"kind": "train", "st'), "continuing"),
    (lambda run: flip(latest_valid(run, "best-") / "model.safetensors"), "made again from"),
]


def test_a_run_that_is_damaged_between_its_starts_says_so_and_ends_with_the_same_bits(
    config, tmp_path, capsys, finished_run
):
    words = ["--config", config, *SAVING, *LONG, "--run.keep_checkpoints", "40"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert launch("driven", *words, "--run.folder", undisturbed).returncode == 0
    words += ["--run.folder", run]
    assert launch("driven", *words, disturb="stop@6").returncode == 75
    for number, (damage, word) in enumerate(DAMAGES):
        damage(run)
        done = launch("driven", *words, disturb="stop@3")
        assert done.returncode == 75, (number, done.stderr)
        assert word in done.stdout, (number, done.stdout)
    done = launch("driven", *words)
    assert done.returncode == 0, done.stderr
    assert_undisturbed(run, undisturbed)


def test_damaged_settings_are_refused_with_a_word(config, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "state.json").unlink()
    (run / "config.yaml").write_text("data: {path")
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 1
    assert "config.yaml is damaged" in done.stderr
    done = launch("train", "--config", config, "--run.folder", run, "--run.on_changed_settings", "accept")
    assert done.returncode == 0, done.stderr
    said = json.loads((run / "metrics.json").read_text())["warnings"]
    assert any("those of before are damaged" in warning for warning in said)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_too_small_is_refused_before_the_start(config, small_disk):
    (small_disk / "other").write_bytes(bytes(16 * 2**20))
    done = launch("train", "--config", config, "--run.folder", small_disk / "run")
    assert done.returncode == 1
    assert "MB free, and checkpoints of shufflenet_v2_x0_5 need up to" in done.stderr
    assert not (small_disk / "run").exists()


def fill(path) -> None:
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


def test_a_disk_that_fills_up_loses_nothing_but_the_steps_since_the_last_checkpoint(config, finished_run, small_disk):
    run, filler = small_disk / "run", small_disk / "filler"
    process = Begun(command("driven", "--config", config, "--run.folder", run, *SAVING), DISTURB="slow@1")
    wait(process, run, 3)
    with pytest.raises(OSError, match="No space left"):
        fill(filler)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "No space left on device" in errors
    assert "start the same command again" in errors
    assert "Traceback" not in errors
    filler.unlink()
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert_equal_weights(weights(run), weights(finished_run))


def test_a_disk_that_is_full_in_the_evaluation_is_said_and_the_same_command_finishes(config, finished_run, small_disk):
    run = small_disk / "run"
    done = launch("driven", "--config", config, "--run.folder", run, disturb="fill-test@1")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Make room or repair the disk, then start the same command again" in done.stderr
    assert (state(run)["status"], state(run)["rank"], state(run)["step"]) == ("failed", 0, 15)
    assert "Make room" in state(run)["error"]
    assert not list(run.glob(".*.tmp"))
    (small_disk / "filler").unlink()
    done = launch("train", "--config", config, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert state(run)["status"] == "finished"
    assert (run / "metrics.json").read_bytes() == (finished_run / "metrics.json").read_bytes()


def test_a_read_only_disk_is_said(config, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = launch("train", "--config", config, "--run.folder", small_disk / "run")
    assert done.returncode == 1
    assert f"run.folder {small_disk / 'run'} cannot be written" in done.stderr
    assert "Read-only file system" in done.stderr
