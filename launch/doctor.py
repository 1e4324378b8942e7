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
    Finding,
    look_at_cores,
    look_at_data,
    look_at_device,
    look_at_disk,
    look_at_sameness,
    look_at_weights,
    look_at_world,
    named_gpu,
    versions,
)
from launch.train import DEMO
from shards.index import load

MARKS = {"good": ("ok  ", "32"), "warning": ("note", "33"), "problem": ("BAD ", "31")}  # word, ANSI colour


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 if nothing is bad, else 1."""
    options, settings = _parser().parse_known_args(arguments)
    if options.gpu:
        try:
            findings = named_gpu(options.gpu)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return show([*findings, Finding("good", "versions", f"torch {versions()['torch']}")])
    config = read_config(settings, DEMO)
    device = look_at_device()  # first: without kernels for this GPU, nothing else can be asked of it
    if any(finding.level == "problem" for finding in device):
        return show(device)
    try:
        world = World(config.run.precision, config.run.channels_last)
    except (ValueError, OSError) as error:
        return show([*device, Finding("problem", "processes", str(error))])
    data = world.on_main(look_at_data, config)
    try:
        dataset = load(config.data.path)
    except (OSError, ValueError):
        dataset = None  # on this rank
    findings = [
        *(*device, *look_at_world(world), *look_at_sameness(world, dataset), *look_at_cores(config)),
        *(*look_at_disk(config, len(dataset.classes) if dataset else 7), *data, *look_at_weights(config)),
    ]
    code = world.on_main(show, findings)
    world.close()
    return code


def show(findings: list[Finding]) -> int:
    """Print each finding, and below it what mends it; 1 if one is bad."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for finding in findings:
        mark, colour = MARKS[finding.level]
        print(f"\033[{colour}m{mark}\033[0m" if coloured else mark, f" {finding.what:<11}", finding.text)
        if finding.cure:
            print(f"{'':18}to mend it: {finding.cure}")
    bad = sum(finding.level == "problem" for finding in findings)
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
