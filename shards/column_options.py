"""Options that name what a source's table has: for every command that reads a source.

In: the parser of a command. Out: `Columns`.
"""

import argparse
from typing import TYPE_CHECKING

from shards.storage import PATIENCE_S
from shards.terminal import user_place

if TYPE_CHECKING:
    from shards.public_data import Columns  # imports pandas, and --help waits for it no more than it must


def add_column_options(group: argparse._ArgumentGroup) -> None:
    """--image-column, --image-root, --label-column, --label-columns, --class-names, --group-column."""
    add = group.add_argument
    add("--image-column", default="", help="of a table: paths of the images, from its folder, or their names")
    add("--image-root", type=user_place, help="folder of the images, or its URL (default: the table's)")
    add("--label-column", default="", help="of a table: class names")
    add(
        "--label-columns",
        type=parse_names,
        default=(),
        metavar="MEL,NV,...",
        help="of a table: columns with a 1 in the one of an image's class and 0 in the others",
    )
    add(
        "--class-names",
        type=parse_names,
        default=(),
        metavar="benign,malignant",
        help="names of the labels 0, 1, ... of --label-column, or the order of its classes",
    )
    add(
        "--group-column",
        type=parse_names,
        default=(),
        help="of a table: lesion or patient, never cut by a split; patient_id,lesion_id connects both",
    )


def columns_of(options: argparse.Namespace, patience: float = PATIENCE_S) -> "Columns":
    """What these options say. patience: seconds without a byte after which reading behind a URL fails.

    Raises:
        ValueError: two of them say the same thing in two ways.
        OSError: images behind a URL cannot be listed.
    """
    from shards.public_data import Columns
    from shards.tree import open_source

    if options.label_column and options.label_columns:
        raise ValueError("Give --label-column or --label-columns, not both.")
    labels = (options.label_column,) if options.label_column else options.label_columns
    root = options.image_root and open_source(options.image_root, patience)
    return Columns(options.image_column, labels, options.group_column, options.class_names, root)


def parse_names(text: str) -> tuple[str, ...]:
    """The type of an option that takes names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_size(text: str) -> tuple[int, int]:
    """The type of an option that takes a size, WIDTHxHEIGHT in pixels."""
    try:
        width, height = text.lower().split("x")
        return int(width), int(height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT in pixels, as 341x256. Got {text!r}") from error
