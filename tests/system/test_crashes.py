"""A run that is killed at any operation on its files loses nothing, and nothing stands twice."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import TINY

from support.processes import ROOT, command, environment

pytestmark = pytest.mark.chaos
CRASHES = ROOT / "tests" / "support" / "crashes.py"
# What ended the run before the one that is killed, and what that one saves beside the ends of its epochs.
STARTS = {
    "fresh": ("", ("--run.save_every_minutes", "0")),
    "stopped in an epoch": ("stop@3", ()),
    "stopped before validation": ("stop-val@1", ()),
}


@pytest.fixture(scope="module")
def words(packed, tmp_path_factory) -> list:
    """Of a command whose run takes a moment."""
    config = tmp_path_factory.mktemp("crashes") / "tiny.yaml"
    config.write_text(TINY.replace("DATA", str(packed)))
    evaluation = ("--eval.views", "none", "--eval.positive_classes", "[]", "--eval.subgroups", "[]")
    return ["--config", config, "--model.name", "tiny_conv", "--run.epochs", "2", "--run.sync_every", "3", *evaluation]


@pytest.fixture(scope="module")
def before(words, tmp_path_factory) -> dict:
    """Folders of runs that were stopped, by what stopped them; the one without is finished."""
    folders = {disturb: tmp_path_factory.mktemp("before") / "run" for disturb, _ in STARTS.values()}
    for disturb, folder in folders.items():
        done = run(command("driven", *words, "--run.folder", folder), disturb)
        assert done.returncode == (75 if disturb else 0), done.stderr
    return folders


def run(command: list[str], disturb: str = "", cores: int = 1) -> subprocess.CompletedProcess:
    """Run to the end, on so many cores: how sums are split among threads decides their last bits."""
    first = sorted(os.sched_getaffinity(0))[:cores]
    pipes = {"capture_output": True, "text": True, "timeout": 900}
    done = ["taskset", "--cpu-list", ",".join(map(str, first)), *command]
    return subprocess.run(done, env=environment(DISTURB=disturb), cwd=ROOT, **pipes)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("start", STARTS)
def test_a_run_killed_at_every_operation_on_its_files_loses_nothing(words, before, tmp_path, start, keep, capsys):
    disturb, saving = STARTS[start]
    folder = tmp_path / "run"
    if disturb:
        shutil.copytree(before[disturb], folder)
    every = 1 if keep == 1 else 4  # what is kept makes no difference to how a file is written
    places = [before[""], every, *words, *saving, "--run.keep_checkpoints", keep, "--run.folder", folder]
    done = run([sys.executable, str(CRASHES), *map(str, places)], cores=64)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        numbers = f"{found['places']} places, {found['states']} different states, {found['continued']} continued"
        print(f"\n{start}, {keep} kept: {numbers}, {len(found['lost'])} lost or twice")
    assert found["continued"] > 30
    assert not found["lost"], "\n".join(f"{place}\n{said[-300:]}" for place, said in found["lost"].items())
