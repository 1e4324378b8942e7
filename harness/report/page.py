"""The page of a run, from the files of its folder alone.

In: `metrics.json`, `predictions.csv`, `pictures/`, and of a training also `log.jsonl`, `config.yaml`, `starts.jsonl`. Out:
`report.html`, one file that needs no network, and `confusion.png`. What stays true: nothing here needs the model or the
images; what a file does not say is left out, never guessed.
"""

import base64
import html
import json
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config import Config, flat, load_config
from harness.evaluation.calibration import with_temperature
from harness.evaluation.gallery import AUGMENTED, FOLDER, LIST
from harness.evaluation.metrics import CLASS_METRICS, SUMMARY_METRICS, format_metric
from harness.evaluation.results import MIN_SUBGROUP, SUBGROUP_METRICS
from harness.report.plots import draw_confusion, draw_curves, draw_history, draw_reliability

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
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.7rem}figure{margin:0}
figcaption{font-size:.8rem;overflow-wrap:anywhere}.small{opacity:.55}.wide+.wide{margin-top:1rem}
@media(max-width:40rem){dl{grid-template-columns:1fr}dt{font-weight:600;margin-top:.3rem}}
@media print{body{max-width:none}h2{break-after:avoid}img,table{break-inside:avoid}}
"""
READINGS = {
    "equal": "Equal frequencies: probabilities divided by how frequent each class was in training.",
    "training": "Training frequencies: the training made up for them; here the probabilities are multiplied by them again.",
}
LIMITS = (
    "For research on image classification. Not a medical device: do not use it for a diagnosis. The figures hold for images "
    "of the same kind, from the same clinics and cameras; another population may do worse. Intervals tell what chance did to "
    "this split, not what another hospital would do. HAM10000 is licensed CC BY-NC 4.0 (Tschandl, Rosendahl, Kittler, 2018)."
)


def draw_results(folder: Path) -> dict[str, bytes]:
    """Write `report.html` and `confusion.png` beside a `metrics.json`; the plots of the results, as PNG."""
    metrics, rows = read_results(folder)
    scores = metrics["tta"]
    plots = {
        "confusion": draw_confusion(scores["confusion"], tuple(scores["per_class"]), "test-time average"),
        "curves": draw_curves(rows, scores),
        "reliability": draw_reliability(*_confidences(rows, metrics)),
    }
    (folder / "confusion.png").write_bytes(plots["confusion"])
    (folder / "report.html").write_text(page(folder, metrics, rows, plots), encoding="utf-8")
    return plots


def read_results(folder: Path) -> tuple[dict, pd.DataFrame]:
    """The content of `metrics.json` and `predictions.csv`."""
    rows = pd.read_csv(folder / "predictions.csv", dtype={"group": str})
    return json.loads((folder / "metrics.json").read_text()), rows


def page(folder: Path, metrics: dict, rows: pd.DataFrame, plots: dict[str, bytes]) -> str:
    """The whole page, as one HTML text."""
    scores = metrics["tta"]
    entries = _lines(folder / "log.jsonl")
    parts = [
        f"<h1>{_text(metrics['model'])} on the {_text(metrics['split'])} split</h1>",
        f"<p class=note>{scores['images']} images, views: {_text(metrics['views'])}. In brackets: 95 % intervals, by "
        "resampling lesions (groups).</p>",
        *(f"<p class=warning>{_text(warning)}</p>" for warning in metrics["warnings"]),
        _cards(scores),
        "<h2>Classes</h2>" + _class_table(scores),
        "<div class=plots>"
        + _image(plots["confusion"], "confusion matrix")
        + _image(plots["curves"], "ROC and PR")
        + "</div>",
        _gain(metrics),
        _calibration(metrics, plots["reliability"]),
        _operating_points(metrics),
        _breakdown(metrics),
        _pictures(folder, rows),
    ]
    if any(entry["kind"] == "epoch" for entry in entries):
        parts.append("<h2>Training</h2>" + _image(draw_history(entries), "losses and scores by epoch"))
    if (folder / FOLDER / AUGMENTED).is_file():
        sheet = (folder / FOLDER / AUGMENTED).read_bytes()
        parts.append("<h2>Training pictures, as the model saw them</h2>" + _image(sheet, "augmented pictures", "jpeg"))
    parts += ["<h2>What was trained on what</h2>", _facts(folder, metrics, entries)]
    parts += ["<h2>Use and limits</h2>", f"<p>{LIMITS}</p>"]
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    title = f"{_text(metrics['model'])}, {_text(metrics['split'])} split"
    return f"<!doctype html><html lang=en><head>{head}<title>{title}</title><style>{STYLE}</style></head><body>" + (
        "\n".join(parts) + "</body></html>\n"
    )


def _cards(scores: dict) -> str:
    cards = []
    for name in ("balanced_accuracy", "macro_f1", "accuracy", "macro_auc", "loss", "calibration_error"):
        edges = scores["intervals"][name]
        between = f"{edges[0]:.3f} to {edges[1]:.3f}" if edges else ""
        cards.append(
            f"<div class=card>{name.replace('_', ' ')}<b>{format_metric(scores[name])}</b><small>{between}</small></div>"
        )
    return "<div class=cards>" + "".join(cards) + "</div>"


def _class_table(scores: dict) -> str:
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("class", "images", *CLASS_METRICS))
    lines = []
    for label, row in scores["per_class"].items():
        cells = []
        for name in CLASS_METRICS:
            cells.append(
                f"<td>{format_metric(row[name])}{_between(scores['intervals']['per_class'][label][name])}</td>"
            )
        lines.append(f"<tr><td>{_text(label)}</td><td>{row['images']}</td>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _gain(metrics: dict) -> str:
    """The same predictions read in other ways: plain view, averaged views, each view by itself, equal class frequencies."""
    readings = {"averaged views": metrics["tta"]}
    if metrics["views"] != "none":
        readings = {"plain view": metrics["plain"]} | readings
    if "pooled" in metrics:
        readings["each view by itself"] = metrics["pooled"]
    if "adjusted" in metrics:
        readings[f"{metrics['adjusted']['to']} frequencies"] = metrics["adjusted"]
    if len(readings) == 1:
        return ""
    gains = "<th>gain of the views (paired)</th>" if metrics["views"] != "none" else ""
    head = "<tr><th></th>" + "".join(f"<th>{name}</th>" for name in readings) + gains + "</tr>"
    lines = []
    for name in SUMMARY_METRICS:
        cells = "".join(f"<td>{format_metric(scores[name])}</td>" for scores in readings.values())
        if gains:
            cells += (
                f"<td>{format_metric(metrics['gain'][name]['gain'], metrics['gain'][name]['interval'], '+.3f')}</td>"
            )
        lines.append(f"<tr><td>{name.replace('_', ' ')}</td>{cells}</tr>")
    notes = []
    if "pooled" in metrics:
        notes.append("Each view by itself: as many predictions as there are views, none averaged.")
    if "adjusted" in metrics:
        notes.append(READINGS[metrics["adjusted"]["to"]])
    return (
        f"<h2>Other readings of the same predictions</h2><div class=wide><table>{head}{''.join(lines)}</table></div>"
        f"<p class=note>{' '.join(notes)}</p>"
    )


def _calibration(metrics: dict, reliability: bytes) -> str:
    text = ""
    if found := metrics.get("calibration"):
        text = (
            f"<p>Temperature {found['temperature']:.2f}, fitted on validation: calibration error "
            f"{metrics['tta']['calibration_error']:.3f} becomes {found['calibration_error']:.3f}, log loss "
            f"{metrics['tta']['loss']:.3f} becomes {found['loss']:.3f}.</p>"
        )
    return "<h2>Calibration</h2>" + text + _image(reliability, "reliability diagram")


def _confidences(rows: pd.DataFrame, metrics: dict) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Confidence of each prediction, (N,), before and after the temperature, and whether it is right."""
    probabilities = rows[[f"p_{name}" for name in metrics["tta"]["per_class"]]].to_numpy()
    confidences = {"as it is": probabilities.max(1)}
    if found := metrics.get("calibration"):
        confidences["with the temperature"] = with_temperature(probabilities, found["temperature"]).max(1)
    return confidences, (rows["prediction"] == rows["label"]).to_numpy()


def _operating_points(metrics: dict) -> str:
    lines = []
    for point in metrics.get("operating_points", []):
        rates = (format_metric(**point[name]) for name in ("sensitivity", "specificity", "positive_predictive_value"))
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


def _breakdown(metrics: dict) -> str:
    tables = []
    for column, cells in metrics.get("breakdown", {}).items():
        if len(cells) == 1:
            continue  # the same for all images
        lines = []
        for value, cell in cells.items():
            figures = "".join(
                f"<td>{format_metric(cell[name])}{_between(cell['intervals'][name])}</td>" for name in SUBGROUP_METRICS
            )
            small = " class=small" if cell["small"] else ""
            lines.append(f"<tr{small}><td>{_text(value)}</td><td>{cell['images']}</td>{figures}</tr>")
        head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in (column, "images", *SUBGROUP_METRICS))
        tables.append(f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>")
    if not tables:
        return ""
    note = f"<p class=note>Grey: fewer than {MIN_SUBGROUP} images, which say little. Balanced accuracy is over the classes of a row.</p>"
    return "<h2>Who the images are of</h2>" + note + "".join(tables)


def _pictures(folder: Path, rows: pd.DataFrame) -> str:
    """The worst mistakes and the least sure predictions, where their pictures were kept."""
    listed = folder / FOLDER / LIST
    if not listed.is_file():
        return ""
    by_key, parts = rows.set_index("key"), []
    titles = {"mistakes": "The worst mistakes", "unsure": "The least sure"}
    for kind, keys in json.loads(listed.read_text()).items():
        figures = []
        for key in keys:
            path, row = folder / FOLDER / f"{key:08d}.jpg", by_key.loc[key]
            if path.is_file():
                truth = (
                    "right"
                    if row["prediction"] == row["label"]
                    else f"is {row['label']} {row['p_' + row['label']]:.2f}"
                )
                said = f"{row['prediction']} {row['p_' + row['prediction']]:.2f}, {truth}"
                picture = _image(path.read_bytes(), _text(row["image_id"]), "jpeg")
                figures.append(
                    f"<figure>{picture}<figcaption>{_text(said)}<br>{_text(row['image_id'])}</figcaption></figure>"
                )
        if figures:
            parts.append(f"<h2>{titles[kind]}</h2><div class=pictures>{''.join(figures)}</div>")
    return "".join(parts)


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


def _between(edges: list[float] | None) -> str:
    return f"<br><small class=note>{edges[0]:.2f} to {edges[1]:.2f}</small>" if edges else ""


def _image(data: bytes, text: str, kind: str = "png") -> str:
    return f'<img alt="{text}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
