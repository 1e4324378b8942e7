"""Check a machine, the data and the settings before a run: `accelerate launch launch/doctor.py --config configs/ham10000.yaml`.

Takes the settings of `launch/train.py`, runs on as many processes as it is started with, and changes nothing: what training
would refuse, it prints. On a login node without a GPU, `python launch/doctor.py --gpu p100` answers for that GPU.
"""

import argparse
import os
import sys

from harness.config import Config, read_config
from harness.distributed.hardware import set_arithmetic
from harness.distributed.launcher import uses_cuda
from harness.distributed.world import World
from harness.model.normalization import with_normalization
from harness.run.console import start_console
from harness.training.check import Check, tried
from harness.training.machine import (
    check_allreduce,
    check_cores,
    check_data_files,
    check_device,
    check_named_gpu,
    check_shared_memory,
    shared_memory,
    versions,
)
from harness.training.preflight import preflight
from shards.terminal import run_and_exit

MARKS = {"ok": ("ok  ", "32"), "warn": ("warn", "33"), "fail": ("FAIL", "31")}  # word, ANSI colour


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 if all checks passed, else 1."""
    options, settings = _parser().parse_known_args(arguments)
    start_console()
    if options.gpu:
        if settings:
            _parser().error(f"--gpu asks about a GPU alone; it goes with no other words: {' '.join(settings)}")
        checks = tried("GPU", check_named_gpu, options.gpu)
        return show([*checks, Check("ok", "versions", f"torch {versions()['torch']}")])
    config = read_config(settings)
    set_arithmetic(config.run.tf32, config.run.deterministic)  # before CUDA starts
    device = tried("device", check_device)  # first: without kernels for this GPU, nothing else can be asked of it
    if any(check.level == "fail" for check in device):
        return show(device)
    n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if uses_cuda() else 0
    device += check_shared_memory(n_gpus, shared_memory())  # before NCCL needs it
    try:
        world = World(config.run.precision, config.run.channels_last)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: of NCCL
        return show([*device, Check("fail", "processes", str(error))])
    config = world.run_on_main(normalized, config)
    checks, _ = preflight(config, world)
    checks = list(dict.fromkeys([*device, *checks]))
    checks += [*check_allreduce(world), *check_cores(config), *world.run_on_main(check_data_files, config)]
    code = world.run_on_main(show, checks)
    world.close()
    return code


def normalized(config: Config) -> Config:
    """The settings `with_normalization`, or as they are where the file of weights is damaged: `preflight` says so."""
    try:
        return with_normalization(config)
    except ValueError:
        return config


def show(checks: list[Check]) -> int:
    """Print each check, and below it what fixes it; 1 if one failed."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for check in checks:
        mark, colour = MARKS[check.level]
        print(f"\033[{colour}m{mark}\033[0m" if coloured else mark, f" {check.name:<11}", check.message)
        if check.fix:
            print(f"{'':18}fix: {check.fix}")
    failed = sum(check.level == "fail" for check in checks)
    print("all checks passed" if not failed else f"{failed} of {len(checks)} checks failed", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/doctor.py", description="Check this machine for a run. Takes the settings of launch/train.py, too."
    )
    parser.add_argument("--gpu", help="answer for this GPU (p100, v100, t4, a100, h100, ... or a capability, as 6.0)")
    return parser


if __name__ == "__main__":
    run_and_exit(main)
