"""What a leak study found: what each protocol claims of its model, and what the model is worth on unseen groups.

In: results of finished runs. Out: a table as text, its rows, and a plot. Invariants: runs of one study were scored on the same unseen images;
a run that has not learned its training images by heart is marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import pandas as pd

from harness.evaluation.results import Results
from harness.report.plots import new_figure, to_png
from harness.report.text import title

METRICS = ("balanced_accuracy", "macro_f1", "accuracy")
SHOWN = METRICS[:2]
COLOURS, LEGEND = ("#c44e52", "#4c72b0"), ("claimed: its own validation", "worth: the same unseen groups for all")


@dataclass(frozen=True)
class StudyRun:
    """One training of an arm.

    arm, seed: which. train_images: their number. train_accuracy: of the final weights on them, without augmentation, 0 to 1.
    claimed: results on the arm's own validation split. unseen: on the test split that all arms share.
    """

    arm: str
    seed: int
    train_images: int
    train_accuracy: float
    claimed: Results
    unseen: Results


def to_rows(runs: Sequence[StudyRun]) -> pd.DataFrame:
    """One row a run, as `study.csv` has them: each metric with the ends of its 95 % interval."""
    rows = []
    for run in runs:
        row = {"arm": run.arm, "seed": run.seed, "train_images": run.train_images, "train_accuracy": run.train_accuracy}
        for name, results in (("claimed", run.claimed), ("unseen", run.unseen)):
            for metric in METRICS:
                low, high = interval(results, metric)
                row |= {
                    f"{name}_{metric}": results.tta[metric],
                    f"{name}_{metric}_low": low,
                    f"{name}_{metric}_high": high,
                }
        rows.append(row)
    return pd.DataFrame(rows)


def interval(results: Results, metric: str) -> list[float]:
    """The 95 % interval of a metric; twice the metric where there is none."""
    return (results.tta.get("intervals") or {}).get(metric) or [results.tta[metric]] * 2


def to_markdown(runs: Sequence[StudyRun], level: float) -> str:
    """One row an arm, means over its seeds with their standard deviation.

    Args:
        level: training accuracy from which a run counts as one that knows its training images by heart.
    """
    heads = [f"{title(metric)} {what}" for metric in SHOWN for what in ("claimed", "on unseen groups", "inflated by")]
    lines = [
        "| protocol | seeds | training images | training accuracy | " + " | ".join(heads) + " |",
        "|---|" + "---|" * (3 + len(heads)),
    ]
    for arm, of_arm in by_arm(runs).items():
        accuracies = [run.train_accuracy for run in of_arm]
        mark = "" if min(accuracies) >= level else " *"
        cells = [
            arm,
            str(len(of_arm)),
            str(round(mean(run.train_images for run in of_arm))),
            f"{mean(accuracies):.3f}{mark}",
        ]
        for metric in SHOWN:
            claimed, unseen = ([result.tta[metric] for result in results] for results in _results(of_arm))
            inflated = [one - other for one, other in zip(claimed, unseen, strict=True)]
            cells += [_spread(claimed), _spread(unseen), _spread(inflated, "+.3f")]
        lines.append("| " + " | ".join(cells) + " |")
    if any(run.train_accuracy < level for run in runs):
        lines.append(
            f"\n\\* below a training accuracy of {level:g}: a leak may not show yet. Train longer (--run.epochs), into another --out."
        )
    return "\n".join(lines) + "\n"


def draw_study(runs: Sequence[StudyRun], metric: str = "balanced_accuracy") -> bytes:
    """A row an arm, a line a seed: from what it claims to what it is worth, with 95 % intervals."""
    arms = by_arm(runs)
    figure, (axes,) = new_figure(7.4, 1.3 + 0.62 * len(arms), 1)
    for row, of_arm in enumerate(arms.values()):
        for number, run in enumerate(of_arm):
            height = row + 0.5 * ((number + 0.5) / len(of_arm) - 0.5)
            ends = run.claimed.tta[metric], run.unseen.tta[metric]
            axes.plot(ends, [height - 0.04, height + 0.04], color="0.75", linewidth=1.5, zorder=1)
            for value, results, colour, place, label in zip(
                ends, (run.claimed, run.unseen), COLOURS, (height - 0.04, height + 0.04), LEGEND, strict=True
            ):
                axes.plot(interval(results, metric), [place] * 2, color=colour, linewidth=1, alpha=0.6)
                is_first = row == number == 0
                axes.scatter([value], [place], color=colour, s=28, zorder=2, label=label if is_first else None)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set(ylim=(len(arms) - 0.5, -0.5), xlabel=f"{title(metric)} (95 % intervals, a line a seed)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, ncols=2, loc="outside upper center", frameon=False)
    return to_png(figure)


def by_arm(runs: Sequence[StudyRun]) -> dict[str, list[StudyRun]]:
    """Runs by arm, in the order in which arms first come."""
    arms: dict[str, list[StudyRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def _results(runs: list[StudyRun]) -> tuple[list[Results], list[Results]]:
    return [run.claimed for run in runs], [run.unseen for run in runs]


def _spread(values: list[float], form: str = ".3f") -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
