"""Runs side by side: `python launch/compare.py runs/seed0 runs/seed1 runs/seed2`.

Each folder is a run, or a result of `launch/evaluate.py`. Prints the figures of each, their mean and spread, and for two
of the same images the paired difference with its interval.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from harness.metrics import OVERALL, gains, shown


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    try:
        results = {str(folder): read(folder) for folder in options.folders}
        print(compare(results, options.figures.split(",")))
        if len(results) == 2:
            print("\n" + difference(*options.folders, results))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read(folder: Path) -> dict:
    """The content of a folder's metrics.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another version.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no metrics.json. Give a finished run, or a result of launch/evaluate.py."
        )
    metrics = json.loads(path.read_text())
    if metrics["format"] != 2:
        raise ValueError(
            f"{path} has format {metrics['format']}, this version reads 2. Run launch/evaluate.py on the run."
        )
    return metrics


def compare(results: dict[str, dict], figures: list[str]) -> str:
    """One row a result, then the mean and the standard deviation over them.

    Raises:
        ValueError: an unknown figure.
    """
    unknown = sorted(set(figures) - set(OVERALL))
    if unknown:
        raise ValueError(f"Unknown figure {', '.join(unknown)}. There are: {', '.join(OVERALL)}.")
    width = max(20, *(len(name) + 2 for name in results))
    lines = [f"{'':<{width}}" + "".join(f"{name.replace('_', ' '):>20}" for name in figures)]
    values = np.array([[result["tta"][name] for name in figures] for result in results.values()], float)
    for name, row in zip(results, values, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{_number(value):>20}" for value in row))
    if len(results) > 1:
        middle, spread = values.mean(0), values.std(0, ddof=1)
        cells = [f"{_number(m)} +- {_number(s)}" for m, s in zip(middle, spread, strict=True)]
        lines.append(f"{'mean +- deviation':<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    for what in ("dataset", "split", "views"):
        found = {str(result[what])[:12] for result in results.values()}
        if len(found) > 1:
            lines.append(f"note: they differ in the {what} ({', '.join(sorted(found))})")
    return "\n".join(lines)


def difference(first: Path, second: Path, results: dict[str, dict]) -> str:
    """What the second of two results has more than the first, on the same images, by paired resampling of lesions."""
    one, other = (pd.read_csv(folder / "predictions.csv", dtype={"group": str}) for folder in (first, second))
    same = ["image_id", "group", "label"]
    if not one[same].equals(other[same]):
        return "no paired difference: they were evaluated on different images"
    classes = tuple(results[str(first)]["tta"]["per_class"])
    labels = one["label"].map({name: number for number, name in enumerate(classes)}).to_numpy()
    columns = [f"p_{name}" for name in classes]
    figures = (*OVERALL, *(f"recall of {name}" for name in classes))
    found = gains(one[columns].to_numpy(), other[columns].to_numpy(), labels, classes, one["group"].to_numpy(), figures)
    lines = [f"{second} minus {first} (95 % intervals of the paired difference):"]
    for name, gain in found.items():
        sure = gain["interval"] and (gain["interval"][0] > 0 or gain["interval"][1] < 0)
        if gain["gain"] is None:
            continue  # a class that the split lacks
        text = shown(gain["gain"], gain["interval"], "+.3f")
        lines.append(f"{name.replace('_', ' '):<20}{text}" + ("" if sure else "  may be none"))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "not defined" if np.isnan(value) else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/compare.py", description="Compare finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or results of launch/evaluate.py")
    parser.add_argument(
        "--figures", default="accuracy,balanced_accuracy,macro_f1,macro_auc,loss", help=f"of: {', '.join(OVERALL)}"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
