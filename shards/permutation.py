"""A shuffled order without a table of it: the place of a sample is computed when it is asked for.

In: a length, and a generator to draw keys from. Out: an order that is indexed like an array. Invariants: it is a permutation; what it
gives depends on its keys, its length and the place alone; it takes as much memory for 10^9 places as for two.
"""

import math

import numpy as np

ROUNDS = 6


class FeistelPermutation:
    """A permutation of the numbers 0 to length - 1, computed place by place.

    A number below rows x columns, the smallest near-square that holds all of them, is cut into a pair (row, column). Six times in
    turn, a hash of the one half is added to the other, which can be undone, so no two pairs become one: the generalised Feistel
    network of Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), with four rounds after Luby and
    Rackoff (1988), and two more. What falls beyond the length goes through again until it does not ("cycle walking", in the same paper):
    about one place in sqrt(length). Mitchell et al., "Bandwidth-optimal random shuffling for GPUs" (2022), shuffle in this way, too.
    """

    def __init__(self, length: int, rng: np.random.Generator):
        """Draw the keys of a permutation of so many places: at least 1, fewer than 2^62."""
        self._length = length
        self._rows = math.isqrt(length - 1) + 1
        self._columns = -(-length // self._rows)
        self._keys = rng.integers(0, 2**64, ROUNDS, dtype=np.uint64, endpoint=False)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """What stands at places (n,), integers from 0 to length - 1: (n,) int64."""
        found = self._once(np.asarray(places, dtype=np.int64))
        while (beyond := np.flatnonzero(found >= self._length)).size:
            found[beyond] = self._once(found[beyond])
        return found

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        """A permutation of the numbers below rows x columns."""
        row, column = np.divmod(numbers, self._columns)
        for key_of_row, key_of_column in self._keys.reshape(-1, 2):
            row = (row + _hash(column, key_of_row, self._rows)) % self._rows
            column = (column + _hash(row, key_of_column, self._columns)) % self._columns
        return row * self._columns + column


def _hash(numbers: np.ndarray, key: np.uint64, below: int) -> np.ndarray:
    """Numbers (n,) int64 as numbers from 0 to below - 1, by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = numbers.view(np.uint64) ^ key
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)  # wraps, as it must
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> 31)
    return (x % np.uint64(below)).view(np.int64)
