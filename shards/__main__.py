"""`python -m shards demo | pack | verify | show`: make packed datasets and look at them."""

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from shards import catalogue, demo, index, split
from shards.contact_sheet import dataset_rows, draw_sheet
from shards.image import FITS
from shards.pack import Packing, pack_several

PLAIN = {
    **{
        "lesion": split.split_by_lesion,
        "image": split.split_by_image,
        "notebook": split.split_notebook,
        "notebook-leaky": split.split_notebook_leaky,
    },
    "test": split.external_test,
}
PROTOCOLS = """\
protocols:
  lesion       groups (lesions) of each class, .70/.15/.15; the default. With --folds: cross-validation
  notebook     the 2021 notebook's without its leak: one image a lesion, 80/20; validation doubles as test
  isic2018     train and validation from HAM10000, test from the challenge's images in --test-source
  column:NAME  the source says train, val or test in that column
  test         every image is test: a set of another origin, to evaluate a trained model on
for studies, marked as leaking:
  image        images of each class, .70/.15/.15, wherever their lesions land
  notebook-leaky the notebook's, with its leak: every validation image is a training image
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; errors of the user's making end as one sentence and exit code 1."""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130


def _demo(options) -> int:
    demo.draw(options.out, options.images, options.seed)
    print(f"drew {options.images} demo lesions; next: python -m shards pack {options.out} data/demo")
    return 0


def _pack(options) -> int:
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise FileExistsError(f"{options.out} exists already. Give another folder, or remove it: rm -r {options.out}")
    packing = Packing(options.size, options.fit, options.quality, options.shard_samples)
    start = time.perf_counter()
    source = _read_source(options)
    chosen = _choose_split(options, source.images)
    outputs = [
        (options.out, packing),
        *((out, replace(packing, size=size, fit=how)) for out, size, how in options.also),
    ]
    described = pack_several(source, chosen, outputs, options.threads)[0]
    seconds = time.perf_counter() - start
    dataset = index.load(options.out)
    images, size = sum(s.samples for s in dataset.shards), sum(s.bytes for s in dataset.shards)
    print(
        f"packed {images} images into {len(dataset.shards)} shards ({size / 1e6:.0f} MB) in {seconds:.0f} s, "
        f"{images / seconds:.0f} images/s; left out {described.left_out} (left_out.csv says why)"
    )
    _print_table(options.out, dataset)
    return 0


def _read_source(options) -> catalogue.Catalogue:
    path: Path = options.source
    if options.protocol == "isic2018":
        if options.test_source is None:
            raise ValueError("--protocol isic2018 needs --test-source, the folder of the challenge's test images.")
        return catalogue.read_isic2018(path, options.test_source)
    if path.suffix.lower() in (".csv", ".parquet"):
        if not (options.image_column and options.label_column):
            raise ValueError(
                f"{path.name} needs --image-column and --label-column (and --group-column if it has groups)."
            )
        return catalogue.read_table(path, options.image_column, options.label_column, options.group_column)
    if path.is_dir() and not any((path / name).is_file() for name in catalogue.METADATA):
        return catalogue.read_class_folders(path)
    return catalogue.read_ham10000(path)


def _choose_split(options, images) -> split.Split:
    name, seed = options.protocol, options.seed
    own_test = name in ("isic2018", "test") or name.startswith("column:")
    if options.folds and name != "lesion":
        raise ValueError(f"--folds goes with --protocol lesion. Got --protocol {name}.")
    if own_test and options.holdout:
        raise ValueError(f"--holdout does not go with --protocol {name}, which has a test split of its own.")
    if name == "isic2018":
        return split.split_isic2018(images, seed)
    if name.startswith("column:"):
        return split.split_by_column(images, name.removeprefix("column:"), seed)
    if name not in PLAIN:
        raise ValueError(
            f"The '--protocol' must be one of {', '.join(PLAIN)}, isic2018, column:NAME. Got {name!r} instead."
        )
    if options.folds:
        held_out = bool(options.holdout)
        protocol = partial(split.split_by_fold, seed=seed, n_folds=options.folds, fold=options.fold, held_out=held_out)
    elif name in ("lesion", "image") and options.holdout:
        train, val = split.FRACTIONS[0], split.FRACTIONS[1]
        protocol = partial(PLAIN[name], seed=seed, fractions=(train / (train + val), val / (train + val)))
    else:
        protocol = partial(PLAIN[name], seed=seed)
    return split.with_holdout(images, options.holdout, protocol) if options.holdout else protocol(images)


def _verify(options) -> int:
    problems = index.verify(options.out)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{options.out}: {len(problems)} problem(s)")
        return 1
    dataset = index.load(options.out)
    print(f"{options.out}: {len(dataset.shards)} shards as packed, fingerprint {dataset.fingerprint[:12]}")
    return 0


def _show(options) -> int:
    dataset = index.load(options.out)
    _print_table(options.out, dataset)
    picture = options.sheet or options.out.resolve().with_name(f"{options.out.resolve().name}-sheet.png")
    draw_sheet(dataset_rows(dataset), picture, f"{options.out.name}, {about_split(dataset)}")
    print(f"contact sheet: {picture}")
    return 0


def about_split(dataset: index.Dataset) -> str:
    """The split's protocol and parameters, in one line."""
    settings = ", ".join(f"{name} {value}" for name, value in dataset.description.protocol.items() if name != "name")
    return f"protocol {dataset.description.protocol['name']} ({settings})"


def _print_table(out: Path, dataset: index.Dataset) -> None:
    about = dataset.description
    print(f"{out}: {about.source['name']}, {dataset.width}x{dataset.height}, fingerprint {dataset.fingerprint[:12]}")
    print(about_split(dataset))
    names = list(about.counts)
    print(f"{'class':<12}" + "".join(f"{name:>8}" for name in names))
    for label in dataset.classes:
        print(f"{label:<12}" + "".join(f"{about.counts[name][label]:>8}" for name in names))
    print(f"{'images':<12}" + "".join(f"{sum(about.counts[name].values()):>8}" for name in names))
    for alias, real in about.aliases.items():
        print(f"{alias} is {real} under another name")
    for warning in about.warnings:
        print(f"warning: {warning}")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = text.lower().split("x")
        return int(width), int(height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT in pixels, as 341x256. Got {text!r}") from error


def _output(text: str) -> tuple[Path, tuple[int, int], str]:
    out, _, stored = text.rpartition("=")
    size, _, how = stored.partition(":")
    if not out or (how or "cover") not in FITS:
        raise argparse.ArgumentTypeError(f"another output is OUT=SIZE:FIT, as data/small=280x224:squeeze. Got {text!r}")
    return Path(out), _size(size), how or "cover"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="draw lesions in HAM10000's layout")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--images", type=int, default=700, help="pictures to draw (default 700)")
    command.add_argument("--seed", type=int, default=0, help="another seed draws other lesions (default 0)")
    command.set_defaults(run=_demo)
    command = commands.add_parser(
        "pack",
        help="pack images into shards",
        epilog=PROTOCOLS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "source", type=Path, help="HAM10000 folder, folder with one folder a class, CSV or Parquet file"
    )
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--protocol", default="lesion", help="how to split, see below (default lesion)")
    command.add_argument("--folds", type=int, default=0, help="number of cross-validation folds, 3 or more")
    command.add_argument("--fold", type=int, default=0, help="which fold is the test split, from 0 (default 0)")
    command.add_argument(
        "--holdout", type=float, default=0, help="share of groups cut as a common test set before all else"
    )
    command.add_argument("--test-source", type=Path, help="folder of the ISIC 2018 test images and their ground truth")
    command.add_argument("--image-column", help="of a CSV or Parquet file: paths of the images, from the file's folder")
    command.add_argument("--label-column", help="of a CSV or Parquet file: class names")
    command.add_argument(
        "--group-column", help="of a CSV or Parquet file: lesion, whose images have one label; never cut by a split"
    )
    command.add_argument("--seed", type=int, default=0, help="another seed gives another split (default 0)")
    command.add_argument(
        "--size", type=_size, default=(341, 256), help="stored WIDTHxHEIGHT in pixels (default 341x256)"
    )
    command.add_argument("--fit", choices=FITS, default="cover", help="how a picture is brought to that size")
    command.add_argument(
        "--also",
        type=_output,
        action="append",
        default=[],
        metavar="OUT=SIZE:FIT",
        help="pack the same split in another size, too, in the same pass: data/small=280x224:squeeze; may be repeated",
    )
    command.add_argument("--quality", type=int, default=90, help="JPEG quality of stored pictures (default 90)")
    command.add_argument("--shard-samples", type=int, default=1000, help="most samples in one shard (default 1000)")
    command.add_argument("--threads", type=int, default=0, help="decoding threads (default: one a core)")
    command.set_defaults(run=_pack)
    command = commands.add_parser("verify", help="check every file against its SHA-256")
    command.add_argument("out", type=Path, help="packed folder")
    command.set_defaults(run=_verify)
    command = commands.add_parser("show", help="print the class table of each split and draw a contact sheet")
    command.add_argument("out", type=Path, help="packed folder")
    command.add_argument("--sheet", type=Path, help="PNG to draw (default: OUT-sheet.png beside the folder)")
    command.set_defaults(run=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
