"""An order that is computed place by place is a permutation, looks random, and takes no memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from shards.permutation import FeistelPermutation
from shards.plan import LARGE_BLOCK, Plan
from support.processes import peak_memory

LENGTH = 1_000_003  # a prime: the last row of the pairs is not full


def drawn(length: int, seed: int) -> FeistelPermutation:
    return FeistelPermutation(length, np.random.Generator(np.random.Philox(key=[seed, 0])))


@given(st.integers(1, 5000), st.integers(0, 2**40))
def test_every_number_stands_at_exactly_one_place(length, seed):
    order = drawn(length, seed)
    assert len(order) == length
    assert np.array_equal(np.sort(order[np.arange(length)]), np.arange(length))


@given(st.integers(1, 2**61), st.integers(0, 2**40), st.randoms())
def test_a_place_gives_the_same_whatever_is_asked_for_beside_it(length, seed, random):
    places = np.array([0, length - 1, *(random.randrange(length) for _ in range(30))])
    whole = drawn(length, seed)[places]
    assert ((whole >= 0) & (whole < length)).all()
    assert [int(drawn(length, seed)[places[n : n + 1]][0]) for n in range(len(places))] == whole.tolist()


def chi_square(x: np.ndarray, y: np.ndarray, length: int, cells: int = 32) -> float:
    """Probability of a table of pairs as uneven as this, were x and y independent."""
    table = np.histogram2d(x, y, bins=cells, range=[[0, length]] * 2)[0]
    return float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize("seed", range(3))
def test_values_depend_on_neither_their_places_nor_their_neighbours(seed):
    order, places = drawn(LENGTH, seed), np.arange(LENGTH)
    values, columns = order[places], order._columns
    tables = [chi_square(places, values, LENGTH)]  # also of what is a row, or a column, of pairs apart
    tables += [chi_square(values[:-lag], values[lag:], LENGTH) for lag in (1, 2, columns, columns + 1)]
    tables += [chi_square(places % columns * (LENGTH / columns), values, LENGTH)]
    tables += [chi_square(places % columns * (LENGTH / columns), values % columns * (LENGTH / columns), LENGTH)]
    tables += [chi_square(places, values % columns * (LENGTH / columns), LENGTH)]
    assert all(1e-4 < probability < 1 - 1e-4 for probability in tables), tables
    for lag in (1, 2, columns, columns + 1):  # 5 standard deviations
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / LENGTH**0.5


def test_keys_that_differ_give_orders_as_unlike_as_chance_has_it():
    one, other = drawn(LENGTH, 1)[np.arange(LENGTH)], drawn(LENGTH, 2)[np.arange(LENGTH)]
    assert (one == other).sum() < 10  # 1 is expected
    assert chi_square(one, other, LENGTH) > 1e-4


def test_small_lengths_give_every_order_about_equally_often():
    often = np.unique([drawn(4, seed)[np.arange(4)] for seed in range(4800)], axis=0, return_counts=True)[1]
    assert len(often) == 24
    assert often.min() > 120  # 200 are expected; a table of 4 pairs is the hardest case there is


def test_orders_do_not_change_from_release_to_release():
    places = np.array([0, 1, 2, 10**9 - 1])
    assert drawn(10**9, 7)[places].tolist() == [64546345, 617908877, 352962939, 214018214]


def test_an_epoch_of_a_large_block_has_each_sample_once_and_takes_no_table():
    """Places and samples of the real thing are too many to look at; this many more than LARGE_BLOCK can be."""
    sizes = (LARGE_BLOCK // 64,) * 65
    plan = Plan(sizes, 64, seed=3)
    shards, rows = plan.locate(2, np.arange(sum(sizes)))
    assert np.array_equal(np.sort(shards * sizes[0] + rows), np.arange(sum(sizes)))
    assert isinstance(plan.of_epoch(2)._blocks[0, 0][1], FeistelPermutation)
    again = Plan(sizes, 64, seed=3).locate(2, np.arange(10**6, 10**6 + 64))
    assert all(np.array_equal(a, b[10**6 : 10**6 + 64]) for a, b in zip(again, (shards, rows), strict=True))
    assert not np.array_equal(plan.locate(3, np.arange(64))[0], shards[:64])


def test_blocks_up_to_the_limit_are_drawn_as_they_always_were():
    sizes = (LARGE_BLOCK // 64,) * 64
    plan, places = Plan(sizes, 64, seed=3), np.arange(0, LARGE_BLOCK, 997)
    of_epoch = plan.of_epoch(2)
    plan.locate(2, places)
    expected = np.random.Generator(np.random.Philox(key=[3, 0], counter=[0, 2, 1, 0])).permutation(LARGE_BLOCK)
    assert np.array_equal(of_epoch._blocks[0, 0][1], expected)


def test_the_order_of_a_billion_samples_takes_no_memory_to_speak_of():
    code = """
import sys, numpy as np
from shards.plan import Plan
if len(sys.argv) > 1:
    plan = Plan((10_000,) * 100_000, 64 * 512, 0, int(sys.argv[1]))
    for first in (0, plan.n_batches // 2):
        plan.locate(1, np.arange(first * plan.global_batch, first * plan.global_batch + 64))
"""
    nothing = peak_memory(code)
    for lanes in (1, 64):
        assert peak_memory(code, lanes) - nothing < 32  # MB; a table would take 8,000


def test_balanced_classes_over_too_large_a_block_are_refused_with_what_fits():
    sizes = (10_000,) * 1000
    with pytest.raises(ValueError, match=r"Set data\.shuffle_block_shards to 419 or less"):
        Plan(sizes, 64, 0, labels=lambda shard: np.zeros(10_000, int))
    assert Plan(sizes, 64, 0, shuffle_block_shards=419, labels=lambda shard: np.zeros(10_000, int)).largest_block
