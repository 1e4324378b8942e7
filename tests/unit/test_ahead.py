"""What is fetched ahead is what the plan will read."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.ahead import Ahead, Need, evaluation_needs, training_needs
from shards.plan import Plan, evaluation_ranges, locate_in_order, rank_slice


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    lanes=st.integers(1, 3),
    block=st.integers(0, 3),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_each_shard_that_a_rank_reads_is_needed_by_then_and_no_longer_than_said(sizes, lanes, block, world, epoch):
    batch = 4 * lanes
    if sum(sizes) // lanes < 4:
        return
    plan = Plan(tuple(sizes), batch, 3, lanes, block)
    for rank in range(world):
        start, stop = rank_slice(batch, rank, world)
        needs = training_needs(plan, epoch, start, stop)
        assert [need.first for need in needs] == sorted(need.first for need in needs)
        for number in range(plan.n_batches):
            read = set(plan.locate(epoch, np.arange(number * batch + start, number * batch + stop))[0].tolist())
            assert read <= {need.shard for need in needs if need.first <= number <= need.last}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 3))
def test_an_evaluation_needs_the_shards_of_its_ranges(sizes, batch, world):
    for rank in range(world):
        ranges = evaluation_ranges(sum(sizes), batch, rank, world)
        needs = evaluation_needs(tuple(sizes), ranges)
        for number, (start, stop) in enumerate(ranges):
            read = set(locate_in_order(tuple(sizes), np.arange(start, stop))[0].tolist())
            assert read <= {need.shard for need in needs if need.first <= number <= need.last}


def test_no_more_is_fetched_ahead_than_its_share_of_the_room_until_the_loop_comes_nearer():
    fetched = []
    needs = [Need(shard, shard, shard) for shard in range(10)]
    ahead = Ahead(needs, 0, lambda shard: fetched.append(shard) or True, lambda shard: 10, 80)
    assert wait_for(lambda: sorted(fetched) == [0, 1, 2, 3])
    ahead.reach(3)
    assert wait_for(lambda: sorted(fetched) == list(range(7)))
    ahead.close()


def test_a_shard_that_another_process_is_at_does_not_hold_up_the_next():
    tries, lock = [], threading.Lock()

    def fetch(shard):
        with lock:
            tries.append(shard)
            return shard != 0 or tries.count(0) > 1

    ahead = Ahead([Need(shard, 0, 9) for shard in range(6)], 0, fetch, lambda shard: 1, 100)
    assert wait_for(lambda: set(tries) == set(range(6)) and tries.count(0) == 2)
    ahead.close()


def test_nothing_is_begun_beside_a_shard_that_the_loop_waits_for():
    begun, slow = [], threading.Event()

    def fetch(shard):
        begun.append(shard)
        if shard in (0, 1):
            assert slow.wait(5)
        return True

    ahead = Ahead(
        [Need(0, 0, 3), Need(1, 0, 3), *(Need(shard, shard, 9) for shard in range(2, 6))], 0, fetch, lambda _: 1, 100
    )
    assert wait_for(lambda: sorted(begun) == [0, 1])  # both are needed now
    time.sleep(0.2)
    assert sorted(begun) == [0, 1]
    slow.set()
    assert wait_for(lambda: sorted(begun) == list(range(6)))
    ahead.close()


def wait_for(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "ahead"])
