"""`python -m shards demo | pack | verify | show`: make packed datasets and look at them."""

import argparse
import sys
import time
from pathlib import Path

from shards import catalogue, demo, index, split
from shards.image import FITS
from shards.pack import Packing, pack

PROTOCOLS = {"lesion": split.lesion, "seed": split.seed}


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
    source = catalogue.read_ham10000(options.source)
    chosen = PROTOCOLS[options.protocol](source.images, options.seed)
    described = pack(source, chosen, options.out, packing, options.threads)
    seconds = time.perf_counter() - start
    dataset = index.load(options.out)
    images, size = sum(s.samples for s in dataset.shards), sum(s.bytes for s in dataset.shards)
    print(
        f"packed {images} images into {len(dataset.shards)} shards ({size / 1e6:.0f} MB) in {seconds:.0f} s, "
        f"{images / seconds:.0f} images/s; left out {described.left_out} (left_out.csv says why)"
    )
    return _show(options)


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
    about = dataset.description
    settings = ", ".join(f"{name} {value}" for name, value in about.protocol.items() if name != "name")
    print(
        f"{options.out}: {about.source['name']}, {dataset.width}x{dataset.height}, fingerprint {dataset.fingerprint[:12]}"
    )
    print(f"protocol {about.protocol['name']} ({settings})")
    names = list(about.counts)
    print(f"{'class':<12}" + "".join(f"{name:>8}" for name in names))
    for label in dataset.classes:
        print(f"{label:<12}" + "".join(f"{about.counts[name][label]:>8}" for name in names))
    print(f"{'images':<12}" + "".join(f"{sum(about.counts[name].values()):>8}" for name in names))
    for alias, real in about.aliases.items():
        print(f"{alias} is {real} under another name")
    for warning in about.warnings:
        print(f"warning: {warning}")
    return 0


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = text.lower().split("x")
        return int(width), int(height)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT in pixels, as 341x256. Got {text!r}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="draw lesions in HAM10000's layout")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument("--images", type=int, default=700, help="pictures to draw (default 700)")
    command.add_argument("--seed", type=int, default=0, help="another seed draws other lesions (default 0)")
    command.set_defaults(run=_demo)
    command = commands.add_parser("pack", help="pack a HAM10000 folder into shards")
    command.add_argument("source", type=Path, help="folder with HAM10000_metadata.csv and the images")
    command.add_argument("out", type=Path, help="folder to make")
    command.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="lesion",
        help="lesion: grouped and stratified .70/.15/.15 (default); seed: the 2021 notebook's 80/20 without its leak",
    )
    command.add_argument("--seed", type=int, default=0, help="another seed gives another split (default 0)")
    command.add_argument(
        "--size", type=_size, default=(341, 256), help="stored WIDTHxHEIGHT in pixels (default 341x256)"
    )
    command.add_argument("--fit", choices=FITS, default="cover", help="how a picture is brought to that size")
    command.add_argument("--quality", type=int, default=90, help="JPEG quality of stored pictures (default 90)")
    command.add_argument("--shard-samples", type=int, default=1000, help="most samples in one shard (default 1000)")
    command.add_argument("--threads", type=int, default=0, help="decoding threads (default: one a core)")
    command.set_defaults(run=_pack)
    command = commands.add_parser("verify", help="check every file against its SHA-256")
    command.add_argument("out", type=Path, help="packed folder")
    command.set_defaults(run=_verify)
    command = commands.add_parser("show", help="print the class table of each split")
    command.add_argument("out", type=Path, help="packed folder")
    command.set_defaults(run=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
