"""The report of a run or of an evaluation, from the files of its folder.

In: `metrics.json`, `predictions.csv`, and of a training also `config.yaml`, `log.jsonl`, `starts.jsonl`, `state.json`; the
dataset where it is at hand. Out: `images/`, `audit.json`, `confusion.png`, `report.html` (one file that needs no network), TensorBoard's
results. Invariants: nothing here needs the model; what a file does not say is left out, never guessed; every text that comes
from a file is escaped; drawing it again gives the same.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from harness.config import load_config
from harness.evaluation.calibration import with_temperature
from harness.evaluation.ensemble import Member
from harness.evaluation.layout import RATES
from harness.evaluation.metrics import CLASS_METRICS, SUMMARY_METRICS
from harness.evaluation.results import Results, read_predictions, read_results
from harness.evaluation.subgroups import MIN_SUBGROUP, SUBGROUP_METRICS
from harness.report.gallery import AUGMENTED, FOLDER, gallery_html, save_gallery, save_heat_maps
from harness.report.markup import MANY_LINES, STYLE, cell, image, table, text
from harness.report.plots import curve_classes, draw_confusion, draw_curves, draw_history, draw_reliability
from harness.report.provenance import json_lines, limits_html, provenance_html
from harness.report.tensorboard import write_tensorboard
from harness.report.text import (
    PRIOR_NOTES,
    describe_ensemble,
    describe_temperature,
    format_metric,
    title,
)
from shards.audit.record import keep_audit
from shards.index import Dataset

CARDS = ("balanced_accuracy", "macro_f1", "accuracy", "macro_auc", "loss", "calibration_error")


EPOCH = {  # a line of log.jsonl
    "epoch": int,
    "loss": float,
    "images_per_s": float,
    "waited": float,
}
VALIDATION = dict.fromkeys(("loss", "accuracy", "balanced_accuracy", "macro_f1"), (float, None))


def draw_report(folder: Path, dataset: Dataset | None = None, explained: Member | None = None) -> None:
    """Draw all of the report of a finished run, or of a result of `launch/evaluate.py`; it can be drawn again at any time.

    Args:
        dataset: the one that was evaluated, for `images/` and its audit. Without it, or with another, what is there stays.
        explained: a model that took part, for heat maps beside these images.

    Raises:
        FileNotFoundError, ValueError: no results, or of another format, or settings of another version.
        OSError: the folder cannot be written.
    """
    saved = folder / "config.yaml"
    config = load_config(saved) if saved.is_file() else None  # None: not the folder of a training
    results, rows = read_results(folder), read_predictions(folder)
    if [name for name in rows if name.startswith("p_")] != [f"p_{name}" for name in results.classes]:
        raise ValueError(
            f"The predictions.csv of {folder} has other classes than its metrics.json. Restore a copy of both."
        )
    if dataset is not None and dataset.fingerprint == results.dataset:
        keep_audit(dataset, folder)
        save_gallery(folder, results.split, rows, dataset, config)
        if explained is not None:
            save_heat_maps(folder, results.split, rows, dataset, explained)
    plots = write_page(folder, results, rows)
    if config is not None and "tensorboard" in config.run.trackers:
        write_tensorboard(folder, results, rows, config, plots)


def write_page(folder: Path, results: Results, rows: pd.DataFrame) -> dict[str, bytes]:
    """Write `report.html` and `confusion.png` into a folder of results; rows: of predictions.csv.

    Returns:
        the plots of the results by name, as PNG.
    """
    plots = {
        "confusion": draw_confusion(results.tta["confusion"], results.classes, "test-time average"),
        "curves": draw_curves(rows, results.tta),
        "reliability": draw_reliability(*_confidences(rows, results)),
    }
    (folder / "confusion.png").write_bytes(plots["confusion"])
    (folder / "report.html").write_text(_page(folder, results, rows, plots), encoding="utf-8")
    return plots


def _page(folder: Path, results: Results, rows: pd.DataFrame, plots: dict[str, bytes]) -> str:
    """The whole page, as one HTML text."""
    epochs, val = (
        json_lines(folder / "log.jsonl", "epoch", EPOCH),
        json_lines(folder / "log.jsonl", "val", VALIDATION),
    )
    heading = text(f"{results.model}, {results.split} split")
    parts = [
        f"<h1>{heading}</h1>",
        f"<p class=note>{results.tta['images']} images, views: {text(results.views)}. Ranges are 95 % bootstrap intervals, "
        f"resampled by {text(results.group_name)}.</p>",
        *([f"<p>{text(describe_ensemble(results.ensemble))}.</p>"] if results.ensemble else []),
        *(f"<p class=warning>{text(warning)}</p>" for warning in results.warnings),
        _cards(results.tta),
        "<h2>Classes</h2>" + _class_table(results.tta),
        f"<div class=plots>{image(plots['confusion'], 'confusion matrix')}"
        f"{image(plots['curves'], 'ROC and precision-recall curves' + curve_classes(results.tta)[1])}</div>",
        _comparison(results),
        _calibration(results, plots["reliability"]),
        _operating_points(results),
        _subgroups(results),
        gallery_html(folder, rows),
        _training(folder, epochs, val),
        "<h2>Provenance</h2>" + provenance_html(folder, results, epochs),
        "<h2>Use and limits</h2>" + limits_html(results),
    ]
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    head += f"<title>{heading}</title><style>{STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _cards(metrics: dict) -> str:
    cards = []
    for name in CARDS:
        interval = metrics["intervals"][name]
        between = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        cards.append(
            f"<div class=card>{title(name)}<b>{format_metric(metrics[name])}</b><small>{between}</small></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _class_table(metrics: dict) -> str:
    """In the model's order; where the table is so long that most of it is folded, the lowest F1 first."""
    lines, classes, note = [], metrics["per_class"], ""
    if len(classes) > MANY_LINES:
        known = [label for label, row in classes.items() if row["f1"] is not None]
        by_f1 = sorted(known, key=lambda label: classes[label]["f1"])
        classes = {label: classes[label] for label in [*by_f1, *classes]}
        note = "<p class=note>The lowest F1 first.</p>"
    for label, row in classes.items():
        intervals = metrics["intervals"]["per_class"][label]
        lines.append([text(label), str(row["images"]), *(cell(row[name], intervals[name]) for name in CLASS_METRICS)])
    return note + table(["class", "images", *map(title, CLASS_METRICS)], lines)


def _comparison(results: Results) -> str:
    """Metrics of the same predictions, read in other ways: center view, average, each view by itself, prior-corrected."""
    has_views, notes = results.views != "none", []
    columns = {"center view": results.center} if has_views else {}
    columns["average over views" if has_views else "center view"] = results.tta
    if results.per_view:
        columns["each view by itself"] = results.per_view
        notes.append("Each view by itself: as many predictions as there are views, none averaged.")
    if corrected := results.prior_corrected:
        columns[f"prior: {corrected['target_name']}"] = corrected
        notes.append(PRIOR_NOTES[corrected["target_name"]])
    if len(columns) == 1:
        return ""
    lines = []
    for name in SUMMARY_METRICS:
        line = [title(name), *(format_metric(metrics[name]) for metrics in columns.values())]
        if has_views:
            line.append(format_metric(results.tta_gain[name]["gain"], results.tta_gain[name]["interval"], "+.3f"))
        lines.append(line)
    head = ["", *columns, *(["TTA gain (paired)"] if has_views else [])]
    note = f"<p class=note>{' '.join(notes)}</p>" if notes else ""
    return "<h2>Views and class priors</h2>" + table(head, lines) + note


def _calibration(results: Results, reliability: bytes) -> str:
    note = ""
    if fitted := results.calibration:
        note = (
            f"<p>Temperature {describe_temperature(fitted['temperature'])}: calibration error "
            f"{results.tta['calibration_error']:.3f} becomes {fitted['calibration_error']:.3f}, log loss "
            f"{results.tta['loss']:.3f} becomes {fitted['loss']:.3f}.</p>"
        )
    return "<h2>Calibration</h2>" + note + image(reliability, "reliability diagram")


def _confidences(rows: pd.DataFrame, results: Results) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Confidence of each prediction, (N,), before and after the temperature, and whether it is right, (N,) bool."""
    probabilities = rows[[f"p_{name}" for name in results.classes]].to_numpy(float)
    confidences = {"as it is": probabilities.max(1)}
    if results.calibration:
        confidences["with the temperature"] = with_temperature(probabilities, results.calibration["temperature"]).max(1)
    return confidences, (rows["prediction"] == rows["label"]).to_numpy()


def _operating_points(results: Results) -> str:
    if not results.operating_points:
        return ""
    lines = []
    for point in results.operating_points:
        rates = (cell(**point[name]) for name in RATES)
        wanted, threshold = f"{point['wanted_sensitivity']:.2f}", f"{point['threshold']:.3f}"
        lines.append([text(point["positive"]), str(point["positives"]), wanted, threshold, *rates])
    head = ["against the rest", "images", "wanted sensitivity", "threshold", *map(title, RATES)]
    note = "<p class=note>Thresholds reach the wanted sensitivity on validation; the rates are of this split.</p>"
    return "<h2>Operating points</h2>" + note + table(head, lines)


def _subgroups(results: Results) -> str:
    tables = []
    for column, subgroups in results.subgroups.items():
        if len(subgroups) == 1:
            continue  # the same for all images
        lines = []
        for value, metrics in subgroups.items():
            cells = (cell(metrics[name], metrics["intervals"][name]) for name in SUBGROUP_METRICS)
            lines.append([text(value), str(metrics["images"]), *cells])
        small = [metrics["small"] for metrics in subgroups.values()]
        tables.append(table([title(column), "images", *map(title, SUBGROUP_METRICS)], lines, small))
    if not tables:
        return ""
    note = (
        f"<p class=note>Grey: fewer than {MIN_SUBGROUP} images, too few to rely on. Balanced accuracy is over the classes "
        "that a row has.</p>"
    )
    return "<h2>Subgroup performance</h2>" + note + "".join(tables)


def _training(folder: Path, epochs: list[dict], val: list[dict]) -> str:
    parts = []
    if epochs and len(epochs) == len(val):
        parts.append("<h2>Training</h2>" + image(draw_history(epochs, val), "losses and metrics by epoch"))
    if (sheet := folder / FOLDER / AUGMENTED).is_file():
        parts.append("<h2>Augmented training images</h2>" + image(sheet.read_bytes(), "augmented images", "jpeg"))
    return "".join(parts)
