"""Groups are compared in bounded memory, and a checkpoint of very many names their file."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from harness.run import checkpoint, recovery
from harness.run.folder import provenance
from harness.run.progress import Progress
from harness.run.provenance import read_checkpoint
from shards import groups as module
from shards.files import sha256
from shards.groups import GroupFile, count_shared, load_groups, pieces
from shards.index import load
from shards.leaks import leak_warnings, refuse_leak, refuse_trained_groups
from support.processes import peak_memory

HASHES = st.lists(st.integers(0, 60) | st.integers(0, 2**64 - 1), unique=True, max_size=40).map(
    lambda found: np.sort(np.array(found, dtype=np.uint64))
)


def saved(path, hashes) -> GroupFile:
    np.save(path, hashes)
    return GroupFile(path, sha256(path), len(hashes))


@given(HASHES, st.lists(HASHES, min_size=1, max_size=3), st.integers(1, 9))
def test_what_is_shared_is_counted_right_however_the_pieces_fall(tmp_path_factory, one, others, size):
    folder = tmp_path_factory.mktemp("groups")
    files = [saved(folder / f"{n}.npy", hashes) for n, hashes in enumerate(others)]
    expected = len(set(one.tolist()) & set().union(*(hashes.tolist() for hashes in others)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        assert count_shared(one, *others) == count_shared(saved(folder / "one.npy", one), *files) == expected
        assert max(map(len, pieces(one)), default=0) <= size


def test_many_groups_take_no_more_memory_than_two_pieces(tmp_path):
    code = """
import sys, numpy as np
from pathlib import Path
from shards.files import sha256
from shards.groups import GroupFile, count_shared
files = [GroupFile(Path(name), sha256(Path(name)), 6_000_000) for name in sys.argv[1:]]
if files:
    assert count_shared(*files) == 2_000_000
"""
    names = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for name, step in zip(names, (2, 3), strict=True):
        np.save(name, np.arange(0, 6_000_000 * step, step, dtype=np.uint64))
    nothing = peak_memory(code)
    assert (
        peak_memory(code, *names) - nothing < 70
    )  # MB; the files have 96, and the least that both in memory take is 192


@pytest.mark.parametrize("change", ["flip", "shorten", "unsorted", "twice", "remove"])
def test_a_file_that_is_not_what_was_recorded_is_refused_by_name(tmp_path, change):
    path = tmp_path / "train.groups.npy"
    known = saved(path, np.arange(0, 900, 3, dtype=np.uint64))
    data = bytearray(path.read_bytes())
    if change == "flip":
        data[-700] ^= 1
        path.write_bytes(data)
    elif change == "shorten":
        path.write_bytes(data[:-8])
    elif change == "remove":
        path.unlink()
    else:
        hashes = np.arange(300, dtype=np.uint64)
        hashes[[7, 8]] = (8, 7) if change == "unsorted" else (7, 7)
        known = saved(path, hashes)
    with pytest.raises((ValueError, FileNotFoundError), match=r"train\.groups\.npy"):
        count_shared(np.array([5], dtype=np.uint64), known)


@pytest.fixture
def many(monkeypatch):
    """Any number of groups counts as very many."""
    monkeypatch.setattr(module, "IN_MEMORY", 0)


def best_of(run, config, dataset):
    checkpoint.save_best(run, Progress(), provenance(config, dataset), nn.Linear(2, 2))
    (folder,) = (run / "checkpoints").iterdir()
    return folder


def test_a_checkpoint_of_very_many_groups_names_their_file_and_is_checked_by_it(many, tiny_config, packed, tmp_path):
    own = shutil.copytree(packed, tmp_path / "own")
    dataset, other = load(own), load(packed)
    refuse_leak(dataset)
    folder = best_of(tmp_path / "run", tiny_config, dataset)
    assert not (folder / "train-groups.npy").exists()
    assert recovery.find_corruption(folder) is None
    named = json.loads((folder / "train-groups.json").read_text())
    assert named["sha256"] == dataset.description.files["train.groups.npy"]
    groups = read_checkpoint(folder).provenance.train_groups
    assert len(groups) == named["groups"] == len(np.load(own / "train.groups.npy"))
    assert leak_warnings(other, "test", [groups]) == []
    (said,) = leak_warnings(other, "train", [groups])
    assert said.startswith(f"{len(groups)} of {len(groups)} lesions of the train split were trained on")
    shutil.rmtree(own)  # the data set of the same content that is evaluated has the file, too
    assert leak_warnings(other, "test", [read_checkpoint(folder).provenance.train_groups]) == []


def test_where_the_file_is_gone_the_check_says_what_to_put_where(many, tiny_config, packed, tmp_path):
    own = shutil.copytree(packed, tmp_path / "own")
    folder = best_of(tmp_path / "run", tiny_config, load(own))
    kept = shutil.move(own / "train.groups.npy", tmp_path / "kept.npy")
    dataset = load(packed)
    files = {name: value for name, value in dataset.description.files.items() if name != "train.groups.npy"}
    elsewhere = replace(dataset, description=replace(dataset.description, files=files))  # of other training groups
    groups = read_checkpoint(folder).provenance.train_groups
    (said,) = leak_warnings(elsewhere, "test", [groups])
    assert "is not known" in said
    assert "Put the train.groups.npy of the training dataset there or into the run's folder" in said
    assert groups.sha256 in said
    with pytest.raises(ValueError, match=r"is not known: .*--allow-leak evaluates anyway"):
        refuse_trained_groups(elsewhere, "test", [groups])
    shutil.copy(kept, tmp_path / "run" / "train.groups.npy")
    assert leak_warnings(elsewhere, "test", [read_checkpoint(folder).provenance.train_groups]) == []


@pytest.mark.parametrize("content", ["[]", '{"path": 3, "sha256": "", "groups": 1}', "{"])
def test_a_damaged_name_of_the_file_is_refused(many, tiny_config, dataset, tmp_path, content):
    folder = best_of(tmp_path / "run", tiny_config, dataset)
    (folder / "train-groups.json").write_text(content)
    assert "train-groups.json" in recovery.find_corruption(folder)
    with pytest.raises(ValueError, match="train-groups"):
        read_checkpoint(folder)


def test_few_groups_stay_in_the_checkpoint_byte_for_byte(tiny_config, dataset, tmp_path):
    folder = best_of(tmp_path / "run", tiny_config, dataset)
    buffer = io.BytesIO()
    np.save(buffer, load_groups(dataset, "train"))
    assert (folder / "train-groups.npy").read_bytes() == buffer.getvalue()
    assert not (folder / "train-groups.json").exists()
