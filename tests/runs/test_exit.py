"""A process ends within 30 s of an error that nobody expected, or of Ctrl-C, whatever it was doing."""

import signal
import sys
import time

import pytest

from support.processes import command, ended, start, state

pytestmark = pytest.mark.slow
LIMIT_S = 30


@pytest.mark.parametrize(("kind", "word"), [("memory", "ran out of memory"), ("bug", "KeyError: 'a bug'")])
@pytest.mark.parametrize("launcher", [(), ("-m", "accelerate.commands.launch")], ids=["alone", "accelerate"])
def test_an_error_that_nobody_expected_ends_the_process(finished_run, tmp_path, launcher, kind, word):
    run = tmp_path / "run"
    program, *words = command("driven", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run)
    process = start([program, *launcher, *words], DISTURB=f"{kind}@3")
    while "status" not in state(run) or state(run)["status"] == "running":
        time.sleep(0.05)
    seconds, errors = ended(process, 60)
    assert process.returncode == 1
    assert word in errors
    assert state(run)["status"] == "failed"
    assert seconds < LIMIT_S


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_ends_an_evaluation(finished_run, tmp_path, signals):
    process = start(command("evaluate", finished_run, "--views", "spins:2000", "--out", tmp_path / "out"))
    process.stdout.readline()  # the world's line: all is imported
    time.sleep(3)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    seconds, errors = ended(process, 60)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert seconds < LIMIT_S
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_ctrl_c_ends_packing_and_leaves_nothing_half_done(source, tmp_path):
    out = tmp_path / "out"
    process = start([sys.executable, "-m", "shards", "pack", str(source), str(out), "--size", "1600x1200"])
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    seconds, errors = ended(process, 60)
    assert (process.returncode, seconds < LIMIT_S) == (128 + signal.SIGINT, True), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", ["launch/train.py", "launch/evaluate.py", "-mshards"])
@pytest.mark.parametrize("moment", [0.05, 0.3, 1.0, 2.0])
def test_ctrl_c_ends_a_process_that_is_still_starting(finished_run, tmp_path, program, moment):
    words = {
        "launch/train.py": ["--config", finished_run.parent / "tiny.yaml", "--run.folder", tmp_path / "run"],
        "launch/evaluate.py": [finished_run, "--out", tmp_path / "out"],
        "-mshards": ["verify", tmp_path],
    }
    process = start([sys.executable, program, *map(str, words[program])])
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    seconds, _ = ended(process, 60)
    assert seconds < LIMIT_S


def test_a_launch_that_is_left_over_says_what_it_waits_for_and_ctrl_c_ends_it(finished_run, tmp_path):
    """WORLD_SIZE of an earlier launch in the same shell: nobody else comes."""
    words = command("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", tmp_path / "run")
    places = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999", "WORLD_SIZE": "2"}
    process = start(words, **places)
    said = process.stdout.readline()
    assert "rank 0 of 2 has waited 10 s for the other processes, at localhost:29999" in said
    assert "unset WORLD_SIZE" in said
    process.send_signal(signal.SIGINT)
    assert ended(process, 60)[0] < LIMIT_S
    assert process.returncode == -signal.SIGINT
