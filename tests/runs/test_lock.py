"""One job at a time writes a run folder, and a dead one does not block it."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.run import lock as module
from harness.run.lock import RunLock
from support.processes import Begun, command, launch, state, wait_for_step


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "WATCHED_S", 0.5)


def left_by(run, **owner) -> None:
    """A lock of somebody else."""
    mine = {name: RunLock(run)._owner[name] for name in ("host", "boot", "namespace")}
    (run / "lock.json").write_text(json.dumps(mine | {"process": 1, "started": 0.0, "beats": 1} | owner))


def test_a_lock_is_given_back(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_of_this_machine_keeps_its_folder(tmp_path):
    init = psutil.Process(1)
    left_by(tmp_path, process=1, started=init.create_time())
    with RunLock(tmp_path) as lock, pytest.raises(BlockingIOError, match=r"in use by process 1 on .*touch .*stop"):
        lock.acquire()
    assert (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("owner", [{"process": 2**22 + 1}, {"process": 1, "started": 12.5}])
def test_a_dead_process_of_this_machine_is_seen_at_once_also_when_its_number_is_used_again(tmp_path, owner, caplog):
    left_by(tmp_path, **owner)
    caplog.set_level(logging.INFO, "dermharness")
    began = time.monotonic()
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert time.monotonic() - began < 5  # watching would take 30
    assert "which is gone" in caplog.messages[-1]


def test_a_process_that_was_killed_and_not_waited_for_is_gone(tmp_path):
    """As where process 1 of a container reaps nobody, or in a notebook that started training itself."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    left_by(tmp_path, process=child.pid, started=started)
    with RunLock(tmp_path) as lock:
        lock.acquire()
    child.wait()


def test_another_machine_that_gives_no_sign_of_life_loses_its_lock(tmp_path, quick, caplog):
    left_by(tmp_path, host="elsewhere")
    caplog.set_level(logging.INFO, "dermharness")
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "elsewhere; watching for" in caplog.messages[0]


def test_another_machine_whose_heartbeat_goes_on_keeps_it(tmp_path, quick):
    with RunLock(tmp_path) as owner:
        owner._owner["host"] = "elsewhere"
        owner.acquire()
        with RunLock(tmp_path) as lock, pytest.raises(BlockingIOError, match="elsewhere"):
            lock.acquire()
        owner.check()


def test_a_job_whose_lock_was_taken_over_writes_nothing_more(tmp_path, quick):
    with RunLock(tmp_path) as lock:
        lock.acquire()
        left_by(tmp_path, host="elsewhere")
        time.sleep(0.2)
        with pytest.raises(BlockingIOError, match="took over"):
            lock.check()
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"  # not removed by the loser


def test_another_machine_of_the_same_name_keeps_its_lock_while_its_heartbeat_goes_on(tmp_path, quick):
    """Clones of one image, or a cluster whose nodes are all called localhost: the process number means nothing here."""
    with RunLock(tmp_path) as owner:
        owner._owner |= {"boot": "another", "process": 2**22 + 1}
        owner.acquire()
        with RunLock(tmp_path) as lock, pytest.raises(BlockingIOError, match="in use"):
            lock.acquire()
        owner.check()


def test_a_lock_of_before_boots_were_told_apart_is_watched(tmp_path, quick, caplog):
    left_by(tmp_path, process=2**22 + 1)
    old = json.loads((tmp_path / "lock.json").read_text())
    del old["boot"]
    (tmp_path / "lock.json").write_text(json.dumps(old))
    caplog.set_level(logging.INFO, "dermharness")
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "watching for" in caplog.messages[0]


DAMAGED = [
    {"process": None},
    {"process": "12"},
    {"process": -1},
    {"process": 2**70},
    {"started": None},
    {"started": "x"},
]


@pytest.mark.parametrize("damage", DAMAGED, ids=str)
def test_a_lock_whose_numbers_are_damaged_is_nobodys(tmp_path, quick, damage):
    left_by(tmp_path, **({"process": os.getpid()} | damage))
    found = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))
    with RunLock(tmp_path) as lock:
        lock.acquire()
        lock.check()


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_lock_is_nobodys(tmp_path, quick, content):
    (tmp_path / "lock.json").write_text(content)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        lock.check()


@pytest.mark.slow
def test_two_jobs_on_one_run_folder_are_told_apart(finished_run, tmp_path):
    config, run = finished_run.parent / "tiny.yaml", tmp_path / "run"
    first = Begun(command("driven", "--config", config, "--run.folder", run), DISTURB="hang@2")
    wait_for_step(first, run, 0)
    second = launch("train", "--config", config, "--run.folder", run)
    assert second.returncode == 1
    assert f"in use by process {first.pid}" in second.stderr
    assert state(run)["status"] == "running"  # the first one's word stands
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    third = launch("train", "--config", config, "--run.folder", run)
    assert third.returncode == 0, third.stderr
    assert "which is gone" in third.stdout
