"""Measure, on this machine: `python -m launch.bench loader --data.path data/ham10000`.

Each subcommand prints a short table and, with --json FILE, writes its numbers. Those that train or load take the
settings of `launch/train.py`. Machines differ and are shared: compare the ratios of one run.
"""

import argparse
import json
import os
import platform
import sys

import pandas as pd
import torch

from harness.config import read_config
from harness.distributed.hardware import available_cores
from launch.bench.loader import bench_compare, bench_loader, bench_resume
from launch.bench.packing import bench_pack
from launch.bench.plan import bench_plan
from launch.bench.remote import bench_remote
from launch.bench.scaling_command import add_scaling_options, bench_scaling
from launch.bench.setup import positive_whole
from launch.bench.step import bench_augment, bench_evaluate, bench_save, bench_step, bench_train
from launch.bench.whole import bench_run
from shards.column_options import add_column_options, parse_names
from shards.terminal import run_and_exit, user_path


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark."""
    options, settings = _parser().parse_known_args(arguments)
    if settings and options.run in (bench_pack, bench_plan, bench_audit):
        _parser().error(f"unknown words: {' '.join(settings)}")
    if options.json and not options.json.absolute().parent.is_dir():
        _parser().error(f"--json: the folder {options.json.absolute().parent} does not exist")
    try:
        options.config, options.settings = read_config(settings), settings
        numbers = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.run is not bench_scaling:  # it measures nothing
        numbers["machine"] = {
            "cores": available_cores(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
    if os.environ.get("RANK", "0") != "0":
        return 0  # rank 0 speaks for all
    for name, value in numbers.items():
        if isinstance(value, list):  # a row each
            print(f"{name}\n{pd.DataFrame(value).to_string(index=False, float_format='{:.3f}'.format, na_rep='')}")
        else:
            print(f"{name:<40} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 0


def bench_audit(options: argparse.Namespace) -> dict:
    """Copies planted among one's own images, and what an audit finds of them."""
    try:
        from launch.bench.planted import measure_planted
    except ImportError as error:
        raise ValueError(
            f"An audit needs {error.name}, which is not installed: pip install -e '.[audit]' in the folder of the harness."
        ) from error
    return measure_planted(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description="Measure on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pack = commands.add_parser("pack", help="images/s and memory of packing, beside a plain Pillow loop")
    pack.add_argument("--threads", type=int, default=0, help="decoding threads (default: one a core)")
    pack.add_argument("--plain", type=positive_whole, default=1000, help="images of the plain loop (default 1000)")
    pack.set_defaults(run=bench_pack)
    plan = commands.add_parser("plan", help="memory and time of the order of very many samples, on one rank of many")
    _add_plan(plan)
    audit = commands.add_parser("audit", help="what an audit finds of copies planted among one's own images")
    _add_audit(audit)
    text = "what limits a training on 1 to 512 GPUs, from what was measured on one: a prediction"
    scaling = commands.add_parser(
        "scaling", help=text, description=f"{text}. Takes the settings of launch/train.py, too."
    )
    add_scaling_options(scaling)
    scaling.set_defaults(run=bench_scaling)
    for name, run, text in (
        ("loader", bench_loader, "images/s of reading and decoding, and its share of the decode ceiling"),
        ("step", bench_step, "an optimizer step on a batch in memory, and its augmentation"),
        ("augment", bench_augment, "augmentation of a batch in memory"),
        ("train", bench_train, "the real loop, and its ratio to `step`"),
        ("run", bench_run, "whole epochs of a run, validation and checkpoints included, and their ratio to `step`"),
        ("evaluate", bench_evaluate, "one view and eight"),
        ("resume", bench_resume, "time to the first batch, at the start of an epoch and in its middle"),
        ("save", bench_save, "a checkpoint: ms that training waits, seconds of writing"),
        ("remote", bench_remote, "reading behind a URL, with an empty cache and a warm one, beside a disk"),
        ("compare", bench_compare, "other input pipelines on the same images, in turns"),
    ):
        about = f"{text}. Takes the settings of launch/train.py, too."
        command = commands.add_parser(name, help=text, description=about)
        command.add_argument(
            "--rounds", type=positive_whole, default=3, help="repetitions; the best counts (default 3)"
        )
        command.set_defaults(run=run)
    train, whole, save, compare = (commands.choices[name] for name in ("train", "run", "save", "compare"))
    train.add_argument("--batches", type=positive_whole, default=40, help="most batches of a round (default 40)")
    remote = commands.choices["remote"]
    remote.add_argument("--url", help="of the dataset of data.path (default: its own file:// URL)")
    remote.add_argument(
        "--peers",
        metavar="URL",
        help="compare with litdata and MosaicML Streaming, whichever is installed: their files are put below this URL, read, and removed",
    )
    for command in (pack, plan, whole, save, audit):
        command.add_argument("--scratch", type=user_path, help="folder for temporary files (default: the system's)")
    for command in (pack, compare):
        command.add_argument("--source", type=user_path, required=True, help="HAM10000 folder")
    for command in commands.choices.values():
        command.add_argument("--json", type=user_path, help="write the numbers here, too")
    return parser


def _add_plan(command: argparse.ArgumentParser) -> None:
    for name, value, text in (
        ("shards", 100_000, "shards of the dataset"),
        ("shard-samples", 10_000, "samples of each"),
        ("ranks", 512, "processes of the run"),
        ("batch", 256, "images of a process in a batch"),
        ("lanes", 64, "data.lanes, beside 1"),
    ):
        command.add_argument(f"--{name}", type=positive_whole, default=value, help=f"{text} (default {value})")
    command.add_argument(
        "--block-shards", type=int, default=0, help="data.shuffle_block_shards (default 0: all of a lane)"
    )
    command.set_defaults(run=bench_plan)


def _add_audit(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("path", type=user_path, metavar="SOURCE", help="as `python -m shards audit` takes it")
    add("--images", type=positive_whole, default=500, help="images that are copied (default 500)")
    add("--others", type=positive_whole, default=3000, help="images beside them (default 3000)")
    add("--seed", type=int, default=0, help="of the choice, and of the changes (default 0)")
    add("--kinds", type=parse_names, default=(), metavar="'JPEG 20,turn'", help="changes of the copies (default: all)")
    add(
        "--cnn",
        default="",
        metavar="FILE",
        help="weights of imagededup's CNN: a .safetensors file that names its model, or `own` (default: no CNN)",
    )
    add_column_options(command.add_argument_group("columns of a source's table"))
    command.set_defaults(run=bench_audit)


if __name__ == "__main__":
    run_and_exit(main)
