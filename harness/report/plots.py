"""The plots of a run: matplotlib figures as PNG bytes.

In: metrics and predictions, as `metrics.json` and `predictions.csv` have them. Out: PNG. Invariants: a plot is drawn from
its arguments and changes nothing; no window is opened.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.evaluation.metrics import CALIBRATION_BINS as BINS
from harness.report.fonts import drawable, families
from harness.report.text import title as words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_CLASSES = 30  # beyond them a confusion matrix is a picture without numbers
MAX_CURVES = 10
MAX_TICK = 32  # characters of a class's name beside a confusion matrix


def draw_confusion(confusion: list[list[int]], classes: tuple[str, ...], title: str) -> bytes:
    """A confusion matrix: colour is the share of the label's row, the number is the count (up to `MANY_CLASSES`).

    Args:
        confusion: C rows of labels, C columns of predictions. classes: C names.
    """
    counts = np.asarray(confusion)
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    has_numbers = len(classes) <= MANY_CLASSES
    side = max(4.5, 0.75 * (len(classes) if has_numbers else 10) + 1.8)
    named = range(0, len(classes), -(-len(classes) // MANY_CLASSES))  # every second, third, ... of many
    names = [drawable(classes[number], MAX_TICK) for number in named]
    beyond = 0.08 * max(0, max(map(len, names)) - 8)  # inches that longer names take
    figure, (axes,) = new_figure(side + beyond, side * 0.92 + 0.7 * beyond, 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape) if has_numbers else ():
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}" if images[row] else "0"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(named, names, rotation=45, ha="right")
    axes.set_yticks(named, [f"{name} ({n})" for name, n in zip(names, images[named, 0], strict=True)])
    axes.set(xlabel="predicted", ylabel="label (images)", title=title)
    figure.colorbar(image, shrink=0.8, label="share of the label's images")
    return to_png(figure)


def draw_curves(rows: pd.DataFrame, metrics: dict) -> bytes:
    """ROC and precision-recall curves of each class that has images; of the `MAX_CURVES` with the lowest area if more do.

    Args:
        rows: of predictions.csv. metrics: of the same predictions, as from `compute_metrics`.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure, (left, right) = new_figure(6.3, 8.2, 2, down=True)
    drawn, chosen = curve_classes(metrics)
    for name in drawn:
        row = metrics["per_class"][name]
        is_label, probability = rows["label"] == name, rows[f"p_{name}"]
        false_positive_rate, true_positive_rate, _ = roc_curve(is_label, probability)
        left.plot(false_positive_rate, true_positive_rate, label=_in_legend(name, row["auc"]))
        precision, recall, _ = precision_recall_curve(is_label, probability)
        right.step(recall, precision, where="post", label=_in_legend(name, row["average_precision"]))
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (area)" + chosen)
    right.set(
        xlabel="recall", ylabel="precision", title="precision and recall (average precision)" + chosen, ylim=(0, 1.02)
    )
    for axes in (left, right):
        axes.legend(fontsize=8, loc="lower right" if axes is left else "lower left")
    return to_png(figure)


def _in_legend(name: str, area: float) -> str:
    label = f"{drawable(name)} {area:.3f}"
    return f" {label}" if label.startswith("_") else label  # matplotlib leaves those out


def curve_classes(metrics: dict) -> tuple[list[str], str]:
    """The classes whose curves are drawn, and what a title says of the choice: nothing where it is all that have images."""
    areas = {name: row["auc"] for name, row in metrics["per_class"].items() if row["auc"] is not None}
    if len(areas) <= MAX_CURVES:
        return list(areas), ""
    return sorted(areas, key=lambda name: areas[name])[:MAX_CURVES], f", the {MAX_CURVES} classes of the lowest area"


def draw_reliability(confidences: dict[str, np.ndarray], is_right: np.ndarray) -> bytes:
    """Reliability diagram: accuracy over confidence, with the number of images in each bin (Niculescu-Mizil, 2005).

    Args:
        confidences: {name: (N,)} of the predicted class. is_right: (N,) bool.
    """
    figure, (axes, below) = new_figure(6.3, 6, 2, down=True, heights=(3, 1))
    for name, confidence in confidences.items():
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        known = counts > 0
        accuracy = np.bincount(bins, is_right, BINS)[known] / counts[known]
        axes.plot(np.bincount(bins, confidence, BINS)[known] / counts[known], accuracy, marker="o", label=name)
        below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS, alpha=0.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylabel="accuracy", title="reliability diagram", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8)
    below.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return to_png(figure)


def draw_history(epoch_entries: list[dict], val_entries: list[dict]) -> bytes:
    """Losses and validation metrics, epoch by epoch.

    Args:
        epoch_entries, val_entries: of log.jsonl, one of each for each of E > 0 epochs.
    """
    epochs, val = pd.DataFrame(epoch_entries), pd.DataFrame(val_entries)
    figure, (left, right) = new_figure(6.3, 6.6, 2, down=True)
    left.plot(epochs["epoch"], epochs["loss"], label="training")
    left.plot(epochs["epoch"], val["loss"], label="validation")
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        right.plot(epochs["epoch"], val[name], label=words(name))
    left.set(xlabel="epoch", title="loss")
    right.set(xlabel="epoch", title="validation", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(fontsize=8)
        locator: Any = axes.xaxis.get_major_locator()  # an AutoLocator
        locator.set_params(integer=True)
    return to_png(figure)


def new_figure(
    width: float, height: float, n: int, down: bool = False, heights: tuple[float, ...] | None = None
) -> tuple["Figure", list["Axes"]]:
    """A matplotlib figure (sizes in inches) without a window, and its n axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, used once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(n if down else 1, 1 if down else n, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def to_png(figure: "Figure") -> bytes:
    """A figure as PNG, in fonts that have its characters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_fontfamily(families())
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()
