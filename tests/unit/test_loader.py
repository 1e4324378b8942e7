"""The loader gives what was asked for, in order, bounded, and leaves nothing behind."""

import _thread
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from harness.data.loader import LoaderOptions, evaluation_batches, training_batches
from shards.index import load, load_table
from shards.plan import Plan
from shards.reader import SplitReader
from support.processes import ROOT

OPTIONS = LoaderOptions(2, 3, torch.device("cpu"))


def plan_of(reader: SplitReader, batch: int = 12) -> Plan:
    return Plan(reader.shard_sizes, batch, seed=0)


def batches(dataset, rank=0, world_size=1, first=0, epoch=0, batch=12, options=OPTIONS):
    reader = SplitReader(dataset, "train")
    return list(training_batches(reader, plan_of(reader, batch), epoch, first, rank, world_size, options))


def test_batches_hold_the_planned_samples_with_their_labels(dataset):
    table = pd.concat(load_table(dataset, shard) for shard in dataset.split("train")).set_index("key")
    for number, batch in enumerate(batches(dataset)):
        assert batch.images.shape == (12, 3, 36, 48)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.positions.tolist() == list(range(12 * number, 12 * number + 12))
        assert batch.labels.tolist() == table.loc[batch.keys.numpy(), "label"].tolist()


def test_images_belong_to_their_keys(dataset):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(dataset.folder / shard.file) for shard in dataset.split("train")]
    stock = {int(s["__key__"]): s["jpg"] for s in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")}
    for batch in batches(dataset):
        for image, key in zip(batch.images, batch.keys.tolist(), strict=True):
            difference = image.permute(1, 2, 0).numpy().astype(int) - stock[key]
            assert abs(difference).mean() < 3  # fast and exact decoding differ by a grey level or so


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_load_the_batch_of_one(dataset, world_size):
    alone = batches(dataset, batch=7)
    ranks = [batches(dataset, rank, world_size, batch=7) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[number].keys for rank in ranks]), batch.keys)
        assert torch.equal(torch.cat([rank[number].images for rank in ranks]), batch.images)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch(dataset):
    whole, rest = batches(dataset, epoch=3), batches(dataset, epoch=3, first=2)
    assert [batch.keys.tolist() for batch in rest] == [batch.keys.tolist() for batch in whole[2:]]


def test_evaluation_covers_the_split_in_order_once(dataset):
    reader = SplitReader(dataset, "val")
    keys = [b.keys for rank in range(3) for b in evaluation_batches(reader, 4, rank, 3, OPTIONS)]
    expected = pd.concat(load_table(dataset, shard) for shard in dataset.split("val"))["key"]
    assert sorted(torch.cat(keys).tolist()) == expected.tolist()
    assert max(map(len, keys)) == 4


def assert_threads_end(before: int) -> None:
    """A thread that has said that it is done still takes a moment to be gone."""
    deadline = time.monotonic() + 5
    while _thread._count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settled_threads() -> int:
    """How many threads there are, once those of a test before have ended."""
    count = -1
    while count != (now := _thread._count()):
        count = now
        time.sleep(0.1)
    return count


def test_leaving_early_leaves_no_thread_behind(dataset):
    reader, before = SplitReader(dataset, "train"), settled_threads()
    for _ in training_batches(reader, plan_of(reader, 4), 0, 0, 0, 1, OPTIONS):
        assert _thread._count() == before + OPTIONS.threads
        break
    assert_threads_end(before)


def spoiled(packed, tmp_path, spoil):
    """A copy of the dataset with one training image changed; its key and shard."""
    folder = shutil.copytree(packed, tmp_path / "spoiled")
    dataset = load(folder)
    shard = dataset.split("train")[1]
    row = load_table(dataset, shard).iloc[-1]
    data = bytearray((folder / shard.file).read_bytes())
    data = spoil(data, int(row["offset"]), int(row["size"]))
    (folder / shard.file).write_bytes(data)
    return dataset, f"{row['key']:08d}", shard.file, str(row["offset"])


def zero_the_middle(data, offset, size):
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    return data


def not_even_an_image(data, offset, size):
    data[offset : offset + size] = bytes(size)
    return data


@pytest.mark.parametrize("spoil", [zero_the_middle, not_even_an_image])
def test_a_damaged_sample_fails_its_batch_with_key_shard_and_offset(packed, tmp_path, spoil):
    dataset, key, shard, offset = spoiled(packed, tmp_path, spoil)
    before = settled_threads()
    with pytest.raises(ValueError, match="damaged after packing") as caught:
        batches(dataset)
    for word in (key, shard, f"byte {offset}", "shards verify"):
        assert word in str(caught.value)
    assert_threads_end(before)


def test_a_thread_that_cannot_use_the_device_fails_the_batch(dataset, monkeypatch):
    def broken(device):
        raise ValueError(f"no {device} for this thread")

    monkeypatch.setattr("harness.data.threads.set_thread_device", broken)
    with pytest.raises(ValueError, match="no cpu for this thread"):
        batches(dataset)


def test_a_missing_shard_is_named(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar is missing"):
        batches(load(folder))


def test_a_table_or_shard_that_is_not_what_was_packed_is_refused(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    table = folder / "train-000001.csv"
    table.write_text(table.read_text().replace(",0,", ",1,", 1))
    with pytest.raises(ValueError, match=r"train-000001\.csv was changed after packing"):
        batches(load(folder))
    shutil.copy(packed / table.name, table)
    with open(folder / "train-000001.tar", "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"train-000001\.tar has \d+ bytes instead of the \d+ that were packed"):
        batches(load(folder))


def test_open_files_are_bounded(dataset, monkeypatch):
    monkeypatch.setattr("shards.reader.OPEN_FILES", 2)
    reader = SplitReader(dataset, "train")
    for shard in [0, 1, 2, 0, 1, 2]:
        list(reader.read(np.array([shard]), np.array([0])))
        assert len(reader._files) <= 2
    assert np.array_equal(reader.table(0).key, load_table(dataset, dataset.split("train")[0])["key"])


def test_a_bad_sample_that_is_to_be_skipped_is_ignored_and_reported(packed, tmp_path):
    dataset, key, _, _ = spoiled(packed, tmp_path, zero_the_middle)
    bad_keys: list[int] = []
    whole = batches(dataset, options=LoaderOptions(2, 3, torch.device("cpu"), bad_keys))
    assert bad_keys == [int(key)]
    undamaged = batches(load(packed))
    for batch, before in zip(whole, undamaged, strict=True):
        assert batch.keys.tolist() == before.keys.tolist()
        hit = batch.keys == int(key)
        assert (batch.labels[hit] == -1).all()
        assert torch.equal(batch.labels[~hit], before.labels[~hit])
        assert torch.equal(batch.images[~hit], before.images[~hit])
        assert all((image == batch.images[~hit]).flatten(1).all(1).any() for image in batch.images[hit])
    assert sum((batch.labels == -1).sum() for batch in whole) == 1


@pytest.mark.parametrize("batch", [24, 60])
def test_a_batch_that_threads_share_is_that_of_one_thread(packed, tmp_path, batch):
    dataset, key, _, _ = spoiled(packed, tmp_path, zero_the_middle)
    found = []
    for threads in (1, 3, 8):
        bad_keys: list[int] = []
        found.append(batches(dataset, batch=batch, options=LoaderOptions(threads, 2, torch.device("cpu"), bad_keys)))
        assert bad_keys == [int(key)]
    for number, alone in enumerate(found[0]):
        for shared in (found[1][number], found[2][number]):
            assert torch.equal(shared.images, alone.images)
            for name in ("labels", "positions", "keys"):
                assert torch.equal(getattr(shared, name), getattr(alone, name))


def test_evaluation_never_skips(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    shard = load(folder).split("val")[0]
    row = load_table(load(folder), shard).iloc[0]
    data = bytearray((folder / shard.file).read_bytes())
    (folder / shard.file).write_bytes(not_even_an_image(data, int(row["offset"]), int(row["size"])))
    reader = SplitReader(load(folder), "val")
    with pytest.raises(ValueError, match="damaged after packing"):
        list(evaluation_batches(reader, 4, 0, 1, LoaderOptions(2, 3, torch.device("cpu"), [])))


def test_memory_stays_flat_over_hundreds_of_batches(dataset):
    reader = SplitReader(dataset, "train")
    plan = plan_of(reader)
    page = resource.getpagesize()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    for epoch in range(130):
        for _ in training_batches(reader, plan, epoch, 0, 0, 1, OPTIONS):
            pass
        if epoch == 30:
            before = resident()
    assert 100 * plan.n_batches >= 400
    assert resident() - before < 8 * 2**20  # one batch is 62 kB: keeping them all would be 25 MB and more


INTERRUPTED = """
import random, signal, torch
from harness.data.loader import *
from shards.reader import SplitReader
from shards.index import load, load_table
reader = SplitReader(load(PATH), 'train')
plan = Plan(reader.shard_sizes, 4, 0)
signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C does
draw, ended = random.Random(0), 0
for _ in range(300):
    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.002, 0.012))
    try:
        for epoch in range(1000):  # seconds, were it not interrupted
            for batch in training_batches(reader, plan, epoch, 0, 0, 1, LoaderOptions(2, 3, torch.device('cpu'))):
                pass
    except KeyboardInterrupt:
        ended += 1
print(ended, 'ended')
"""


def test_a_loop_that_is_interrupted_ends_at_once_wherever_it_is(packed):
    code = INTERRUPTED.replace("PATH", repr(str(packed)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "300 ended\n", done.stderr
    assert done.stderr == ""


def test_the_rows_of_tables_in_memory_are_bounded_and_read_again(dataset, monkeypatch):
    reader, plain = SplitReader(dataset, "train"), SplitReader(dataset, "train")
    assert len(reader.shards) > 4
    monkeypatch.setattr("shards.reader.TABLE_ROWS", 25)  # two shards of ten, and a bit
    for _ in range(2):
        for shard in (0, 1, 2, 3, 0, 1):
            for name in ("key", "offset", "size", "label"):
                found = getattr(reader.table(shard), name)
                assert found.dtype == np.int64
                assert np.array_equal(found, load_table(dataset, reader.shards[shard])[name])
            assert len(reader._tables) <= 2
            assert reader._rows_kept == sum(len(table.key) for table in reader._tables.values()) <= 25
    assert np.array_equal(reader.keys(), plain.keys())
