"""The command `python -m launch.bench scaling`: its options, and how a prediction is said.

In: parsed options, with the settings of a run. Out: a table, what limits each size, and every number that they were made from.
Invariants: nothing is measured; a range is printed where one figure would claim too much.
"""

import argparse
import math

from launch.bench.scaling import SIZES, Row, describe_limits, name_limits, predict
from launch.bench.scaling_inputs import LINKS, read_job
from launch.bench.setup import positive_whole
from shards.terminal import user_path

FEW_STEPS, MANY_LEFT_OUT = 10, 0.1  # steps of an epoch, of which a training warns; share of its images
BOUNDS = (
    "low: gradients are summed after the backward pass, in rings, and a checkpoint stops the training; high: wholly during the step, in trees, and a "
    "checkpoint is hidden. DDP is between: it hides all but the last bucket"
)
NOT_IN_IT = (
    "stragglers, validation at the end of each epoch, the wait of run.sync_every, decoding threads that share Python and its cores with the step (`train` "
    "measures these), kernels of NCCL that take some of a GPU: the truth may be below `low`"
)


def add_scaling_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument_group("measured on one GPU").add_argument
    add("--step", type=user_path, nargs="+", metavar="FILE", help="of `step --json`; one for each batch size")
    add("--step-ms", type=positive, nargs="+", metavar="MS", help="or: of an optimizer step, augmentation included")
    add("--batch", type=positive_whole, nargs="+", metavar="N", help="images of each --step-ms")
    add("--loader", type=user_path, metavar="FILE", help="of `loader --json`")
    add("--loader-images-per-s", type=positive, metavar="N", help="or: of reading and decoding alone")
    text = "GPUs that share the cores which the loader was measured on (default 1)"
    add("--loader-gpus", type=positive_whole, default=1, metavar="N", help=text)
    add("--save", type=user_path, metavar="FILE", help="of `save --json`")
    add("--checkpoint-s", type=positive, metavar="S", help="or: seconds of a checkpoint")
    text = "between two checkpoints inside an epoch (default: run.save_every_minutes)"
    add("--minutes-between", type=positive, metavar="M", help=text)
    add("--remote", type=user_path, metavar="FILE", help="of `remote --json`: the loader's rate, bytes of an image")
    add = command.add_argument_group("of the cluster").add_argument
    add("--gpu", type=gpu_kind, metavar="KIND", help=f"--link-gb-s of its data sheet: {', '.join(LINKS)}")
    add("--link-gb-s", type=positive, metavar="GB/S", help="each way of one GPU, within its node")
    add("--network-gb-s", type=positive, metavar="GB/S", help="each way of a node (default: one node is predicted)")
    add("--gpus-per-node", type=positive_whole, default=8, metavar="N", help="(default 8)")
    add("--latency-us", type=positive, metavar="US", help="microseconds of one message (default: not counted)")
    text = "of the store, for all nodes together: then an epoch is one that reads every shard from there"
    add("--storage-mb-s", type=positive, metavar="MB/S", help=text)
    add = command.add_argument_group("of the training").add_argument
    add("--images", type=positive_whole, metavar="N", help="of an epoch (default: those of data.path)")
    add("--image-kb", type=positive, metavar="KB", help="mean stored bytes of an image (default: of data.path)")
    text = "images of a step over all GPUs, whatever their number (default: a GPU has the images of the first step)"
    add("--global-batch", type=positive_whole, default=0, metavar="N", help=text)


def positive(word: str) -> float:
    """The type of an option that takes a number above 0."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {word!r}")
    return number


def gpu_kind(word: str) -> str:
    """The type of an option that takes a GPU whose data sheet is known."""
    if word.lower() not in LINKS:
        raise argparse.ArgumentTypeError(
            f"no data sheet of {word!r} is known here. Give --link-gb-s in its place, or one of {', '.join(LINKS)}"
        )
    return word.lower()


def bench_scaling(options: argparse.Namespace) -> dict:
    """A row for each size from 1 to 512 GPUs, what limits each, and every number that it was made from.

    Raises:
        ValueError, OSError: a number that is missing or cannot be, or a file of another benchmark; with what to do.
    """
    job, said = read_job(options)
    one_node = options.network_gb_s is None
    rows = [predict(job, gpus) for gpus in SIZES if not one_node or gpus <= job.gpus_per_node]
    found = {"prediction": [_shown(row) for row in rows], "limited by": describe_limits(rows)}
    if few := [str(row.gpus) for row in rows if 0 < row.steps < FEW_STEPS]:
        found["few steps"] = f"below {FEW_STEPS} an epoch, of which training warns, on {', '.join(few)} GPUs"
    if many := [str(row.gpus) for row in rows if row.steps and row.left_out > MANY_LEFT_OUT * job.images]:
        found["left out"] = (
            f"more than {MANY_LEFT_OUT:.0%} of the images, others in each epoch, on {', '.join(many)} GPUs"
        )
    if one_node:
        found["more nodes"] = "give --network-gb-s (100 Gb/s Ethernet: 12.5; a port of InfiniBand HDR: 25, NDR: 50)"
    if job.global_batch:
        few_measured = "the line through the smallest two" if len(job.measured) > 1 else "proportion to the only one"
        found["shares below the smallest step"] = f"low: no faster than it; high: {few_measured}, an upper bound"
    return found | said | {"gpus per node": job.gpus_per_node, "low and high": BOUNDS, "not in it": NOT_IN_IT}


def _shown(row: Row) -> dict:
    """A row of the table."""
    most_s, least_s = (None if math.isinf(seconds) else seconds for seconds in row.epoch_s)
    return {
        "gpus": row.gpus,
        "global_batch": row.global_batch,
        "steps": row.steps,
        "left_out": row.left_out,
        "images_per_s_low": round(row.images_per_s[0]),
        "images_per_s_high": round(row.images_per_s[1]),
        "efficiency_low": row.efficiency[0],
        "efficiency_high": row.efficiency[1],
        "epoch_s_most": most_s,
        "epoch_s_least": least_s,
        "limited_by": name_limits(row),
    }
