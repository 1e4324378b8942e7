"""Random numbers are hashes of seed, stream and position; names of draws are their numbers."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.data.random import named_uniforms, noise_seed, stream_checksum, uniforms


@given(
    st.integers(0, 2**31), st.integers(0, 500), st.lists(st.integers(0, 2**40), min_size=1, max_size=9), st.randoms()
)
def test_random_numbers_belong_to_the_position_not_to_its_company(seed, epoch, positions, random):
    together = uniforms(seed, epoch, torch.tensor(positions), 5)
    number = random.randrange(len(positions))
    alone = uniforms(seed, epoch, torch.tensor(positions[number : number + 1]), 5)
    assert torch.equal(together[number : number + 1], alone)
    assert ((together >= 0) & (together < 1)).all()


def test_random_numbers_are_splitmix64():
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    seed, epoch, position = 7, 3, 12345
    state = mix((mix((mix(seed) + epoch) % 2**64) + position) % 2**64)
    expected = [(mix((state + 0x9E3779B97F4A7C15 * n) % 2**64) >> 40) * 2.0**-24 for n in (1, 2, 3)]
    assert uniforms(seed, epoch, torch.tensor([position]), 3)[0].tolist() == expected


def test_random_numbers_are_uniform_and_uncorrelated():
    draws = uniforms(0, 0, torch.arange(20000), 6).numpy()
    assert abs(draws.mean(0) - 0.5).max() < 0.012
    assert abs(draws.var(0) - 1 / 12).max() < 0.003
    assert abs(np.corrcoef(np.hstack([draws[:-1], draws[1:]]).T) - np.eye(12)).max() < 0.035
    assert abs(uniforms(0, 0, torch.arange(99), 2) - uniforms(0, 1, torch.arange(99), 2)).mean() > 0.2
    assert abs(uniforms(0, 0, torch.arange(99), 2) - uniforms(1, 0, torch.arange(99), 2)).mean() > 0.2


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 9))
def test_checksums_of_shares_add_up_and_notice_a_swap(n, world, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, positions = torch.randperm(n, generator=generator), torch.arange(n)
    whole = stream_checksum(keys, positions)
    parts = zip(keys.tensor_split(world), positions.tensor_split(world), strict=True)
    assert sum(stream_checksum(*part) for part in parts) == whole
    if n > 1:
        assert stream_checksum(keys.roll(1), positions) != whole


class Early(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Later(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor
    appended: torch.Tensor


def test_a_draw_that_is_appended_changes_none_before_it():
    positions = torch.arange(50)
    early, later = (named_uniforms(3, 1, positions, names) for names in (Early, Later))
    assert torch.equal(torch.stack(early, 1), uniforms(3, 1, positions, 2))
    assert torch.equal(early.first, later.first)
    assert torch.equal(early.second, later.second)
    assert not torch.equal(later.second, later.appended)


def test_seeds_of_dropout_are_others_for_another_seed_step_or_place_in_the_batch():
    """seed + step would make seed 1 the copy of seed 0, a step later, and give all ranks one mask."""
    seeds = {
        noise_seed(seed, step, position) for seed in range(20) for step in range(20) for position in range(0, 64, 8)
    }
    assert len(seeds) == 20 * 20 * 8
    assert noise_seed(3, 5, 8) == noise_seed(3, 5, 8) == 6370875286290916719
    assert 0 <= noise_seed(2**62 - 1, 2**40, 2**20) < 2**63
