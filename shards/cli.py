"""`python -m shards demo | fetch | pack | audit | verify | show`: make packed datasets and look at them.

In: arguments of the command line. Out: files, a table on the console and an exit code. Invariants: invalid input ends
with one sentence and exit code 1; --help imports neither pandas nor NumPy nor Pillow, so each command imports what it
needs.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.column_options import add_column_options, columns_of
from shards.fetch.command import add_fetch
from shards.pack_options import add_pack_options
from shards.remote import Access
from shards.storage import without_secrets
from shards.terminal import replace_unprintable, user_path, user_place

if TYPE_CHECKING:
    from shards.catalogue import Catalogue


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    replace_unprintable()
    options = _parser(describes_protocols=argv[:1] == ["pack"]).parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _demo(options: argparse.Namespace) -> int:
    from shards import demo

    demo.draw(options.out, options.images, options.seed)
    print(f"drew {options.images} demo lesions; next: python -m shards pack {options.out} data/demo")
    return 0


def _pack(options: argparse.Namespace) -> int:
    from shards import index
    from shards.outputs import Output, Packing, refuse_used
    from shards.pack import pack_several
    from shards.split import choose_protocol
    from shards.summary import print_packed, print_unfinished
    from shards.tasks import this_task

    start, task = time.perf_counter(), this_task()
    outputs = [(options.out, options.size, options.fit), *options.also]
    packings = [(out, Packing(size, fit, options.quality, options.shard_samples)) for out, size, fit in outputs]
    refuse_used([Output(*packing, options.patience) for packing in packings])
    parameters = options.seed, options.folds, options.fold, options.holdout
    protocol = choose_protocol(options.protocol or "lesion", *parameters)  # before anything is read
    source = _read_source(options)
    if source.split_column and not (options.protocol or options.folds or options.holdout):
        protocol = choose_protocol(f"column:{source.split_column}", *parameters)
    source = replace(source, citation=options.citation or source.citation, license=options.license or source.license)
    source, united = _without_duplicates(source, options)
    split = protocol(source.images)
    if united:
        split = replace(split, protocol=split.protocol | {"united_pairs": united})
    if task.is_first:
        if source.what:
            print(
                f"{without_secrets(str(options.source))}: {source.what}; {len(source.images)} images, {len(source.classes)} classes"
            )
        for note in split.notes:
            print(note)
    try:
        how = {"on_bad_image": options.on_bad_image, "task": task, "patience": options.patience}
        packed = pack_several(source, split, packings, options.threads, **how)
    except (ValueError, OSError) as error:
        if task.is_alone:
            raise
        raise (ValueError if isinstance(error, ValueError) else OSError)(f"{task}: {error}") from error
    seconds, shown = time.perf_counter() - start, without_secrets(str(options.out))
    if packed.unfinished:
        print_unfinished(shown, task, packed.unfinished, seconds)
        return 0
    print_packed(shown, index.load(options.out, Access(cache_gb=0)), task, seconds)
    return 0


def _without_duplicates(source: "Catalogue", options: argparse.Namespace) -> tuple["Catalogue", int]:
    """The source with the groups of confirmed pairs united, and how many pairs there were."""
    from shards.duplicates import merge_duplicates

    if options.merge_duplicates is None:
        if options.allow_mixed_labels:
            raise ValueError("--allow-mixed-labels goes with --merge-duplicates.")
        return source, 0
    groups = source.images["group"].nunique()
    source, united = merge_duplicates(source, options.merge_duplicates, options.allow_mixed_labels)
    print(f"{options.merge_duplicates}: {united} pairs unite {groups} groups to {source.images['group'].nunique()}")
    return source, united


def _read_source(options: argparse.Namespace) -> "Catalogue":
    from shards.ham10000 import read_isic2018
    from shards.sources import read_source
    from shards.tree import open_source

    if (options.protocol == "isic2018") != (options.test_source is not None):
        raise ValueError(
            "--protocol isic2018 needs --test-source, the folder of the challenge's test images, "
            f"and no other protocol takes it. Got --protocol {options.protocol or 'lesion'}."
        )
    if options.protocol == "isic2018":
        return read_isic2018(*(open_source(each, options.patience) for each in (options.source, options.test_source)))
    return read_source(open_source(options.source, options.patience), columns_of(options, options.patience))


def _audit(options: argparse.Namespace) -> int:
    try:
        from shards.audit.command import audit
    except ImportError as error:
        raise ValueError(
            f"An audit needs {error.name}, which is not installed: pip install -e '.[audit]' in the folder of the harness."
        ) from error
    read = columns_of(options), options.threshold, options.threads, _access(options)
    return audit(options.path, options.other, options.out, *read)


def _verify(options: argparse.Namespace) -> int:
    from shards import index

    problems, shown = index.verify(options.out, _access(options)), without_secrets(str(options.out))
    for problem in problems:
        print(problem)
    if problems:
        print(f"{shown}: {len(problems)} problem(s)")
        return 1
    dataset = index.load(options.out, _access(options))
    print(f"{shown}: {len(dataset.shards)} shards as packed, fingerprint {dataset.fingerprint[:12]}")
    return 0


def _access(options: argparse.Namespace) -> Access:
    return Access(options.cache_dir, options.cache_gb)


def _show(options: argparse.Namespace) -> int:
    from shards import index
    from shards.contact_sheet import dataset_rows, draw_sheet
    from shards.summary import print_table

    dataset = index.load(options.out, _access(options))
    print_table(str(dataset.folder), dataset)
    beside = dataset.folder.resolve().parent if isinstance(dataset.folder, Path) else Path()
    sheet = options.sheet or beside / f"{dataset.name}-sheet.png"
    draw_sheet(dataset_rows(dataset), sheet, f"{dataset.name}, {dataset.describe_split()}")
    print(f"contact sheet: {sheet}")
    return 0


def _parser(describes_protocols: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shards", description="Make packed datasets (WebDataset shards) and look at them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="draw lesions in HAM10000's layout"))
    add_fetch(commands.add_parser("fetch", help="download a public data set, as pack reads it"))
    pack = commands.add_parser(
        "pack",
        help="pack images into shards, by one process or many tasks",
        description="Pack images into shards. Started by srun or torchrun (or with RANK and WORLD_SIZE set), each task packs its share; the\n"
        "last one to be done completes the dataset. A task that was killed is started again alone, by the same command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_pack_options(pack)
    pack.set_defaults(run=_pack)
    if describes_protocols:  # the import is slow, and packing needs it anyway
        from shards.split import describe_protocols

        pack.epilog = describe_protocols()
    _add_audit(commands.add_parser("audit", help="find images of one lesion under different names, and leaks"))
    verify = commands.add_parser("verify", help="check every file against its SHA-256")
    _add_place(verify)
    verify.set_defaults(run=_verify)
    show = commands.add_parser("show", help="print the class table of each split and draw a contact sheet")
    _add_place(show)
    show.add_argument("--sheet", type=user_path, help="PNG to draw (default: OUT-sheet.png beside the folder, or here)")
    show.set_defaults(run=_show)
    return parser


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=user_place, help="packed folder, or its URL (s3://, https://, ...)")
    _add_cache_options(command)


def _add_cache_options(command: argparse.ArgumentParser) -> None:
    add, default = command.add_argument, Access()
    add("--cache-dir", default=default.cache_dir, help="of a URL: where its files are kept (default: the user's cache)")
    add(
        "--cache-gb",
        type=float,
        default=default.cache_gb,
        help=f"of a URL: most that is kept there, in 10^9 bytes; 0 for nothing (default {default.cache_gb:g})",
    )


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("out", type=user_path, help="folder to make")
    command.add_argument("--images", type=int, default=700, help="images to draw (default 700)")
    command.add_argument("--seed", type=int, default=0, help="a different seed draws different lesions (default 0)")
    command.set_defaults(run=_demo)


def _add_audit(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("path", type=user_place, help="packed folder or its URL, or a source as for pack")
    add("other", type=user_place, nargs="?", help="another one, to be compared with the first, too")
    add("--out", type=user_path, help="folder of the results (default: PATH-audit beside it; of a URL, here)")
    add("--threshold", type=int, default=7, help="key points that must agree for a pair to count (default 7)")
    add("--threads", type=int, default=0, help="threads (default: one a core)")
    _add_cache_options(command)
    add_column_options(command.add_argument_group("source"))
    command.set_defaults(run=_audit)
