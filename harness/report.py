"""Plots from the files of a run folder alone.

In: `metrics.json`. Out: PNG files. What stays true: nothing here needs the model or the images.
"""

import json
from pathlib import Path

import numpy as np


def draw_results(folder: Path) -> None:
    """Draw `confusion.png` beside a `metrics.json`."""
    metrics = json.loads((folder / "metrics.json").read_text())
    title = f"{metrics['split']} split, views: {metrics['views']}"
    draw_confusion(metrics["tta"]["confusion"], tuple(metrics["tta"]["per_class"]), title, folder / "confusion.png")


def draw_confusion(confusion: list[list[int]], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Draw a confusion matrix: colour is the share of the label's row, the number is the count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, used once a run
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    side = max(4.5, 0.75 * len(classes) + 1.8)
    figure = Figure(figsize=(side, side * 0.92), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}" if images[row] else "0"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), [f"{name} ({n})" for name, n in zip(classes, images[:, 0], strict=True)])
    axes.set(xlabel="predicted", ylabel="label (images)", title=title)
    figure.colorbar(picture, shrink=0.8, label="share of the label's images")
    figure.savefig(path)
