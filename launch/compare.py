"""Runs side by side: `python launch/compare.py runs/seed0 runs/seed1 runs/seed2`.

Each folder is a run, or a result of `launch/evaluate.py`. Prints the metrics of each, their mean and standard deviation, and
for two of the same images the paired difference with its interval. `--against` compares two settings of several seeds each:
`python launch/compare.py runs/old-0 runs/old-1 --against runs/new-0 runs/new-1`. Of the folds of a cross-validation, all images
are also taken together as one result.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from harness.config import load_config
from harness.evaluation.calibration import Prior
from harness.evaluation.folds import PROTOCOL, Scored, in_one_order, join_folds, read_scored
from harness.evaluation.metrics import SUMMARY_METRICS, paired_differences
from harness.evaluation.results import Results, read_predictions, read_results
from harness.report.text import class_table, format_metric, title
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
        elif len(first) == 2 and not _folds_together(first, options.prior):
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
    """One row a result, then the mean and the standard deviation over them, and the folds of a cross-validation together.

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
    together = _folds_together(runs, prior)
    for name in ("split", "views", "image_size") if together else ("dataset", "split", "views", "image_size"):
        values_of_name = {str(getattr(one, name))[:12] for _, one in runs}
        if len(values_of_name) > 1:
            lines.append(f"note: they differ in the {title(name)} ({', '.join(sorted(values_of_name))})")
    return "\n".join(lines + together)


def difference(first: list[Run], second: list[Run], prior: str = "own") -> str:
    """How much greater the mean metrics of the second runs are, on the same images, by paired resampling of groups.

    Images are told apart by their ids and classes by their names, in whatever order; the groups are those of the first run.
    The folds of a cross-validation count as one run.
    """
    results = [one for _, one in (*first, *second)]
    classes = results[0].classes
    if odd := next((one for one in results if set(one.classes) != set(classes)), None):
        other = sorted(set(odd.classes) ^ set(classes))
        return f"no paired difference: some of them do not know the classes {', '.join(other[:10])}"
    of_first, of_second = _scored(first, classes, prior), _scored(second, classes, prior)
    parts = in_one_order([*of_first, *of_second])
    if parts is None:
        folds = dict.fromkeys(part.numbers for part in (*of_first, *of_second) if part.numbers)
        return "no paired difference: they were evaluated on different images" + (
            f" (folds {' and '.join(folds)})" if len(folds) > 1 else ""
        )
    if not all(part.has_folds_of(parts[0]) for part in parts):
        return "no paired difference: they are of different folds"
    probabilities = [part.probabilities for part in parts]
    labels, groups = parts[0].labels(classes), parts[0].images["group"].to_numpy()
    names = (*SUMMARY_METRICS, *(f"recall of {name}" for name in classes))
    before, after = probabilities[: len(of_first)], probabilities[len(of_first) :]
    gains = paired_differences(before, after, labels, classes, groups, names, parts[0].folds)
    lines = [f"{_named(second, after)} minus {_named(first, before)} (95 % intervals of the paired difference):"]
    for name, found in gains.items():
        gain, interval = found["gain"], found["interval"]
        if gain is None:
            continue  # a class that the split lacks
        is_sure = interval and (interval[0] > 0 or interval[1] < 0)
        text = f"{title(name):<20}{format_metric(gain, interval, '+.3f')}"
        lines.append(text + ("" if is_sure else "  interval includes 0" if interval else "  no interval"))
    if len(results) > 2:
        lines.append("the intervals are over the images; the deviation over runs stands above")
    return "\n".join(lines)


def _scored(runs: list[Run], classes: tuple[str, ...], prior: str) -> list[Scored]:
    """What the runs of one setting predicted; those of the folds of a cross-validation are one."""
    parts = [
        read_scored(
            str(folder), one, read_predictions(folder), classes, correction_to(one, prior), _recipe(folder, one)
        )
        for folder, one in runs
    ]
    return join_folds(parts)


def _recipe(folder: Path, results: Results) -> str:
    """The settings that make a model of a fold, as text; empty without folds, and where the folder is of no run, and in none."""
    for run in (folder, folder.resolve().parent) if "fold" in results.protocol else ():
        if (run / "config.yaml").is_file():
            config = load_config(run / "config.yaml")
            settings = config.model, config.optim, config.augment, config.data.global_batch_size, config.data.image_size
            return repr((*settings, config.run.epochs, config.run.monitor))
    return ""


def _folds_together(runs: list[Run], prior: str) -> list[str]:
    """The table of all folds' images, for each cross-validation among the runs of the same classes; and what is in none."""
    classes = runs[0][1].classes
    of_folds = [(folder, one) for folder, one in runs if "fold" in one.protocol and set(one.classes) == set(classes)]
    scored = _scored(of_folds, classes, prior) if len(of_folds) > 1 else []
    joined = [whole for whole in scored if whole.cut and whole.n_runs > 1]
    lines = []
    for whole in joined:
        found, cut = whole.metrics(classes), whole.cut or {}
        lines.append(
            f"\n{whole.n_runs} of {cut[f'{PROTOCOL}folds']} folds together ({whole.numbers}): {found['images']} images, each scored by the "
            f"run of its fold\nruns: {', '.join(whole.folds_of)}\n{class_table(found, str(cut['group_name']))}\n"
            "areas under curves (auc) are means over the folds, the rest counts all images together"
        )
    for whole in scored if joined else []:
        if whole not in joined:
            (name,), cut, others = whole.folds_of, whole.cut or {}, joined[0].cut or {}
            odd = sorted(key for key in cut.keys() | others if cut.get(key) != others.get(key)) or [
                "fold, or images, that another one has"
            ]
            lines.append(f"note: {name} (fold {whole.numbers}) is not among them: {', '.join(odd)}")
    return lines


def _named(runs: list[Run], compared: list[np.ndarray]) -> str:
    """A name for the runs of a setting; they are of folds if fewer predictions than runs are compared."""
    if len(runs) == 1:
        return str(runs[0][0])
    seeds = f" with {len(compared)} seeds" if len(compared) > 1 else ""
    what = f"the mean of {len(runs)} runs" if len(runs) == len(compared) else f"{len(runs)} runs of folds{seeds}"
    return f"{what} ({runs[0][0]} ...)"


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
