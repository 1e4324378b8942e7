"""Runs side by side: `python launch/compare.py runs/seed0 runs/seed1 runs/seed2`.

Each folder is a run, or a result of `launch/evaluate.py`. Prints the figures of each, their mean and spread, and for two
of the same images the paired difference with its interval. `--against` compares two settings of several seeds each:
`python launch/compare.py runs/old-0 runs/old-1 --against runs/new-0 runs/new-1`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from harness.evaluation.calibration import Prior, change_prior
from harness.evaluation.metrics import SUMMARY_METRICS, format_metric, paired_differences


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    try:
        figures = options.figures.split(",")
        folders = [*options.folders, *options.against]
        results = {str(folder): read(folder) for folder in folders}
        print(compare({str(folder): results[str(folder)] for folder in options.folders}, figures, options.frequencies))
        if options.against:
            others = {str(folder): results[str(folder)] for folder in options.against}
            print("\nagainst\n" + compare(others, figures, options.frequencies))
            print("\n" + difference(options.folders, options.against, results, options.frequencies))
        elif len(folders) == 2:
            print("\n" + difference(folders[:1], folders[1:], results, options.frequencies))
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
    if metrics["format"] != 3:
        raise ValueError(
            f"{path} has format {metrics['format']}, this version reads 3. Run launch/evaluate.py on the run."
        )
    return metrics


def read_otherwise(result: dict, frequencies: str) -> Prior | None:
    """What turns a result's probabilities into those at the class frequencies asked for; None if they are read as they are.

    Raises:
        ValueError: the result was evaluated without its second reading.
    """
    if frequencies == "own":
        return None
    adjusted = result.get("adjusted")
    if adjusted is None or adjusted["strength"] != 1:
        raise ValueError(
            "A result has no second reading at full strength. Run launch/evaluate.py RUN --prior-correction 1."
        )
    if adjusted["to"] != frequencies:
        return None
    return Prior(np.array(adjusted["assumed"]), np.array(adjusted["other"]), frequencies)


def compare(results: dict[str, dict], figures: list[str], frequencies: str = "own") -> str:
    """One row a result, then the mean and the standard deviation over them.

    Raises:
        ValueError: an unknown figure.
    """
    unknown = sorted(set(figures) - set(SUMMARY_METRICS))
    if unknown:
        raise ValueError(f"Unknown figure {', '.join(unknown)}. There are: {', '.join(SUMMARY_METRICS)}.")
    width = max(20, *(len(name) + 2 for name in results))
    lines = [f"{'':<{width}}" + "".join(f"{name.replace('_', ' '):>20}" for name in figures)]
    read = [result["adjusted" if read_otherwise(result, frequencies) else "tta"] for result in results.values()]
    values = np.array([[scores[name] for name in figures] for scores in read], float)
    for name, row in zip(results, values, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{_number(value):>20}" for value in row))
    if len(results) > 1:
        middle, spread = values.mean(0), values.std(0, ddof=1)
        cells = [f"{_number(m)} +- {_number(s)}" for m, s in zip(middle, spread, strict=True)]
        lines.append(f"{'mean +- deviation':<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    for what in ("dataset", "split", "views", "image_size"):
        found = {str(result[what])[:12] for result in results.values()}
        if len(found) > 1:
            lines.append(f"note: they differ in the {what.replace('_', ' ')} ({', '.join(sorted(found))})")
    return "\n".join(lines)


def difference(first: list[Path], second: list[Path], results: dict[str, dict], frequencies: str = "own") -> str:
    """What the second results have more than the first in the mean, on the same images, by paired resampling of lesions."""
    rows = [pd.read_csv(folder / "predictions.csv", dtype={"group": str}) for folder in (*first, *second)]
    same = ["image_id", "group", "label"]
    columns = [name for name in rows[0] if name.startswith("p_")]
    if not all(rows[0][same].equals(other[same]) and columns == [c for c in other if c in columns] for other in rows):
        return "no paired difference: they were evaluated on different images"
    classes = tuple(name.removeprefix("p_") for name in columns)
    labels = rows[0]["label"].map({name: number for number, name in enumerate(classes)}).to_numpy()
    figures = (*SUMMARY_METRICS, *(f"recall of {name}" for name in classes))
    found = [row[columns].to_numpy() for row in rows]
    for number, folder in enumerate((*first, *second)):
        if prior := read_otherwise(results[str(folder)], frequencies):
            found[number] = change_prior(found[number], prior)
    groups = rows[0]["group"].to_numpy()
    gained = paired_differences(found[: len(first)], found[len(first) :], labels, classes, groups, figures)
    lines = [f"{_named(second)} minus {_named(first)} (95 % intervals of the paired difference):"]
    for name, gain in gained.items():
        sure = gain["interval"] and (gain["interval"][0] > 0 or gain["interval"][1] < 0)
        if gain["gain"] is None:
            continue  # a class that the split lacks
        text = format_metric(gain["gain"], gain["interval"], "+.3f")
        lines.append(f"{name.replace('_', ' '):<20}{text}" + ("" if sure else "  may be none"))
    if len(rows) > 2:
        lines.append("the intervals are over the images; the spread over runs stands above")
    return "\n".join(lines)


def _named(folders: list[Path]) -> str:
    return str(folders[0]) if len(folders) == 1 else f"the mean of {len(folders)} runs ({folders[0]} ...)"


def _number(value: float) -> str:
    return "not defined" if np.isnan(value) else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/compare.py", description="Compare finished runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or results of launch/evaluate.py")
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        default=[],
        help="runs of another setting; the difference is theirs minus these",
    )
    parser.add_argument(
        "--frequencies",
        choices=("own", "equal", "training"),
        default="own",
        help="read each run's probabilities as it was trained (own), or all of them at one frequency of the classes",
    )
    parser.add_argument(
        "--figures",
        default="accuracy,balanced_accuracy,macro_f1,macro_auc,loss",
        help=f"of: {', '.join(SUMMARY_METRICS)}",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
