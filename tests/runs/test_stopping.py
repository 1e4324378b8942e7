"""A run stops when it is asked to, whoever asks and whenever, and goes on as if it had not."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.run.stop import StopRequest
from support.processes import (
    SAVING,
    Begun,
    assert_equal_weights,
    command,
    deterministic_log,
    environment,
    launch,
    start,
    state,
    wait_for_step,
    weights,
)


def accelerate(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *words[1:]]


def assert_it_continues_undisturbed(finished_run, run, ranks: int = 1) -> str:
    done = launch("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert state(run)["status"] == "finished"
    if ranks == 1:
        assert_equal_weights(weights(run), weights(finished_run))
        assert (run / "metrics.json").read_bytes() == (finished_run / "metrics.json").read_bytes()
    return done.stdout


def wait_for_status(run, status: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while state(run).get("status") != status:
        assert time.monotonic() < deadline, state(run)
        time.sleep(0.05)


def signalled(words: list[str], run, number: signal.Signals, **variables: str) -> None:
    """Start a slow run, and once it has saved a step send a signal to the process that was started, and see it end."""
    process = start(words, DISTURB="slow@1", **variables)
    wait_for_step(process, run, 1)
    process.send_signal(number)
    process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_torchrun_passes_a_signal_on_and_all_ranks_stop_with_a_checkpoint(finished_run, tmp_path, number):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    signalled(command("driven", "--config", config, "--run.folder", run, *SAVING, ranks=2), run, number)
    assert state(run)["status"] == "stopped"
    assert not (run / "errors").exists()
    assert_it_continues_undisturbed(finished_run, run, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL], ids=lambda number: number.name)
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(finished_run, tmp_path, number):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    signalled(command("driven", "--config", config, "--run.folder", run, *SAVING, ranks=2), run, number)
    wait_for_status(run, "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_run_whose_accelerate_launch_was_killed_stops_with_a_checkpoint(finished_run, tmp_path, number):
    """With one process, `accelerate launch` passes nothing on: it dies, and used to leave the training alone."""
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = accelerate(command("driven", "--config", config, "--run.folder", run, *SAVING))
    signalled(words, run, number, ACCELERATE_USE_CPU="true")
    wait_for_status(run, "stopped")
    time.sleep(0.5)  # the lock is given back just after
    assert_it_continues_undisturbed(finished_run, run)


@pytest.mark.slow
def test_a_second_request_leaves_at_once(finished_run, tmp_path):
    run = tmp_path / "run"
    words = command("driven", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run)
    process = Begun(words, DISTURB="hang@2")
    wait_for_step(process, run, 0)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # at once: the same request
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert state(run)["status"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["stop-val@1", "stop-test@1"])
def test_a_stop_is_noticed_in_the_middle_of_an_evaluation(finished_run, tmp_path, when):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    if when == "stop-test@1":  # begin at the end of the training
        shutil.copytree(finished_run, run)
        (run / "state.json").unlink()
        (run / "metrics.json").unlink()
    done = launch("driven", "--config", config, "--run.folder", run, "--eval.batch_size", 8, disturb=when)
    assert done.returncode == 75, done.stderr
    assert state(run)["status"] == "stopped"
    assert state(run)["samples_seen"] == (60 if when == "stop-val@1" else 0)  # the whole epoch, not yet validated
    assert not (run / "metrics.json").exists()
    told = assert_it_continues_undisturbed(finished_run, run)
    assert re.findall(r"^epoch +(\d).* trained before this start", told, re.M) == (
        ["1"] if when == "stop-val@1" else []
    )
    assert deterministic_log(run) == deterministic_log(finished_run)


@pytest.mark.slow
def test_a_stop_in_an_evaluation_by_one_of_two_ranks_stops_both(finished_run, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    launch("driven", "--config", config, "--run.folder", run, "--eval.batch_size", 8, disturb="stop-val@1:1", ranks=2)
    assert state(run)["status"] == "stopped"
    assert_it_continues_undisturbed(finished_run, run, ranks=2)


@pytest.mark.slow
def test_the_time_limit_stops_before_the_first_step_and_the_run_goes_on_later(finished_run, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    done = launch(
        "train", "--config", config, "--run.folder", run, "--run.time_limit_minutes", "1e-6"
    )  # over before it began
    assert done.returncode == 75, done.stderr
    assert "stopped as asked (run.time_limit_minutes) at step 0" in done.stdout
    assert_it_continues_undisturbed(finished_run, run)


def test_the_time_limit_leaves_room_for_one_more_interval(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest(tmp_path, time_limit_minutes=1)
    stop._end = now + 60
    found = []
    for seconds in (0, 10, 22, 10, 5, 14):  # a checkpoint lay in the longest
        now += seconds
        found.append(stop.asked())
    assert found == [False, False, False, True, True, True]  # at 42 s, another 22 s would be too late


def test_the_time_limit_counts_two_checkpoints_that_are_written_beside_the_training(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop, found = StopRequest(tmp_path, time_limit_minutes=1), []
    stop._end, stop.saving_s = now + 60, lambda: 15.0
    for seconds in (0, 10, 10, 10):
        now += seconds
        found.append(stop.asked())
    assert found == [False, False, False, True]  # at 30 s, one is perhaps under way, and the last one is to come


def test_asking_by_file_or_signal_is_the_same(tmp_path):
    with StopRequest(tmp_path) as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked()
        assert stop.reason == "SIGUSR1"
    with StopRequest(tmp_path) as stop:
        (tmp_path / "stop").touch()
        assert stop.asked()
        assert stop.reason == "file"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_file_that_asked_an_earlier_run_is_forgotten_and_one_that_asks_a_starting_run_is_not(tmp_path):
    stop = StopRequest(tmp_path)
    stop.forget_old_file()
    (tmp_path / "stop").touch()
    stop.forget_old_file()
    assert stop.asked()  # touched while this process was starting
    os.utime(tmp_path / "stop", (0, 0))
    stop.forget_old_file()
    assert not StopRequest(tmp_path).asked()


def test_a_file_that_asks_a_job_before_its_processes_are_there_is_for_its_run(tmp_path, monkeypatch):
    began = int(psutil.Process().create_time())
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (began - 100, began - 100))
    monkeypatch.setenv("JOB_BEGAN", str(began - 200))
    StopRequest(tmp_path).forget_old_file()
    assert StopRequest(tmp_path).asked()
    monkeypatch.setenv("JOB_BEGAN", str(began - 50))
    StopRequest(tmp_path).forget_old_file()
    assert not StopRequest(tmp_path).asked()


def test_a_shell_is_no_launcher(tmp_path):
    """A run that was started in the background goes on when its shell ends."""
    code = "import harness.run.stop as s; s.follow_launcher(); import time; print('up', flush=True); time.sleep(20)"
    script = f'{sys.executable} -c "{code}" & echo $!; sleep 60'
    shell = start(["bash", "-c", script])
    child = int(shell.stdout.readline())
    assert shell.stdout.readline() == "up\n"
    shell.kill()
    shell.wait()
    time.sleep(0.3)
    os.kill(child, 0)  # it lives
    os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_no_process_outlives_a_stop(finished_run, tmp_path):
    run = tmp_path / "run"
    words = command("driven", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run)
    done = subprocess.run(words, env=environment(DISTURB="stop@2"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert not (run / "lock.json").exists()
    assert not (run / "errors").exists()
