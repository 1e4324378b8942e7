"""Which sample is where in an epoch: pure arithmetic over shard sizes and a seed.

In: the number of samples of each shard. Out: for positions of an epoch's stream, the shard and the row.
Invariants: the order is a function of (shard sizes, labels where classes are balanced, seed, epoch, lanes,
shuffle_block_shards) and of nothing else; ranks, threads and resuming only choose which positions they look up. Memory
is a block's, not the dataset's, and that of LARGE_BLOCK samples at most: the order of a larger block is computed by position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shards.permutation import FeistelPermutation

LARGE_BLOCK = 2**22  # samples; above it the order of a block is computed, up to it drawn as a table of 4 bytes a sample


@dataclass(frozen=True)
class Plan:
    """The order of training samples, for every epoch.

    shard_sizes: samples of each shard, in the dataset's order.
    global_batch: images in one optimizer step over all ranks.
    seed: a different seed gives different orders.
    lanes: the stream is cut into this many equal lanes, and each batch takes as many images from each lane.
    shuffle_block_shards: inside a lane, samples are shuffled within blocks of this many consecutive shards; 0 means all.
    labels: labels of a shard's rows, (samples,) int64, by its number. With them each class is drawn equally often within
        a block, and each sample of a class as often as the others, give or take one. An epoch has as many batches as
        without, so samples of frequent classes are not all reached, and those of rare classes are repeated (at other
        positions, so that they are augmented in another way).

    Raises:
        ValueError: lanes that do not divide the batch, a batch larger than the split, or labels over too large a block.
    """

    shard_sizes: tuple[int, ...]
    global_batch: int
    seed: int
    lanes: int = 1
    shuffle_block_shards: int = 0
    labels: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit together."""
        if self.global_batch < 1 or self.lanes < 1 or self.shuffle_block_shards < 0:
            raise ValueError(
                "'data.global_batch_size' and 'data.lanes' must be at least 1, 'data.shuffle_block_shards' at least 0."
            )
        if self.global_batch % self.lanes:
            raise ValueError(
                f"'data.lanes' must divide 'data.global_batch_size'. Got {self.lanes} lanes and {self.global_batch} images."
            )
        if self.n_batches == 0:
            raise ValueError(
                f"The training split has {sum(self.shard_sizes)} images, too few for one batch of 'data.global_batch_size' "
                f"{self.global_batch} from {self.lanes} lane(s). Lower data.global_batch_size."
            )
        if self.labels is not None and self.largest_block > LARGE_BLOCK:
            fits = max(1, LARGE_BLOCK // max(self.shard_sizes))
            raise ValueError(
                f"'optim.balance' sampler needs the labels of a whole block in memory, of {LARGE_BLOCK} images at most. A block may have "
                f"{self.largest_block} here. Set data.shuffle_block_shards to {fits} or less, or optim.balance to weights or none."
            )

    @cached_property
    def lane_length(self) -> int:
        """Positions of the stream in one lane."""
        return sum(self.shard_sizes) // self.lanes

    @cached_property
    def n_batches(self) -> int:
        """Full batches in one epoch."""
        return self.lane_length // (self.global_batch // self.lanes)

    @cached_property
    def largest_block(self) -> int:
        """Samples that a block has at most."""
        return largest_block(self.shard_sizes, self.lanes, self.shuffle_block_shards)

    @property
    def n_left_out(self) -> int:
        """Samples that one epoch does not reach (others in each epoch)."""
        return sum(self.shard_sizes) - self.n_batches * self.global_batch

    def describe(self) -> str:
        """Human-readable: what one epoch does not show, or that classes are balanced."""
        return "each class equally often" if self.labels else f"{self.n_left_out} dropped this epoch"

    def locate(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find samples by position in the epoch's stream of batches (batch k holds positions kB to (k+1)B - 1).

        Args:
            epoch: counted from 0.
            positions: (n,) int64.

        Returns:
            shard numbers and row numbers, both (n,) int64.
        """
        batch, within = np.divmod(np.asarray(positions, dtype=np.int64), self.global_batch)
        lane, place = np.divmod(within, self.global_batch // self.lanes)
        place = batch * (self.global_batch // self.lanes) + place  # within the lane
        of_epoch = self.of_epoch(epoch)
        order, starts = of_epoch.order, of_epoch.starts
        stream = np.empty_like(place)
        for number in np.unique(lane):
            here = lane == number
            stream[here] = self._shuffled(of_epoch, int(number), place[here])
        which = np.searchsorted(starts, stream, side="right") - 1
        return order[which], stream - starts[which]

    def of_epoch(self, epoch: int) -> "Epoch":
        """What is made once for an epoch; the last two are kept, since the next one begins while this one ends."""
        known = self._epochs
        if epoch not in known:
            for old in list(known)[:-1]:
                known.pop(old, None)
            known[epoch] = Epoch(self, epoch)
        return known[epoch]

    @cached_property
    def _epochs(self) -> dict[int, "Epoch"]:
        return {}

    def _shuffled(self, of_epoch: "Epoch", lane: int, places: np.ndarray) -> np.ndarray:
        """Places in a lane -> places in the stream of permuted shards, shuffled within blocks."""
        edges = of_epoch.block_edges(lane)
        stream = places + lane * self.lane_length
        block = np.searchsorted(edges, stream, side="right") - 1
        for number in np.unique(block):
            here = block == number
            low, high = int(edges[number]), int(edges[number + 1])
            order = of_epoch.block_order(lane, int(number), low, high)
            stream[here] = np.add(order[stream[here] - low], low, dtype=np.int64)
        return stream

    def permute_block(
        self, epoch: int, low: int, high: int, rng: np.random.Generator
    ) -> np.ndarray | FeistelPermutation:
        """The order of the places [low, high) of the stream of permuted shards, counted from low: (high - low,).

        Without labels a permutation, which is computed place by place where it is of more than LARGE_BLOCK; with them some
        places are repeated and others missing.
        """
        if self.labels is None and high - low > LARGE_BLOCK:
            return FeistelPermutation(high - low, rng)
        if self.labels is None:
            return rng.permutation(high - low).astype(np.int32)
        of_epoch = self.of_epoch(epoch)
        order, starts, ends = of_epoch.order, of_epoch.starts, of_epoch.ends
        parts = [
            self.labels(int(order[n]))[max(low - starts[n], 0) : high - starts[n]]
            for n in np.flatnonzero((starts < high) & (ends > low))
        ]
        return _balanced_order(np.concatenate(parts), rng).astype(np.int32)


class Epoch:
    """What the look-ups of one epoch share: it is made once, so that a batch costs the same however many shards there are.

    order: (shards,) int64, shard numbers in the order of the stream. starts, ends: (shards,) int64, where each begins and ends in it.
    """

    def __init__(self, plan: Plan, epoch: int) -> None:
        """Permute the shards."""
        self._plan, self._number = plan, epoch
        self.order = _philox(plan.seed, epoch, 0, 0).permutation(len(plan.shard_sizes))
        sizes = np.asarray(plan.shard_sizes, dtype=np.int64)[self.order]
        self.ends = np.cumsum(sizes)
        self.starts = self.ends - sizes
        self._edges: dict[int, np.ndarray] = {}
        self._blocks: dict[tuple[int, int], tuple[int, np.ndarray | FeistelPermutation]] = {}

    def block_edges(self, lane: int) -> np.ndarray:
        """Where the blocks of a lane begin in the stream, and where the last one ends: (blocks + 1,) int64."""
        if lane not in self._edges:
            length, shards = self._plan.lane_length, self._plan.shuffle_block_shards
            first, last = lane * length, (lane + 1) * length
            inside = slice(*np.searchsorted(self.starts, [first + 1, last]))  # shards that begin inside the lane
            edges = self.starts[inside][shards - 1 :: shards] if shards else self.starts[:0]
            self._edges[lane] = np.concatenate([[first], edges, [last]])
        return self._edges[lane]

    def block_order(self, lane: int, block: int, low: int, high: int) -> np.ndarray | FeistelPermutation:
        """The shuffled order of one block; each lane remembers its last two, so memory does not grow with the dataset."""
        number, order = self._blocks.get((lane, block % 2), (None, None))
        if number != block or order is None:
            rng = _philox(self._plan.seed, self._number, lane + 1, block)
            order = self._plan.permute_block(self._number, low, high, rng)
            self._blocks[lane, block % 2] = (block, order)
        return order


def largest_block(shard_sizes: Sequence[int], lanes: int, shuffle_block_shards: int) -> int:
    """Samples that a block of a plan has at most; of more than LARGE_BLOCK, the order is another than up to there."""
    lane_length = sum(shard_sizes) // lanes
    return min(lane_length, shuffle_block_shards * max(shard_sizes)) if shuffle_block_shards else lane_length


def rank_slice(batch_size: int, rank: int, world_size: int, group_size: int = 1) -> tuple[int, int]:
    """The positions [start, stop) of a global batch that a rank takes: uneven where the world does not divide it.

    Args:
        batch_size: images in the global batch.
        group_size: so many neighbours are never cut apart; it divides the batch.

    Raises:
        ValueError: more ranks than images.
    """
    parts = batch_size // group_size
    if world_size > parts:
        raise ValueError(
            f"'data.global_batch_size' is {batch_size} images for {world_size} processes: some would get none"
            + (f", as {group_size} stay together" if group_size > 1 else "")
            + ". Raise data.global_batch_size or start fewer processes."
        )
    return rank * parts // world_size * group_size, (rank + 1) * parts // world_size * group_size


def largest_share(batch_size: int, world_size: int, group_size: int = 1) -> int:
    """How many images of a global batch the rank with the most takes, as `rank_slice` shares them out."""
    return -(-(batch_size // group_size) // world_size) * group_size


def evaluation_ranges(n_samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """The [start, stop) ranges of a split, each of at most `batch_size` samples, that a rank evaluates.

    The cuts do not depend on the number of ranks; ranks take batches in turn, so every sample has exactly one rank.
    """
    starts = range(rank * batch_size, n_samples, world_size * batch_size)
    return [(start, min(start + batch_size, n_samples)) for start in starts]


def locate_in_order(shard_sizes: Sequence[int] | np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard and row numbers, both (n,), of places (n,) in a split in stored order; of many shards, sizes in an array are faster."""
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    which = np.searchsorted(starts, positions, side="right") - 1
    return which, positions - starts[which]


def _balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of a block, (n,) int64, that show each of its classes equally often; labels: (n,), by place."""
    present, length = np.unique(labels), len(labels)
    # Rounds of all classes, each in another order: neighbours seldom have one class, and any stretch is balanced.
    rounds = np.tile(present, (-(-length // len(present)), 1))  # (rounds, classes)
    classes, places = rng.permuted(rounds, axis=1).ravel()[:length], np.empty(length, dtype=np.int64)
    for label in present:
        members, here = np.flatnonzero(labels == label), np.flatnonzero(classes == label)
        passes = [rng.permutation(members) for _ in range(-(-len(here) // len(members)))]
        places[here] = np.concatenate([*passes, members[:0]])[: len(here)]
    return places


def _philox(seed: int, *counter: int) -> np.random.Generator:
    """A generator keyed by integers alone (Philox4x64, Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, *counter]))
