"""Options of the entry points that use a finished run: which runs, and what stands in place of their settings."""

import argparse

from shards.terminal import user_path


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """RUN, --with, --views, --image-size, --precision, --cache-dir, --cache-gb."""
    add = parser.add_argument
    add("run", type=user_path, help="the run's folder")
    add(
        "--with",
        dest="others",
        nargs="+",
        type=user_path,
        default=[],
        metavar="RUN",
        help="runs whose probabilities are averaged with those of the first, as an ensemble",
    )
    add("--views", help="none, flips, dihedral8 or spins:N (default: the run's eval.views)")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the model's input (default: the run's eval.image_size)",
    )
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the run's)")
    add("--cache-dir", help="of data behind a URL: folder where its files are kept (default: the run's data.cache_dir)")
    add(
        "--cache-gb",
        type=float,
        help="of data behind a URL: most that is kept there, in 10^9 bytes; 0 for nothing (default: the run's)",
    )
