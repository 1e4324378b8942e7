"""Packing that is killed at any operation on its files goes on to the same bytes, and never shows half a dataset."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest

from shards.index import verify
from support.packing import draw_source, pack_task
from support.processes import ROOT, environment
from support.recorder import contents, put

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("size", [1, 2])
def test_a_task_killed_at_every_operation_on_its_files_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys, size):
    draw_source(folder := tmp_path / "source", (0, 9, 31, 46, 47, 80))
    base, expected = tmp_path / "base", tmp_path / "expected"
    outs = [base / "out", base / "small"]
    base.mkdir()
    pack_task(folder, [expected / "out", expected / "small"], bad="skip")
    for rank in range(1, size):
        pack_task(folder, outs, rank, size, "skip")
    words = [sys.executable, "tests/support/packing.py", tmp_path / "states", 0, size, folder, *outs]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert contents(base) == contents(expected)
    states = pickle.loads((tmp_path / "states").read_bytes())
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a process that is killed loses nothing that it wrote
    complete = 0
    for place, found in states:
        shutil.rmtree(base)
        put(found, base)
        for out in outs:
            if out.exists():
                assert verify(out) == [], place
        if all(out.exists() for out in outs):
            complete += 1
            if not list(base.glob("out.packing/*")):
                assert {path.name for path in base.iterdir()} <= {"out", "small", "out.packing"}, place
                continue
        pack_task(folder, outs, 0, size, "skip")
        assert {
            name: data for name, data in contents(base).items() if name.split("/")[0] in ("out", "small")
        } == contents(expected), place
        assert sorted(path.name for path in base.iterdir()) == ["out", "small"], place
    with capsys.disabled():
        print(f"\n{size} task(s): {len(states)} different states, {complete} of them complete")
    assert len(states) > 100
