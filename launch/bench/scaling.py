"""What limits a data-parallel training on many GPUs: arithmetic on numbers that others measured, gave or looked up.

In: a `Job`, and a number of GPUs. Out: a `Row`. Invariants: nothing is measured, read or printed here; whatever cannot be known has two
bounds, a best and a worst; no rate is above that of as many GPUs which do nothing but step; what is named as the limit is the part
without which the epoch would be shortest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log2

SIZES = tuple(2**power for power in range(10))  # 1 to 512 GPUs
LIMITS = ("steps", "gradients", "loader", "storage", "checkpoints")  # fields of `Parts`
IMAGES = "images"  # the limit where an epoch has no whole batch


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training, as far as its speed goes. Seconds, bytes, and bytes/s each way; what is left at its default costs nothing.

    measured: (images, seconds) of optimizer steps on one GPU; the images of the first are a GPU's share, unless `global_batch` is set.
    images: of an epoch. gradients: bytes that each step sums over GPUs, in so many buckets. link: of a GPU within its node. network: of a
    node. latency: of one message. loader: images/s of the cores that `loader_gpus` GPUs share. image_bytes: stored, mean. storage: of
    the whole store, for all nodes together. lanes: `data.lanes`. checkpoint: of writing one. interval: between two inside an
    epoch. sync_every: `run.sync_every`. global_batch: images of a step over all GPUs, where that is fixed; else 0.
    """

    measured: tuple[tuple[int, float], ...]
    images: int
    gradients: float = 0
    buckets: int = 1
    gpus_per_node: int = 8
    link: float = inf
    network: float = inf
    latency: float = 0
    loader: float = inf
    loader_gpus: int = 1
    image_bytes: float = 0
    storage: float = inf
    lanes: int = 1
    checkpoint: float = 0
    interval: float = inf
    sync_every: int = 10
    global_batch: int = 0


@dataclass(frozen=True)
class Parts:
    """Seconds of what an epoch is made of: of a step, its gradients and its images; of the whole epoch's storage; of one checkpoint."""

    steps: float
    gradients: float
    loader: float
    storage: float
    checkpoints: float


@dataclass(frozen=True)
class Row:
    """A prediction. Pairs are of the worst and the best bound.

    share: images of a step on the GPU with the most. steps: of an epoch, its whole batches. left_out: images that an epoch does not
    reach. images_per_s: of all GPUs, checkpoints included. efficiency: its share of as many GPUs that do nothing but step. epoch_s: seconds,
    infinite where no step can be taken. limits: names.
    """

    gpus: int
    nodes: int
    global_batch: int
    share: int
    steps: int
    left_out: int
    images_per_s: tuple[float, float]
    efficiency: tuple[float, float]
    epoch_s: tuple[float, float]
    limits: tuple[str, str]


def predict(job: Job, gpus: int) -> Row:
    """What a training does on so many GPUs."""
    nodes = ceil(gpus / job.gpus_per_node)
    batch = job.global_batch or gpus * job.measured[0][0]
    share, n_steps = ceil(batch / gpus), job.images // batch
    facts = gpus, nodes, batch, share
    if batch < gpus or n_steps == 0:  # the harness refuses both
        return Row(*facts, 0, job.images, (0.0, 0.0), (0.0, 0.0), (inf, inf), (IMAGES, IMAGES))
    times, sums = step_seconds(job.measured, share), all_reduce_seconds(job, gpus)
    loader = share * min(gpus, job.loader_gpus) / job.loader
    storage = nodes * share_of_shards(job.lanes, nodes) * job.images * job.image_bytes / job.storage
    best, worst = (Parts(times[n], sums[n], loader, storage, job.checkpoint) for n in (0, 1))
    slow, slow_limit = epoch_and_limit(job, worst, n_steps, overlapped=False)
    fast, fast_limit = epoch_and_limit(job, best, n_steps, overlapped=True)
    rates = n_steps * batch / slow, n_steps * batch / fast
    alone, left_out = gpus * rate_alone(job), job.images - n_steps * batch
    efficiency = rates[0] / alone, rates[1] / alone
    return Row(*facts, n_steps, left_out, rates, efficiency, (slow, fast), (slow_limit, fast_limit))


def step_seconds(measured: Sequence[tuple[int, float]], images: int) -> tuple[float, float]:
    """Least and most seconds of an optimizer step of so many images on one GPU.

    Between two measured steps on the line through them. Above the largest in proportion to it. Below the smallest no longer than it, and no
    shorter than the line through the smallest two says (with one alone, than in proportion), or than at the best rate that was measured.
    """
    known = sorted(measured)
    (small, of_small), (large, of_large) = known[0], known[-1]
    if images >= large:
        return images * of_large / large, images * of_large / large
    if images < small:
        line = images * of_small / small
        if len(known) > 1:
            line = _on_line(known[0], known[1], images)
        return min(of_small, max(line, images / best_rate(measured))), of_small
    upper = next(n for n, (size, _) in enumerate(known) if size > images)
    seconds = _on_line(known[upper - 1], known[upper], images)
    return seconds, seconds


def _on_line(one: tuple[int, float], other: tuple[int, float], images: int) -> float:
    return one[1] + (images - one[0]) * (other[1] - one[1]) / (other[0] - one[0])


def best_rate(measured: Sequence[tuple[int, float]]) -> float:
    """The most images/s of one GPU that was measured."""
    return max(images / seconds for images, seconds in measured)


def rate_alone(job: Job) -> float:
    """Images/s of one GPU that does nothing but step, which efficiency is a share of: at a GPU's share, or, where that varies, at best."""
    images, seconds = job.measured[0]
    return best_rate(job.measured) if job.global_batch else images / seconds


def all_reduce_seconds(job: Job, gpus: int) -> tuple[float, float]:
    """Least and most seconds that it takes to sum the gradients of a step over GPUs.

    n processes must move 2(n - 1)/n of the bytes each, and a ring does so in 2(n - 1) messages (Patarasu and Yuan, 2009; Thakur, Rabenseifner
    and Gropp, 2005; the bus bandwidth of nccl-tests). Within each node first, then between nodes. At worst one after the other, in rings; at
    best at the same time, in the 2 log2(n) messages of a tree. Each bucket has its own messages.
    """
    inside, nodes = min(gpus, job.gpus_per_node), ceil(gpus / job.gpus_per_node)
    within = 2 * (inside - 1) / inside * job.gradients / job.link
    between = 2 * (nodes - 1) / nodes * job.gradients / job.network
    message = 2 * job.buckets * job.latency
    tree, rings = ceil(log2(gpus)), inside - 1 + nodes - 1
    return max(within, between) + tree * message, within + between + rings * message


def share_of_shards(lanes: int, nodes: int) -> float:
    """Share of the shards that one node reads in an epoch, at most: those of the lanes that its part of each batch is in.

    Batches are lane-major, so a node's part is a piece of lanes / nodes lanes, which begins at the edge of one where either divides the other.
    """
    begins_at_edge = lanes % nodes == 0 or nodes % lanes == 0
    touched = max(1, lanes // nodes) if begins_at_edge else lanes // nodes + 2
    return min(1.0, touched / lanes)


def training_seconds(parts: Parts, n_steps: int, overlapped: bool) -> float:
    """Seconds of an epoch's steps, or of what these wait for.

    Args:
        overlapped: gradients are summed wholly during the computation; else after it.
    """
    step = max(parts.steps, parts.gradients) if overlapped else parts.steps + parts.gradients
    return max(n_steps * max(step, parts.loader), parts.storage)


def count_checkpoints(job: Job, training: float, n_steps: int) -> int:
    """Checkpoints of an epoch whose steps take so many seconds: one at its end, and others where the ranks synchronise and one is due."""
    inside = (n_steps - 1) // job.sync_every
    return 1 + (inside if training >= inside * job.interval else int(training // job.interval))


def epoch_and_limit(job: Job, parts: Parts, n_steps: int, overlapped: bool) -> tuple[float, str]:
    """Seconds of an epoch, and the part without which, at as many checkpoints, it would be shortest.

    Checkpoints are written beside the training, one at a time: hidden by it where it lasts longer, or at worst all in the way of it. Of parts that hold it up equally, the first of `LIMITS`.
    """
    count = count_checkpoints(job, training_seconds(parts, n_steps, overlapped), n_steps)

    def seconds(of: Parts) -> float:
        training, writing = training_seconds(of, n_steps, overlapped), count * of.checkpoints
        return max(training, writing) if overlapped else training + writing

    return seconds(parts), min(LIMITS, key=lambda name: seconds(replace(parts, **{name: 0.0})))


def describe_limits(rows: Sequence[Row]) -> str:
    """What limits the training from which size on, as `steps from 1 GPU, checkpoints from 16 GPUs`."""
    found, before = [], ""
    for row in rows:
        name = name_limits(row)
        if name != before:
            found.append(f"{name} from {row.gpus} GPU{'s' * (row.gpus > 1)}")
        before = name
    return ", ".join(found)


def name_limits(row: Row) -> str:
    """The limit, or both where the bounds have different ones: that of the worst first."""
    return " or ".join(dict.fromkeys(row.limits))
