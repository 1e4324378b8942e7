"""What would spoil a run here, and what mends it: `accelerate launch launch/doctor.py --config configs/ham10000.yaml`.

Takes the settings of `launch/train.py`, runs on as many processes as it is started with, and changes nothing. On a login
node without a GPU, `python launch/doctor.py --gpu p100` answers for that GPU.
"""

import argparse
import os
import sys

from harness.config import read_config
from harness.distributed.world import World
from harness.training.preflight import (
    Check,
    check_allreduce,
    check_consistency,
    check_cores,
    check_data,
    check_device,
    check_disk,
    check_named_gpu,
    check_weights,
    versions,
)
from launch.train import DEMO
from shards.index import load

MARKS = {"ok": ("ok  ", "32"), "warn": ("warn", "33"), "fail": ("FAIL", "31")}  # word, ANSI colour


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 if nothing is bad, else 1."""
    options, settings = _parser().parse_known_args(arguments)
    if options.gpu:
        try:
            checks = check_named_gpu(options.gpu)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return show([*checks, Check("ok", "versions", f"torch {versions()['torch']}")])
    config = read_config(settings, DEMO)
    device = check_device()  # first: without kernels for this GPU, nothing else can be asked of it
    if any(check.level == "fail" for check in device):
        return show(device)
    try:
        world = World(config.run.precision, config.run.channels_last)
    except (ValueError, OSError) as error:
        return show([*device, Check("fail", "processes", str(error))])
    data = world.run_on_main(check_data, config)
    try:
        dataset = load(config.data.path)
    except (OSError, ValueError):
        dataset = None  # on this rank
    checks = [
        *(*device, *check_allreduce(world), *check_consistency(world, dataset), *check_cores(config)),
        *(*check_disk(config, len(dataset.classes) if dataset else 7), *data, *check_weights(config)),
    ]
    code = world.run_on_main(show, checks)
    world.close()
    return code


def show(checks: list[Check]) -> int:
    """Print each finding, and below it what mends it; 1 if one is bad."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for check in checks:
        mark, colour = MARKS[check.level]
        print(f"\033[{colour}m{mark}\033[0m" if coloured else mark, f" {check.name:<11}", check.message)
        if check.fix:
            print(f"{'':18}to mend it: {check.fix}")
    bad = sum(check.level == "fail" for check in checks)
    print("nothing is in the way of a run" if not bad else f"{bad} to mend before a run", flush=True)
    return 1 if bad else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/doctor.py", description="Check this machine for a run. Takes the settings of launch/train.py, too."
    )
    parser.add_argument("--gpu", help="answer for this GPU (p100, v100, t4, a100, h100, ... or a capability, as 6.0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
