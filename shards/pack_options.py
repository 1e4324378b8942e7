"""The options of `python -m shards pack`.

In: a parser. Out: options of a source, its split and how it is stored. Invariants: nothing is imported that is slow.
"""

import argparse
from pathlib import Path

from shards.column_options import add_column_options, parse_size
from shards.storage import PATIENCE_S
from shards.terminal import local_path, user_place


def add_pack_options(command: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = command.add_argument
    add(
        "source",
        type=user_place,
        help="folder of a public data set, folder with one folder a class, or a table; or the URL of one (s3://BUCKET/SOURCE, ...)",
    )
    add("out", type=user_place, help="folder to make, or its URL in object storage (s3://BUCKET/NAME, ...)")
    add("--seed", type=int, default=0, help="a different seed gives a different split (default 0)")
    add("--threads", type=int, default=0, help="decoding threads of each task (default: one a core)")
    add(
        "--on-bad-image",
        choices=("fail", "skip"),
        default="fail",
        help="images that cannot be decoded: name them all and keep nothing (default), or leave them out and list them",
    )
    add(
        "--patience",
        type=float,
        default=PATIENCE_S,
        help=f"seconds without a byte from or to a URL, tried again, until it is an error (default {PATIENCE_S:g})",
    )
    _add_source_options(command.add_argument_group("source"))
    _add_split_options(command.add_argument_group("split"))
    _add_storage_options(command.add_argument_group("storage"))


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    add_column_options(group)
    add = group.add_argument
    add("--citation", default="", help="how to cite the images (HAM10000 and ISIC 2018 are cited by themselves)")
    add("--license", default="", help="licence of the images (that of HAM10000 and ISIC 2018 is known)")
    add("--test-source", type=user_place, help="folder or URL of the ISIC 2018 test images and their ground truth")


def _add_split_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--protocol",
        help="how to split, see below (default lesion; column:split where folders are named train, val, test)",
    )
    add("--folds", type=int, default=0, help="number of cross-validation folds, 3 or more")
    add("--fold", type=int, help="with --folds: which fold is the test split, from 0 (default 0)")
    add(
        "--merge-duplicates",
        type=local_path,
        metavar="AUDIT.CSV",
        help="unite the groups of the pairs of an audit whose column `same` says yes",
    )
    add("--allow-mixed-labels", action="store_true", help="also of pairs with two labels")
    add("--holdout", type=float, default=0.0, help="share of groups, 0 to 1, cut as a common test set before all else")


def _add_storage_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--size", type=parse_size, default=(341, 256), help="stored WIDTHxHEIGHT in pixels (default 341x256)")
    add("--fit", default="cover", help="how an image is brought to that size: cover (default), contain or squeeze")
    add("--quality", type=int, default=90, help="JPEG quality of stored images (default 90)")
    add("--shard-samples", type=int, default=1000, help="most samples in one shard (default 1000)")
    add(
        "--also",
        type=_output,
        action="append",
        default=[],
        metavar="OUT=SIZE:FIT",
        help="pack the same split in another size, too, in the same pass: data/small=280x224:squeeze; may be repeated",
    )


def _output(text: str) -> tuple[Path | str, tuple[int, int], str]:
    out, _, stored = text.rpartition("=")
    size, _, fit = stored.partition(":")
    if not out:
        raise argparse.ArgumentTypeError(f"another output is OUT=SIZE:FIT, as data/small=280x224:squeeze. Got {text!r}")
    return user_place(out), parse_size(size), fit or "cover"
