"""Runs side by side: `python launch/compare.py runs/seed0 runs/seed1 runs/seed2`.

Each folder is a run, or a result of `launch/evaluate.py`. Prints the metrics of each, their mean and standard deviation, and
for two of the same images the paired difference with its interval. `--against` compares two settings of several seeds each:
`python launch/compare.py runs/old-0 runs/old-1 --against runs/new-0 runs/new-1`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from harness.evaluation.calibration import Prior, change_prior
from harness.evaluation.metrics import SUMMARY_METRICS, paired_differences
from harness.evaluation.results import Results, read_predictions, read_results
from harness.report.text import format_metric, title
from shards.terminal import replace_unprintable, run_and_exit, user_path

Run = tuple[Path, Results]  # a folder and the results in it


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    replace_unprintable()
    try:
        metrics = options.metrics.split(",")
        first = [(folder, read_results(folder)) for folder in options.folders]
        second = [(folder, read_results(folder)) for folder in options.against]
        print(compare(first, metrics, options.prior))
        if second:
            print("\nagainst\n" + compare(second, metrics, options.prior))
        elif len(first) == 2:
            first, second = first[:1], first[1:]
        if second:
            print("\n" + difference(first, second, options.prior))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def correction_to(results: Results, prior: str) -> Prior | None:
    """What corrects a result's probabilities to the prior asked for; None if they are compared as they are.

    Args:
        prior: `own`, `equal` or `training`.

    Raises:
        ValueError: the result was evaluated without prior correction.
    """
    if prior == "own":
        return None
    corrected = results.prior_corrected
    if corrected is None:
        raise ValueError(
            f"A result of {results.model} on the {results.split} split has no prior correction. Evaluate it again: "
            "launch/evaluate.py RUN --prior-correction true."
        )
    if corrected["target_name"] != prior:
        return None
    return Prior(np.array(corrected["model_prior"]), np.array(corrected["target_prior"]), prior)


def compare(runs: list[Run], metrics: list[str], prior: str = "own") -> str:
    """One row a result, then the mean and the standard deviation over them.

    Raises:
        ValueError: an unknown metric.
    """
    unknown = sorted(set(metrics) - set(SUMMARY_METRICS))
    if unknown:
        raise ValueError(f"Unknown metric {', '.join(unknown)}. There are: {', '.join(SUMMARY_METRICS)}.")
    width = max(20, *(len(str(folder)) + 2 for folder, _ in runs))
    lines = [f"{'':<{width}}" + "".join(f"{title(name):>20}" for name in metrics)]
    read = [(one.prior_corrected if correction_to(one, prior) else one.tta) or {} for _, one in runs]
    values = np.array([[of_one[name] for name in metrics] for of_one in read], float)  # (runs, metrics)
    for (folder, _), row in zip(runs, values, strict=True):
        lines.append(f"{folder!s:<{width}}" + "".join(f"{_number(value):>20}" for value in row))
    if len(runs) > 1:
        mean, deviation = values.mean(0), values.std(0, ddof=1)
        cells = [f"{_number(m)} +- {_number(d)}" for m, d in zip(mean, deviation, strict=True)]
        lines.append(f"{'mean +- deviation':<{width}}" + "".join(f"{cell:>20}" for cell in cells))
    for name in ("dataset", "split", "views", "image_size"):
        values_of_name = {str(getattr(one, name))[:12] for _, one in runs}
        if len(values_of_name) > 1:
            lines.append(f"note: they differ in the {title(name)} ({', '.join(sorted(values_of_name))})")
    return "\n".join(lines)


def difference(first: list[Run], second: list[Run], prior: str = "own") -> str:
    """How much greater the mean metrics of the second runs are, on the same images, by paired resampling of groups.

    Images are told apart by their ids and classes by their names, in whatever order; the groups are those of the first run.
    """
    results = [one for _, one in (*first, *second)]
    rows = [read_predictions(folder).set_index("image_id") for folder, _ in (*first, *second)]
    classes, labels = results[0].classes, rows[0]["label"]
    if odd := next((one for one in results if set(one.classes) != set(classes)), None):
        other = sorted(set(odd.classes) ^ set(classes))
        return f"no paired difference: some of them do not know the classes {', '.join(other[:10])}"
    if not all(labels.sort_index().equals(row["label"].sort_index()) for row in rows):
        return "no paired difference: they were evaluated on different images"
    probabilities = []
    for one, row in zip(results, rows, strict=True):
        own = row.loc[labels.index, [f"p_{name}" for name in one.classes]].to_numpy(float)  # (N, C)
        correction = correction_to(one, prior)
        corrected = change_prior(own, correction) if correction else own
        probabilities.append(corrected[:, [one.classes.index(name) for name in classes]])
    labels = np.array([classes.index(name) for name in labels])
    before, after = probabilities[: len(first)], probabilities[len(first) :]
    names = (*SUMMARY_METRICS, *(f"recall of {name}" for name in classes))
    gains = paired_differences(before, after, labels, classes, rows[0]["group"].to_numpy(), names)
    lines = [f"{_named(second)} minus {_named(first)} (95 % intervals of the paired difference):"]
    for name, found in gains.items():
        gain, interval = found["gain"], found["interval"]
        if gain is None:
            continue  # a class that the split lacks
        is_sure = interval and (interval[0] > 0 or interval[1] < 0)
        text = f"{title(name):<20}{format_metric(gain, interval, '+.3f')}"
        lines.append(text + ("" if is_sure else "  interval includes 0" if interval else "  no interval"))
    if len(rows) > 2:
        lines.append("the intervals are over the images; the deviation over runs stands above")
    return "\n".join(lines)


def _named(runs: list[Run]) -> str:
    return str(runs[0][0]) if len(runs) == 1 else f"the mean of {len(runs)} runs ({runs[0][0]} ...)"


def _number(value: float) -> str:
    return "not defined" if np.isnan(value) else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/compare.py", description="Compare finished runs.")
    parser.add_argument("folders", nargs="+", type=user_path, help="runs, or results of launch/evaluate.py")
    parser.add_argument(
        "--against",
        nargs="+",
        type=user_path,
        default=[],
        help="runs of another setting; the difference is theirs minus these",
    )
    parser.add_argument(
        "--prior",
        choices=("own", "equal", "training"),
        default="own",
        help="compare probabilities as each run was trained (own), or all of them at the same class frequencies",
    )
    parser.add_argument(
        "--metrics",
        default="accuracy,balanced_accuracy,macro_f1,macro_auc,loss",
        help=f"of: {', '.join(SUMMARY_METRICS)}",
    )
    return parser


if __name__ == "__main__":
    run_and_exit(main)
