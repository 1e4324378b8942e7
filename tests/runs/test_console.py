"""What a run says: on a terminal of any encoding, and in its folder."""

import gzip
import json
import os
import shutil
import sys

import pytest

from shards.pack import Packing, pack
from shards.sources import read_class_folders
from shards.split import split_by_lesion
from support.processes import command, launch, start, state


def test_the_console_log_holds_what_was_said(finished_run):
    said = (finished_run / "console.log").read_text(encoding="utf-8")
    for line in (
        "1 process on CPU",
        "training images",
        "epoch   3/3",
        "training ends: all 3 epochs done",
        "run folder:",
    ):
        assert line in said, said


@pytest.fixture(scope="module")
def accented(source, tmp_path_factory):
    """A dataset whose class names and image ids are not ASCII."""
    folder = tmp_path_factory.mktemp("accented")
    for number, image in enumerate(sorted(source.rglob("*.jpg"))[:40]):
        label = ("Mélanome", "Nævus")[number % 2]
        (folder / "source" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "source" / label / f"Läsion {number}.jpg")
    catalogue = read_class_folders(folder / "source")
    pack(catalogue, split_by_lesion(catalogue.images), folder / "data", Packing(size=(48, 36)), quiet=True)
    return folder / "data"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_locale_that_is_not_utf_8_ends_no_run(accented, tiny, tmp_path, encoding):
    variables = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": encoding}
    words = ["--config", tiny, "--data.path", accented, "--run.epochs", "1", "--run.folder", tmp_path / "run"]
    for _ in range(2):  # the second start reads what the first wrote
        process = start(command("train", *words), **variables)
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "test split" in out
    assert state(tmp_path / "run")["status"] == "finished"
    assert "Mélanome" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for words in (
        command("evaluate", tmp_path / "run", "--split", "val"),
        command("compare", tmp_path / "run"),
        [sys.executable, "-m", "shards", "show", str(accented), "--sheet", str(tmp_path / "sheet.png")],
    ):
        process = start(words, **variables)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@pytest.mark.slow
def test_a_profile_is_a_trace_and_the_longest_operators(tiny, tmp_path):
    done = launch("train", "--config", tiny, "--run.profile", "2", "--run.folder", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "operator" in done.stdout
    assert "aten::" in done.stdout
    trace = tmp_path / "run" / "profile" / "rank0.pt.trace.json.gz"
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#10", "ProfilerStep#11"} <= names
    assert os.path.getsize(trace) > 1000
