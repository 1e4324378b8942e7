"""The plan is exact: each batch full, each sample at most once an epoch, the same at any world size."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shards.plan import Plan, evaluation_ranges, largest_share, locate_in_order, rank_slice


@st.composite
def plans(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 30), min_size=1, max_size=12)))
    lanes = draw(st.integers(1, 4))
    batch = lanes * draw(st.integers(1, 6))
    assume(sum(sizes) // lanes >= batch // lanes)
    return Plan(sizes, batch, draw(st.integers(0, 2**40)), lanes, draw(st.integers(0, 4)))


def stream(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    positions = np.arange(plan.n_batches * plan.global_batch)
    shards, rows = plan.locate(epoch, positions)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


@given(st.integers(1, 50), st.integers(1, 50), st.sampled_from([1, 2]))
def test_the_largest_share_is_the_longest_slice_of_any_rank_and_the_first_is_the_smallest(parts, world, group_size):
    assume(world <= parts)
    slices = [rank_slice(parts * group_size, rank, world, group_size) for rank in range(world)]
    lengths = [stop - start for start, stop in slices]
    assert largest_share(parts * group_size, world, group_size) == max(lengths)
    assert lengths[0] == min(lengths)


@given(plans(), st.integers(0, 1000))
def test_an_epoch_is_full_batches_of_samples_that_exist_each_at_most_once(plan, epoch):
    samples = stream(plan, epoch)
    assert len(set(samples)) == len(samples) == plan.n_batches * plan.global_batch
    assert all(0 <= row < plan.shard_sizes[shard] for shard, row in samples)
    assert 0 <= plan.n_left_out < plan.global_batch + plan.lanes


@given(plans(), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 8]), st.randoms())
def test_ranks_together_see_the_batch_whatever_their_number_and_order(plan, epoch, world, random):
    assume(world <= plan.global_batch)
    whole = stream(plan, epoch)
    for number in range(plan.n_batches):
        base, found = number * plan.global_batch, {}
        ranks = list(range(world))
        random.shuffle(ranks)
        for rank in ranks:
            start, stop = rank_slice(plan.global_batch, rank, world)
            shards, rows = plan.locate(epoch, np.arange(base + start, base + stop))
            found |= dict(enumerate(zip(shards.tolist(), rows.tolist(), strict=True), start=base + start))
        assert [found[place] for place in sorted(found)] == whole[base : base + plan.global_batch]


@given(plans())
def test_lanes_and_blocks_keep_to_their_shards(plan):
    samples = stream(plan, 0)
    if plan.lanes == 1 and plan.shuffle_block_shards:
        starts = np.concatenate([[0], np.cumsum(plan.shard_sizes)])
        order = []  # shards by first appearance: a block's shards come before the next block's
        for shard, _ in samples:
            if shard not in order:
                order.append(shard)
        seen_at = {shard: [n for n, (s, _) in enumerate(samples) if s == shard] for shard in order}
        for shard in order:
            assert max(seen_at[shard]) - min(seen_at[shard]) < max(starts[-1], 1)
            assert len(seen_at[shard]) <= plan.shard_sizes[shard]


def test_a_block_holds_only_its_own_shards():
    plan = Plan((10,) * 6, 10, seed=1, shuffle_block_shards=2)
    samples = stream(plan, 4)
    blocks = [{shard for shard, _ in samples[start : start + 20]} for start in range(0, 60, 20)]
    assert [len(block) for block in blocks] == [2, 2, 2]
    assert set.union(*blocks) == set(range(6))


def test_a_lane_reads_only_its_own_part_of_the_stream():
    plan = Plan((10,) * 6, 6, seed=1, lanes=3)
    samples = stream(plan, 0)
    lanes = [{samples[n][0] for n in range(len(samples)) if n % 6 // 2 == lane} for lane in range(3)]
    assert [len(lane) for lane in lanes] == [2, 2, 2]
    assert set.union(*lanes) == set(range(6))


def test_epochs_and_seeds_differ_and_repeat():
    plan = Plan((50, 50), 10, seed=0)
    assert stream(plan, 0) == stream(Plan((50, 50), 10, seed=0), 0)
    assert stream(plan, 0) != stream(plan, 1)
    assert stream(plan, 0) != stream(Plan((50, 50), 10, seed=1), 0)


def test_what_one_epoch_drops_another_reaches():
    plan = Plan((10, 9), 4, seed=0)
    assert plan.n_left_out == 3
    assert plan.describe() == "3 dropped this epoch"
    assert len(set().union(*(stream(plan, epoch) for epoch in range(20)))) == 19


def test_the_full_shuffle_is_uniform_enough():
    plan = Plan((25, 25, 25, 25), 100, seed=5)
    places = np.zeros((100, 4))
    for epoch in range(400):
        for place, (shard, _) in enumerate(stream(plan, epoch)):
            places[place, shard] += 1
    assert abs(places / 400 - 0.25).max() < 0.11  # 5 standard deviations


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 9))
def test_every_evaluation_sample_has_exactly_one_rank_and_batches_do_not_depend_on_the_world(n, batch_size, world):
    batches = [cut for rank in range(world) for cut in evaluation_ranges(n, batch_size, rank, world)]
    assert sorted(batches) == evaluation_ranges(n, batch_size, 0, 1)
    assert sorted(place for start, stop in batches for place in range(start, stop)) == list(range(n))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_samples_in_order_are_the_shards_rows_in_order(sizes):
    shards, rows = locate_in_order(tuple(sizes), np.arange(sum(sizes)))
    expected = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected


def test_more_ranks_than_images_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="4 images for 5 processes"):
        rank_slice(4, 0, 5)


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="3 lanes and 4 images"):
        Plan((10,), 4, 0, lanes=3)
    with pytest.raises(ValueError, match="10 images, too few"):
        Plan((10,), 11, 0)


@given(st.integers(1, 20), st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 8]))
def test_shares_never_cut_a_pair(pairs, group_size, world):
    assume(world <= pairs)
    edges = [rank_slice(pairs * group_size, rank, world, group_size) for rank in range(world)]
    assert edges[0][0] == 0
    assert edges[-1][1] == pairs * group_size
    assert all(stop == start for (_, stop), (start, _) in pairwise(edges))
    assert all(start < stop and start % group_size == 0 for start, stop in edges)


@st.composite
def balanced_plans(draw):
    plain = draw(plans())
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_classes = draw(st.integers(1, 5))
    tables = [
        random.choice(n_classes, size, p=random.dirichlet(np.ones(n_classes) * 0.7)) for size in plain.shard_sizes
    ]
    return Plan(
        *(getattr(plain, name) for name in ("shard_sizes", "global_batch", "seed", "lanes", "shuffle_block_shards")),
        labels=lambda shard: tables[shard],
    ), tables


@given(balanced_plans(), st.integers(0, 50))
def test_a_balanced_epoch_draws_classes_equally_often_and_their_samples_too(drawn, epoch):
    plan, tables = drawn
    assume(plan.lanes == 1 and plan.shuffle_block_shards == 0)
    whole = sum(plan.shard_sizes)
    shards, rows = plan.locate(epoch, np.arange(plan.n_batches * plan.global_batch))
    order = plan.permute_block(epoch, 0, whole, np.random.default_rng(epoch))
    labels = np.concatenate([tables[shard] for shard in stream_order(plan, epoch)])[order]
    _, often = np.unique(labels, return_counts=True)
    assert len(order) == whole
    assert often.max() - often.min() <= 1
    start = [np.bincount(labels[: n + 1], minlength=5)[np.unique(labels)] for n in range(len(labels))]
    assert all(counts.max() - counts.min() <= 1 for counts in start)  # and in any stretch from the start
    for label in np.unique(labels):
        members = np.flatnonzero(np.concatenate([tables[shard] for shard in stream_order(plan, epoch)]) == label)
        times = np.bincount(order[np.isin(order, members)], minlength=whole)[members]
        assert times.max() - times.min() <= 1
    assert all(0 <= row < plan.shard_sizes[shard] for shard, row in zip(shards, rows, strict=True))


def stream_order(plan, epoch) -> list[int]:
    """Shards in the order of an epoch's stream."""
    return plan.of_epoch(epoch).order.tolist()


@given(balanced_plans(), st.integers(0, 3), st.sampled_from([1, 2, 3]), st.randoms())
def test_a_balanced_stream_is_the_same_however_it_is_looked_up(drawn, epoch, world, random):
    plan, _ = drawn
    assume(world <= plan.global_batch)
    whole, found = stream(plan, epoch), {}
    spans = [(n, rank) for n in range(plan.n_batches) for rank in range(world)]
    random.shuffle(spans)
    for number, rank in spans:
        start, stop = rank_slice(plan.global_batch, rank, world)
        positions = np.arange(number * plan.global_batch + start, number * plan.global_batch + stop)
        shards, rows = plan.locate(epoch, positions)
        found |= dict(zip(positions.tolist(), zip(shards.tolist(), rows.tolist(), strict=True), strict=True))
    assert [found[place] for place in sorted(found)] == whole


def test_a_balanced_plan_without_rare_classes_still_changes_from_epoch_to_epoch():
    tables = [np.array([0] * 9 + [1]), np.array([0] * 8 + [1, 2])]
    plan = Plan((10, 10), 6, 3, labels=lambda shard: tables[shard])
    assert plan.describe() == "each class equally often"
    epochs = [stream(plan, epoch) for epoch in range(4)]
    assert len({tuple(found) for found in epochs}) == 4
    rare = [(1, 9)]
    assert all(4 <= found.count(rare[0]) <= 7 for found in epochs)  # a third of 18, less what is left out


def test_orders_do_not_change_from_release_to_release():
    sizes = (7, 11, 3, 9)
    labels = [np.arange(size) % 3 for size in sizes]
    for lookup, expected in ((None, "448e5a9d3266b461"), (labels.__getitem__, "c46eb9d79050380d")):
        plan = Plan(sizes, 6, seed=2**33, lanes=2, shuffle_block_shards=2, labels=lookup)
        digest = hashlib.sha256(np.array([stream(plan, epoch) for epoch in range(3)], dtype="<i8").tobytes())
        assert digest.hexdigest()[:16] == expected


def test_looking_up_a_batch_scans_neither_shards_nor_lanes_again():
    """What grows with the number of shards is made once an epoch, and two epochs are kept."""
    plan = Plan(tuple([10] * 400), 64, 0, lanes=8, shuffle_block_shards=4)
    positions = np.arange(640, 704)
    first = plan.locate(5, positions)
    of_epoch = plan.of_epoch(5)
    assert [edges.tolist() for edges in (of_epoch.block_edges(lane) for lane in range(2))] == [
        [0, *range(40, 500, 40), 500],
        [500, *range(540, 1000, 40), 1000],
    ]
    again = plan.locate(5, positions)
    assert plan.of_epoch(5) is of_epoch
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    for epoch in range(6, 9):
        plan.locate(epoch, positions)
    assert list(plan._epochs) == [7, 8]
    fresh = Plan(tuple([10] * 400), 64, 0, lanes=8, shuffle_block_shards=4)
    assert all(np.array_equal(a, b) for a, b in zip(fresh.locate(7, positions), plan.locate(7, positions), strict=True))
