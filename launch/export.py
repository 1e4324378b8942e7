"""Export a run's best weights as one file: `python launch/export.py runs/ham10000 --format onnx`.

The file answers without this harness; launch/README.md has a program that uses it.
"""

import argparse

from harness.export.export import Export, export_run
from harness.export.formats import FILES
from harness.run.console import LOGGER, start_console
from shards.terminal import run_and_exit, user_path, user_place

FIRST_OPSET = 18  # that torch.onnx writes


def main(arguments: list[str] | None = None) -> int:
    """Export; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    start_console()
    try:
        wanted = _wanted(options)
        out = options.out or options.run / _folder_name(wanted)
        export_run(options.run, out, wanted, options.data, options.overwrite)
    except (ValueError, OSError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return 0


def _wanted(options: argparse.Namespace) -> Export:
    """What is asked for.

    Raises:
        ValueError: options that do not go together.
    """
    if options.format == "safetensors" and options.preprocessing:
        raise ValueError(
            "--format safetensors has weights and no graph: leave out --preprocessing, or take onnx or torch."
        )
    for name in ("int8", "opset"):
        if getattr(options, name) and options.format != "onnx":
            raise ValueError(
                f"--{name} is of ONNX, and --format is {options.format}. Leave it out, or take --format onnx."
            )
    if options.opset is not None and options.opset < FIRST_OPSET:
        raise ValueError(
            f"--opset must be {FIRST_OPSET} or more: torch.onnx writes none below. Got {options.opset} instead."
        )
    preprocessing = "none" if options.format == "safetensors" else options.preprocessing or "inside"
    return Export(options.format, preprocessing, options.int8, options.opset, options.temperature == "fit")


def _folder_name(wanted: Export) -> str:
    return f"export-{wanted.kind}" + ("-outside" if wanted.preprocessing == "outside" else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/export.py", description="Export the best weights of a run as one file."
    )
    parser.add_argument("run", type=user_path, help="the run's folder")
    parser.add_argument("--format", required=True, choices=tuple(FILES), help="kind of file")
    parser.add_argument(
        "--preprocessing",
        choices=["inside", "outside"],
        help="inside (default): the graph takes images of any size; outside: it takes normalised views",
    )
    parser.add_argument("--int8", action="store_true", help="write a quantised file beside the other (onnx)")
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators (default: torch's choice)")
    parser.add_argument(
        "--temperature",
        choices=["fit", "off"],
        default="fit",
        help="fit (default): logits are divided by a temperature fitted on validation; off: by none",
    )
    parser.add_argument("--data", type=user_place, help="where the run's dataset is now (default: the run's data.path)")
    parser.add_argument("--out", type=user_path, help="folder to write (default: RUN/export-FORMAT[-outside])")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    return parser


if __name__ == "__main__":
    run_and_exit(main)
