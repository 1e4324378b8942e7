"""The model card beside an exported file: README.md in the format of Hugging Face.

In: a trained run and what was measured of the file. Out: the text. Invariants: every word about data, protocol and results is
from the run's own files; the metrics are those of what the file computes, the center view.
"""

import json
from dataclasses import dataclass

import yaml

from harness.evaluation.metrics import CLASS_METRICS
from harness.export.example import USES
from harness.export.scoring import Parity
from harness.export.trained import Trained
from harness.model.build import TIMM
from harness.report.text import LIMITS, format_metric, title

LICENSES = {
    "CC0",
    "CC BY",
    "CC BY-SA",
    "CC BY-NC",
    "CC BY-NC-SA",
    "CC BY-NC-ND",
    "CC BY-ND",
}  # of the hub's, with versions
METRICS = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auc")
CLASS_COLUMNS = ("precision", "recall", "specificity", "f1", "auc")
assert set(CLASS_COLUMNS) <= set(CLASS_METRICS)


@dataclass(frozen=True)
class Written:
    """One file of an export: its name, bytes, how it compares with the harness, milliseconds by batch size.

    cost: of a quantised file, how much its balanced accuracy on the validation split is greater: {gain, interval}.
    """

    name: str
    n_bytes: int
    parity: Parity
    latency_ms: dict[int, float]
    cost: dict | None = None


def model_card(trained: Trained, words: dict[str, str], kind: str, files: list[Written]) -> str:
    """The text of README.md.

    Args:
        words: the metadata of the file. kind: onnx, torch or safetensors. files: as written.
    """
    use = f"{kind}-outside" if kind == "onnx" and words["preprocessing"] == "outside" else kind
    sections = [
        _front_matter(trained, kind),
        f"# {_title(trained)}",
        _what(trained, words),
        "## Data",
        _data(trained),
        "## Results",
        _results(trained),
        *_thresholds(words),
        "## Files",
        _files(files),
        "## Use",
        USES[use].strip(),
        "## Limits",
        _limits(trained),
    ]
    return "\n\n".join(sections) + "\n"


def _title(trained: Trained) -> str:
    return f"{trained.name.removeprefix(TIMM)} for {_data_name(trained)}"


def _data_name(trained: Trained) -> str:
    return str(trained.dataset.description.source["name"])


def _front_matter(trained: Trained, kind: str) -> str:
    description, results = trained.dataset.description, trained.results
    library = {"onnx": "onnx", "torch": "pytorch"}.get(kind, "timm" if trained.name.startswith(TIMM) else "pytorch")
    content: dict = _license(description.license) | {
        "library_name": library,
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "dermharness", kind],
        "metrics": ["accuracy", "balanced_accuracy", "f1", "roc_auc"],
    }
    split = f"{_data_name(trained)}, {results.split} split"
    measured = [
        {"type": name, "name": f"{title(name)}, center view", "value": round(results.center[name], 4)}
        for name in METRICS
        if results.center[name] is not None
    ]
    task = {"type": "image-classification"}
    dataset = {"type": "imagefolder", "name": split, "split": results.split}
    content["model-index"] = [
        {"name": _title(trained), "results": [{"task": task, "dataset": dataset, "metrics": measured}]}
    ]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---"


def _license(text: str) -> dict[str, str]:
    """The hub's entry for the licence of the data; none where it is not known."""
    if not text:
        return {}
    family, _, number = text.rpartition(" ")
    if family in LICENSES and number.replace(".", "").isdecimal():
        return {"license": text.lower().replace(" ", "-")}
    return {"license": "other", "license_name": text}


def _what(trained: Trained, words: dict[str, str]) -> str:
    size, (width, height) = trained.results.image_size, trained.stored
    origin = "trained from scratch" if trained.config.model.weights == "none" else "fine-tuned"
    if words["preprocessing"] == "inside":
        takes = (
            f"It takes RGB images of any size as they are, uint8 (N, H, W, 3), brings them to {width}x{height} pixels "
            f"(`{words['fit']}`, Pillow's antialiased bicubic), and takes the central square at {size} pixels."
        )
    else:
        takes = (
            f"It takes normalised views, float32 (N, 3, {size}, {size}): images at {width}x{height} pixels (`{words['fit']}`), "
            f"the central square at {size} pixels, from 0 to 1, mean {words['mean']}, standard deviation {words['std']}."
        )
    gives = (
        "logits" if words["preprocessing"] == "none" else f"probabilities, with temperature {trained.temperature:.4g}"
    )
    return (
        f"A classifier of {len(trained.classes)} classes ({', '.join(trained.classes)}), {origin}. {takes} "
        f"It gives {gives}, (N, {len(trained.classes)}) float32. Dataset, weights and version are in the file's metadata."
    )


def _data(trained: Trained) -> str:
    description = trained.dataset.description
    lines = [
        f"- {_data_name(trained)}, fingerprint `{trained.dataset.fingerprint}`.",
        f"- Split by {description.group_name}: {trained.dataset.describe_split()}.",
        "- Images: "
        + ", ".join(f"{sum(counts.values())} {split}" for split, counts in description.counts.items())
        + ".",
    ]
    if description.license:
        lines.append(
            f"- Licence of the images: {description.license}. Whether it covers the weights is for their user to decide."
        )
    if description.citation:
        lines.append(f"- Cite: {description.citation}")
    return "\n".join(lines)


def _results(trained: Trained) -> str:
    results = trained.results
    center, intervals = results.center, results.center["intervals"]
    rows = [f"| {title(name)} | {format_metric(center[name], intervals[name])} |" for name in METRICS]
    head = (
        f"The center view, as the file computes it, on {center['images']} images of the {results.split} split; in brackets "
        f"95 % bootstrap intervals, resampled by {results.group_name}."
    )
    if results.views != "none":
        averaged = format_metric(results.tta["balanced_accuracy"], results.tta["intervals"]["balanced_accuracy"])
        head += f" Averaged over the views `{results.views}`, which the file does not do: balanced accuracy {averaged}."
    table = [f"| class | images | {' | '.join(CLASS_COLUMNS)} |", "|---" * (2 + len(CLASS_COLUMNS)) + "|"]
    for label, row in center["per_class"].items():
        cells = [format_metric(row[name], intervals["per_class"][label][name], ".2f") for name in CLASS_COLUMNS]
        table.append(f"| {_cell(label)} | {row['images']} | {' | '.join(cells)} |")
    return "\n\n".join([head, "\n".join(["| metric | value |", "|---|---|", *rows]), "\n".join(table)])


def _cell(name: str) -> str:
    return name.replace("|", r"\|")


def _thresholds(words: dict[str, str]) -> list[str]:
    """The section of thresholds; none where there are none."""
    points = json.loads(words["thresholds"])
    if not points:
        return []
    head = (
        "Thresholds for the probabilities of the file, chosen on the validation split; their rates on another split were not "
        "measured. A quantised file has its own, in its metadata."
    )
    rows = [
        f"| {_cell(point['positive'])} | {point['wanted_sensitivity']} | {point['threshold']} |" for point in points
    ]
    return [head, "\n".join(["| positive | wanted sensitivity | threshold |", "|---|---|---|", *rows])]


def _files(files: list[Written]) -> str:
    lines = [
        "| file | MB | largest difference to the harness | equal classes | images compared |",
        "|---|---|---|---|---|",
    ]
    for file in files:
        parity = file.parity
        lines.append(
            f"| `{file.name}` | {file.n_bytes / 1e6:.1f} | {parity.difference:.1e} | {parity.same_class:.1%} | {parity.images} |"
        )
    for file in files:
        if file.cost is not None:
            lines += [
                "",
                f"`{file.name}` changes balanced accuracy on the validation split by {describe_cost(file.cost)}.",
            ]
    return "\n".join(lines)


def describe_cost(cost: dict) -> str:
    """A paired difference with its 95 % interval: `-0.004 (-0.012 to +0.003)`."""
    return format_metric(cost["gain"], cost["interval"], "+.3f")


def _limits(trained: Trained) -> str:
    warnings = [f"- {warning}" for warning in trained.results.warnings]
    return "\n".join([LIMITS, *(["", "What was said of the results:", "", *warnings] if warnings else [])])
