"""The loader gives what was asked for, in order, bounded, and leaves nothing behind."""

import shutil
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from harness.loader import evaluation_batches, training_batches
from shards.index import load, load_table
from shards.plan import Plan
from shards.store import Store

CPU = torch.device("cpu")


def plan_of(store: Store, batch: int = 12) -> Plan:
    return Plan(store.shard_sizes, batch, seed=0)


def batches(dataset, rank=0, world=1, first=0, epoch=0, batch=12, threads=2):
    store = Store(dataset, "train")
    return list(training_batches(store, plan_of(store, batch), epoch, first, rank, world, CPU, threads, 3))


def test_batches_hold_the_planned_samples_with_their_labels(dataset):
    table = pd.concat(load_table(dataset, shard) for shard in dataset.split("train")).set_index("key")
    for number, batch in enumerate(batches(dataset)):
        assert batch.images.shape == (12, 3, 36, 48)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.positions.tolist() == list(range(12 * number, 12 * number + 12))
        assert batch.labels.tolist() == table.loc[batch.keys.numpy(), "label"].tolist()


def test_pictures_belong_to_their_keys(dataset):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(dataset.folder / shard.file) for shard in dataset.split("train")]
    stock = {int(s["__key__"]): s["jpg"] for s in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")}
    for batch in batches(dataset):
        for image, key in zip(batch.images, batch.keys.tolist(), strict=True):
            difference = image.permute(1, 2, 0).numpy().astype(int) - stock[key]
            assert abs(difference).mean() < 3  # fast and exact decoding differ by a grey level or so


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_load_the_batch_of_one(dataset, world):
    alone = batches(dataset, batch=7)
    ranks = [batches(dataset, rank, world, batch=7) for rank in range(world)]
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[number].keys for rank in ranks]), batch.keys)
        assert torch.equal(torch.cat([rank[number].images for rank in ranks]), batch.images)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch(dataset):
    whole, rest = batches(dataset, epoch=3), batches(dataset, epoch=3, first=2)
    assert [batch.keys.tolist() for batch in rest] == [batch.keys.tolist() for batch in whole[2:]]


def test_evaluation_covers_the_split_in_order_once(dataset):
    store = Store(dataset, "val")
    keys = [b.keys for rank in range(3) for b in evaluation_batches(store, 4, rank, 3, CPU, 2, 3)]
    expected = pd.concat(load_table(dataset, shard) for shard in dataset.split("val"))["key"]
    assert sorted(torch.cat(keys).tolist()) == expected.tolist()
    assert max(map(len, keys)) == 4


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_leaving_early_leaves_no_thread_behind(dataset):
    store = Store(dataset, "train")
    for _ in training_batches(store, plan_of(store, 4), 0, 0, 0, 1, CPU, 3, 3):
        assert decoders()
        break
    assert decoders() == []


def spoiled(packed, tmp_path, spoil):
    """A copy of the dataset with one training picture changed; its key and shard."""
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


def not_even_a_picture(data, offset, size):
    data[offset : offset + size] = bytes(size)
    return data


def cut_off(data, offset, size):
    return data[: offset + size // 2]


@pytest.mark.parametrize("spoil", [zero_the_middle, not_even_a_picture, cut_off])
def test_a_damaged_sample_fails_its_batch_with_key_shard_and_offset(packed, tmp_path, spoil):
    dataset, key, shard, offset = spoiled(packed, tmp_path, spoil)
    with pytest.raises(ValueError, match="damaged after packing") as caught:
        batches(dataset)
    for word in (key, shard, f"byte {offset}", "shards verify"):
        assert word in str(caught.value)
    assert decoders() == []


def test_a_missing_shard_is_named(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar is missing"):
        batches(load(folder))


def test_open_files_are_bounded(dataset, monkeypatch):
    monkeypatch.setattr("shards.store.OPEN_FILES", 2)
    store = Store(dataset, "train")
    for shard in [0, 1, 2, 0, 1, 2]:
        store.read(shard, 0)
        assert len(store._files) <= 2
    assert np.array_equal(store.table(0).key, load_table(dataset, dataset.split("train")[0])["key"])
