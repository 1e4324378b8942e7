"""The page and the plots of a run, from the files of its folder alone.

In: `metrics.json`, `predictions.csv`, and of a training also `log.jsonl`, `config.yaml`, `starts.jsonl`. Out:
`report.html`, one file that needs no network, and `confusion.png`. What stays true: nothing here needs the model or the
images; what a file does not say is left out, never guessed.
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd

from harness.calibration import with_temperature
from harness.config import Config, flat, load_config
from harness.metrics import BINS, OF_A_CLASS, OVERALL, shown

STYLE = """
:root{color-scheme:light dark;--line:#8885;--soft:#8882}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:2em 0 .5em;border-bottom:1px solid var(--line)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem;margin:1rem 0}
.card{background:var(--soft);border-radius:.5rem;padding:.6rem .8rem}.card b{display:block;font-size:1.5rem}
.card small,caption,.note{opacity:.75;font-size:.85rem}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}td,th{padding:.25rem .5rem;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}tr{border-bottom:1px solid var(--line)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(19rem,1fr));gap:.7rem;align-items:start}
img{width:100%;max-width:36rem;height:auto;background:#fff;border-radius:.4rem}.warning{border-left:4px solid #c80;padding:.3rem .8rem;background:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:40rem){dl{grid-template-columns:1fr}dt{font-weight:600;margin-top:.3rem}}
@media print{body{max-width:none}h2{break-after:avoid}img,table{break-inside:avoid}}
"""
LIMITS = (
    "For research on image classification. Not a medical device: do not use it for a diagnosis. The figures hold for images "
    "of the same kind, from the same clinics and cameras; another population may do worse. Intervals tell what chance did to "
    "this split, not what another hospital would do. HAM10000 is licensed CC BY-NC 4.0 (Tschandl, Rosendahl, Kittler, 2018)."
)


def draw_results(folder: Path) -> None:
    """Write `report.html` and `confusion.png` beside a `metrics.json`."""
    metrics = json.loads((folder / "metrics.json").read_text())
    picture = draw_confusion(metrics["tta"]["confusion"], tuple(metrics["tta"]["per_class"]), "test-time average")
    (folder / "confusion.png").write_bytes(picture)
    (folder / "report.html").write_text(page(folder, metrics, picture), encoding="utf-8")


def page(folder: Path, metrics: dict, confusion: bytes) -> str:
    """The whole page, as one HTML text."""
    scores = metrics["tta"]
    rows = pd.read_csv(folder / "predictions.csv", dtype={"group": str})
    entries = _lines(folder / "log.jsonl")
    parts = [
        f"<h1>{_text(metrics['model'])} on the {_text(metrics['split'])} split</h1>",
        f"<p class=note>{scores['images']} images, views: {_text(metrics['views'])}. In brackets: 95 % intervals, by "
        "resampling lesions (groups).</p>",
        *(f"<p class=warning>{_text(warning)}</p>" for warning in metrics["warnings"]),
        _cards(scores),
        "<h2>Classes</h2>" + _class_table(scores),
        "<div class=plots>"
        + _image(confusion, "confusion matrix")
        + _image(_curves(rows, scores), "ROC and PR")
        + "</div>",
        _gain(metrics),
        _calibration(rows, metrics),
        _operating_points(metrics),
    ]
    if any(entry["kind"] == "epoch" for entry in entries):
        parts.append("<h2>Training</h2>" + _image(_history(entries), "losses and scores by epoch"))
    parts += ["<h2>What was trained on what</h2>", _facts(folder, metrics, entries)]
    parts += ["<h2>Use and limits</h2>", f"<p>{LIMITS}</p>"]
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    title = f"{_text(metrics['model'])}, {_text(metrics['split'])} split"
    return f"<!doctype html><html lang=en><head>{head}<title>{title}</title><style>{STYLE}</style></head><body>" + (
        "\n".join(parts) + "</body></html>\n"
    )


def draw_confusion(confusion: list[list[int]], classes: tuple[str, ...], title: str) -> bytes:
    """A confusion matrix as PNG: colour is the share of the label's row, the number is the count."""
    counts = np.asarray(confusion)
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.zeros(counts.shape), where=images > 0)
    side = max(4.5, 0.75 * len(classes) + 1.8)
    figure, (axes,) = _figure(side, side * 0.92, 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.55 else "black"
        text = f"{counts[row, column]}\n{shares[row, column]:.0%}" if images[row] else "0"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), [f"{name} ({n})" for name, n in zip(classes, images[:, 0], strict=True)])
    axes.set(xlabel="predicted", ylabel="label (images)", title=title)
    figure.colorbar(picture, shrink=0.8, label="share of the label's images")
    return _png(figure)


def _curves(rows: pd.DataFrame, scores: dict) -> bytes:
    """ROC and precision-recall curves of each class that has images."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure, (left, right) = _figure(6.3, 8.2, 2, down=True)
    for name, row in scores["per_class"].items():
        if row["auc"] is None:
            continue
        truth, found = rows["label"] == name, rows[f"p_{name}"]
        false, true, _ = roc_curve(truth, found)
        left.plot(false, true, label=f"{name} {row['auc']:.3f}")
        precision, recall, _ = precision_recall_curve(truth, found)
        right.step(recall, precision, where="post", label=f"{name} {row['average_precision']:.3f}")
    left.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC (area)")
    right.set(xlabel="recall", ylabel="precision", title="precision and recall (average precision)", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(fontsize=8, loc="lower right" if axes is left else "lower left")
    return _png(figure)


def _reliability(confidences: dict[str, np.ndarray], right: np.ndarray) -> bytes:
    """Accuracy over confidence, with the number of images in each bin."""
    figure, (axes, below) = _figure(6.3, 6, 2, down=True, heights=(3, 1))
    for name, confidence in confidences.items():
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        known = counts > 0
        accuracy = np.bincount(bins, right, BINS)[known] / counts[known]
        axes.plot(np.bincount(bins, confidence, BINS)[known] / counts[known], accuracy, marker="o", label=name)
        below.bar((np.arange(BINS) + 0.5) / BINS, counts, width=0.9 / BINS, alpha=0.5)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set(ylabel="accuracy", title="does the model know how sure it may be?", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=8)
    below.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return _png(figure)


def _history(entries: list[dict]) -> bytes:
    """Losses and the scores that were monitored, epoch by epoch."""
    epochs = pd.DataFrame([entry for entry in entries if entry["kind"] == "epoch"])
    val = pd.DataFrame([entry for entry in entries if entry["kind"] == "val"])
    figure, (left, right) = _figure(6.3, 6.6, 2, down=True)
    left.plot(epochs["epoch"], epochs["loss"], label="training")
    left.plot(epochs["epoch"], val["loss"], label="validation")
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        right.plot(epochs["epoch"], val[name], label=name.replace("_", " "))
    left.set(xlabel="epoch", title="loss")
    right.set(xlabel="epoch", title="validation", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def _cards(scores: dict) -> str:
    cards = []
    for name in ("balanced_accuracy", "macro_f1", "accuracy", "macro_auc", "loss", "calibration_error"):
        edges = scores["intervals"][name]
        between = f"{edges[0]:.3f} to {edges[1]:.3f}" if edges else ""
        cards.append(
            f"<div class=card>{name.replace('_', ' ')}<b>{shown(scores[name])}</b><small>{between}</small></div>"
        )
    return "<div class=cards>" + "".join(cards) + "</div>"


def _class_table(scores: dict) -> str:
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("class", "images", *OF_A_CLASS))
    lines = []
    for label, row in scores["per_class"].items():
        cells = []
        for name in OF_A_CLASS:
            edges = scores["intervals"]["per_class"][label][name]
            between = f"<br><small class=note>{edges[0]:.2f} to {edges[1]:.2f}</small>" if edges else ""
            cells.append(f"<td>{shown(row[name])}{between}</td>")
        lines.append(f"<tr><td>{_text(label)}</td><td>{row['images']}</td>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _gain(metrics: dict) -> str:
    if metrics["views"] == "none":
        return ""
    lines = [
        f"<tr><td>{name.replace('_', ' ')}</td><td>{shown(metrics['plain'][name])}</td><td>{shown(metrics['tta'][name])}</td>"
        f"<td>{shown(metrics['gain'][name]['gain'], metrics['gain'][name]['interval'], '+.3f')}</td></tr>"
        for name in OVERALL
    ]
    head = "<tr><th></th><th>plain view</th><th>averaged</th><th>gain (paired interval)</th></tr>"
    return f"<h2>What the views add</h2><div class=wide><table>{head}{''.join(lines)}</table></div>"


def _calibration(rows: pd.DataFrame, metrics: dict) -> str:
    classes = list(metrics["tta"]["per_class"])
    probabilities = rows[[f"p_{name}" for name in classes]].to_numpy()
    right = (rows["prediction"] == rows["label"]).to_numpy()
    confidences = {"as it is": probabilities.max(1)}
    text = ""
    if found := metrics.get("calibration"):
        confidences["with the temperature"] = with_temperature(probabilities, found["temperature"]).max(1)
        text = (
            f"<p>Temperature {found['temperature']:.2f}, fitted on validation: calibration error "
            f"{metrics['tta']['calibration_error']:.3f} becomes {found['calibration_error']:.3f}, log loss "
            f"{metrics['tta']['loss']:.3f} becomes {found['loss']:.3f}.</p>"
        )
    return "<h2>Calibration</h2>" + text + _image(_reliability(confidences, right), "reliability diagram")


def _operating_points(metrics: dict) -> str:
    lines = []
    for point in metrics.get("operating_points", []):
        rates = (shown(**point[name]) for name in ("sensitivity", "specificity", "positive_predictive_value"))
        cells = "".join(f"<td>{rate}</td>" for rate in rates)
        lines.append(
            f"<tr><td>{_text(point['positive'])} ({point['positives']})</td><td>{point['wanted_sensitivity']:.2f}</td>"
            f"<td>{point['threshold']:.3f}</td>{cells}</tr>"
        )
    if not lines:
        return ""
    head = "".join(
        f"<th>{name}</th>"
        for name in (
            "against the rest (images)",
            "wanted",
            "threshold",
            "sensitivity",
            "specificity",
            "pos. predictive value",
        )
    )
    text = "<p class=note>The threshold finds the wanted share on validation; the rates are of this split.</p>"
    return f"<h2>Operating points</h2>{text}<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _facts(folder: Path, metrics: dict, entries: list[dict]) -> str:
    facts = {
        "dataset": f"{metrics['dataset'][:12]}, split protocol {metrics['protocol']['name']}",
        "trained on": metrics["trained_on"][:12],
        "best epoch": metrics["best_epoch"],
    }
    epochs = [entry for entry in entries if entry["kind"] == "epoch"]
    if epochs:
        facts["images/s"] = f"{np.median([entry['images_per_s'] for entry in epochs]):.0f} (median over epochs)"
        facts["waiting for data"] = f"{np.mean([entry['waited'] for entry in epochs]):.1%} of the training time"
    if starts := _lines(folder / "starts.jsonl"):
        facts["starts"] = f"{len(starts)} ({', '.join('step ' + str(start['step']) for start in starts[:8])})"
        facts["ran on"] = starts[-1]["world"]
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in starts[-1]["versions"].items())
    if (folder / "config.yaml").is_file():
        default = flat(Config())
        chosen = {
            key: value for key, value in flat(load_config(folder / "config.yaml")).items() if value != default[key]
        }
        facts["settings that differ from the defaults"] = ", ".join(f"{key} {value}" for key, value in chosen.items())
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _text(value) -> str:
    return html.escape(str(value))


def _image(png: bytes, text: str) -> str:
    return f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _figure(width: float, height: float, n: int, down: bool = False, heights: tuple[float, ...] | None = None):
    """A matplotlib figure (sizes in inches) without a window, and its n axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, used once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(n if down else 1, 1 if down else n, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()
