"""A list of shards is a sequence like any other, and takes little memory, however many there are."""

import re
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.bench.plan import write_index
from shards.shard_list import SHARD_COLUMNS, TAR_BLOCK, Shard, read_shards
from support.processes import peak_memory

SPLITS = ("train", "val", "test")
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)


@st.composite
def shards(draw):
    name = draw(st.from_regex(r"\A[a-z0-9][\w.-]{0,30}\Z", fullmatch=True).filter(str.isascii))
    samples, split = draw(st.integers(1, 10**9)), draw(st.sampled_from(SPLITS))
    size = samples * 2 * TAR_BLOCK + draw(st.integers(0, 2**40))
    return Shard(f"{name}.tar", split, samples, size, draw(DIGESTS), draw(DIGESTS))


def listed(rows: list[Shard], at_once: int = 3):
    table = pd.DataFrame([tuple(vars(row).values()) for row in rows], columns=pd.Index(SHARD_COLUMNS))
    return read_shards((table[start : start + at_once] for start in range(0, len(rows), at_once)), SPLITS, "a table")


@given(st.lists(shards(), max_size=12), st.integers(1, 5), st.integers(-15, 15), st.integers(-15, 15))
def test_it_gives_back_what_it_was_made_of(rows, at_once, start, stop):
    found = listed(rows, at_once)
    assert (list(found), len(found)) == (rows, len(rows))
    assert [found[place] for place in range(-len(rows), len(rows))] == rows + rows
    assert list(found[start:stop]) == rows[start:stop]
    for split in SPLITS:
        assert list(found.of_split(split)) == [row for row in rows if row.split == split]
    assert (found.samples.tolist(), found.bytes.tolist()) == ([r.samples for r in rows], [r.bytes for r in rows])
    assert found == listed(rows)
    if rows:
        assert found != listed(rows[:-1])
        assert found != listed([*rows[:-1], replace(rows[-1], samples=rows[-1].samples + 1, bytes=2**60)])
        with pytest.raises(IndexError):
            found[len(rows)]


def test_nobody_changes_it(dataset):
    for column in (dataset.shards.samples, dataset.split("train").bytes):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "0" * 62 + " 0", "x" * 64, "é" * 64])
@pytest.mark.parametrize("column", ["sha256", "table_sha256"])
def test_a_digest_that_is_none_is_named_with_its_shard(digest, column):
    rows = [Shard(f"train-{n}.tar", "train", 1, 4096, "1" * 64, "2" * 64) for n in range(5)]
    rows[3] = replace(rows[3], **{column: digest})
    said = f"a table: train-3.tar has {digest[:80]!r} as a SHA-256. Copy the dataset again"
    with pytest.raises(ValueError, match=re.escape(said)):
        listed(rows)


LOAD = """
import sys
from shards.index import load
if sys.argv[2]:
    dataset = load(sys.argv[1])
    assert len(dataset.split("train")) == 100_000
"""


def test_a_hundred_thousand_shards_take_less_memory_than_their_texts_would(tmp_path):
    write_index(tmp_path, 100_000, 10)
    assert peak_memory(LOAD, tmp_path, "load") - peak_memory(LOAD, tmp_path, "") < 40  # MB; as objects 85
