"""Decoded images that are kept are the ones that were decoded, whoever keeps them, and no image is decoded twice."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from test_loader import not_even_an_image, spoiled

from harness.data import decoded
from harness.data.decoded import DecodedCache, choose_kind, lacking_room, nbytes_of
from harness.data.loader import LoaderOptions, training_batches
from shards.plan import Plan
from shards.reader import SplitReader
from support.processes import assert_equal_weights, launch, state, weights

CPU = torch.device("cpu")


class CountingReader(SplitReader):
    """Counts how often each image is decoded."""

    def __init__(self, dataset):
        super().__init__(dataset, "train")
        self.decoded = Counter()

    def decode(self, shard, row, data, out):
        self.decoded[shard, row] += 1
        super().decode(shard, row, data, out)


def cache_of(reader: SplitReader, kind: str) -> DecodedCache | None:
    shape = reader.shard_sizes, reader.height, reader.width
    memory = {"none": None, "host": memoryview(bytearray(nbytes_of(*shape))), "device": CPU}[kind]
    return memory and DecodedCache(*shape, memory)


def epochs(reader, cache, bad_keys=None, ranks=1, first=0):
    """Three epochs, of all ranks in turns: [(images, labels, positions, keys)]."""
    options = LoaderOptions(2, 3, CPU, bad_keys, cache)
    plan = Plan(reader.shard_sizes, 12, seed=0)
    return [
        (batch.images.clone(), batch.labels, batch.positions, batch.keys)
        for epoch in range(3)
        for rank in range(ranks)
        for batch in training_batches(reader, plan, epoch, first if epoch == 0 else 0, rank, ranks, options)
    ]


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for ours_of_batch, theirs_of_batch in zip(ours, theirs, strict=True):
        for one, other in zip(ours_of_batch, theirs_of_batch, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize(("ranks", "first"), [(1, 0), (1, 2), (3, 0)])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_kept_images_are_those_that_were_decoded_and_none_is_decoded_twice(dataset, kind, ranks, first):
    """Also after a start in the middle of an epoch, and where ranks share the memory."""
    reader, plain = CountingReader(dataset), SplitReader(dataset, "train")
    assert_equal(
        epochs(reader, cache_of(reader, kind), ranks=ranks, first=first), epochs(plain, None, ranks=ranks, first=first)
    )
    assert set(reader.decoded.values()) == {1}
    assert len(reader.decoded) > sum(reader.shard_sizes) - 12


@pytest.mark.parametrize("kind", ["host", "device"])
def test_an_image_that_cannot_be_decoded_is_never_kept(packed, tmp_path, kind):
    changed, key, *_ = spoiled(packed, tmp_path, not_even_an_image)
    reader, bad, without = CountingReader(changed), [], []
    assert_equal(epochs(reader, cache_of(reader, kind), bad), epochs(SplitReader(changed, "train"), None, without))
    assert bad == without == [int(key)] * len(bad)
    assert len(bad) > 1
    assert sorted(Counter(reader.decoded.values())) == [1, len(bad)]


def test_a_batch_without_a_good_image_is_black_as_without_a_cache(dataset, monkeypatch):
    reader = SplitReader(dataset, "train")

    def fail(*_):
        raise ValueError("not an image")

    monkeypatch.setattr(reader, "decode", fail)
    expected = epochs(reader, None, [])
    for kind in ("host", "device"):
        cache = cache_of(reader, kind)
        assert_equal(epochs(reader, cache, []), expected)
        assert not cache.is_kept(np.arange(sum(reader.shard_sizes))).any()
    assert not expected[0][0].any()


GB = 10**9


@pytest.mark.parametrize(
    ("kind", "size", "gpu", "said"),
    [
        ("host", 2 * GB, None, ""),
        ("host", 3 * GB, None, "3.0 GB of decoded images are more than 50% of the 5.0 GB free in host memory"),
        ("device", 2 * GB, None, "there is no GPU"),
        ("device", 2 * GB, (20 * GB, 80 * GB), ""),
        ("device", 2 * GB, (3 * GB, 80 * GB), "2.0 GB .* of the 3.0 GB free on the GPU"),  # others use it
        ("device", 5 * GB, (16 * GB, 16 * GB), "or 25% of all"),
    ],
)
def test_images_are_kept_where_there_is_room_to_spare(monkeypatch, kind, size, gpu, said):
    monkeypatch.setattr(decoded, "free_memory", lambda: 5 * GB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: gpu)
    found = lacking_room(kind, size, torch.device("cuda" if gpu else "cpu"))
    assert re.search(said, found) if said else found == ""


@pytest.mark.parametrize(
    ("asked", "of_ranks", "found"),
    [
        ("host", [("d", ""), ("", "")], ("host", "")),
        ("host", [("", ""), ("", "h")], ("none", "h")),
        ("device", [("", "h"), ("", "h")], ("device", "")),
        ("device", [("", ""), ("d", "")], ("host", "d")),
        ("auto", [("", "h"), ("d", "")], ("none", "d; h")),  # what is free on the host counts for all
    ],
)
def test_all_ranks_keep_images_in_the_first_place_that_each_has_room_in(asked, of_ranks, found):
    assert choose_kind(asked, [dict(zip(("device", "host"), said, strict=True)) for said in of_ranks]) == found


def test_a_run_that_goes_on_with_a_cache_ends_with_the_same_bits(finished_run, tmp_path):
    words = ["--config", finished_run.parent / "tiny.yaml", "--run.folder", tmp_path / "run"]
    assert launch("driven", *words, disturb="stop@2").returncode == 75
    done = launch("train", *words, "--data.decoded_cache", "device")
    assert done.returncode == 0, done.stderr
    assert (
        "data.decoded_cache device is not possible (there is no GPU): it is host instead" in done.stdout + done.stderr
    )
    assert_equal_weights(weights(tmp_path / "run"), weights(finished_run))


def test_the_processes_of_a_machine_share_what_they_decode(finished_run, tmp_path):
    words = ["--config", finished_run.parent / "tiny.yaml", "--run.epochs", "2"]
    for name, kind in (("plain", "none"), ("kept", "host")):
        done = launch("train", *words, "--run.folder", tmp_path / name, "--data.decoded_cache", kind, ranks=2)
        assert done.returncode == 0, done.stderr
    assert "decoded images are kept in host memory after their first use: 0.00 GB, shared by 2 processes" in done.stdout
    assert state(tmp_path / "kept")["status"] == "finished"
    assert_equal_weights(weights(tmp_path / "kept"), weights(tmp_path / "plain"))
