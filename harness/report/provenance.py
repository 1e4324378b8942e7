"""Where results come from, and how far they go: the last part of the report.

In: a run's folder, its results, its epochs. Out: HTML. Invariants: what a file does not say, or says in a damaged way, is left out.
"""

from pathlib import Path

import numpy as np

from harness.config import Config, flat, load_config
from harness.evaluation.results import Results
from harness.report.markup import MANY_LINES, text
from harness.report.text import LIMITS, efficiency_facts
from harness.run.log import read_json_lines
from shards.audit.record import describe, read_audit
from shards.description import read_description
from shards.shape import misfit

START = {"step": int, "world": str, "versions": {str: str}}  # a line of starts.jsonl


def provenance_html(folder: Path, results: Results, epochs: list[dict]) -> str:
    """Data, starts, machine, versions and settings. epochs: lines of log.jsonl."""
    facts = {
        "dataset": f"{results.dataset[:12]}, split protocol {results.protocol['name']}",
        "trained on": results.trained_on[:12],
        "best epoch": results.best_epoch,
    }
    facts |= _data_facts(folder / "dataset.json")
    if united := results.protocol.get("united_pairs"):
        facts["united"] = f"the groups of {united} pairs of images, which an audit found to show one thing"
    found = read_audit(folder)
    facts["audit"] = (
        describe(found) if found else "none known: `python -m shards audit` looks for one thing under two names"
    )
    if epochs := [entry for entry in epochs if entry["images_per_s"]]:  # 0: trained before the start that validated it
        facts["images/s"] = f"{np.median([entry['images_per_s'] for entry in epochs]):.0f} (median over epochs)"
        facts["waiting for data"] = f"{np.mean([entry['waited'] for entry in epochs]):.1%} of the training time"
        facts |= efficiency_facts(epochs)
    if starts := json_lines(folder / "starts.jsonl", None, START):
        facts["starts"] = f"{len(starts)} ({', '.join('step ' + str(start['step']) for start in starts[:8])})"
        facts["ran on"] = starts[-1]["world"]
        facts["versions"] = ", ".join(f"{name} {number}" for name, number in starts[-1]["versions"].items())
    if (folder / "config.yaml").is_file():
        default, settings = flat(Config()), flat(load_config(folder / "config.yaml"))
        facts["settings that differ from the defaults"] = ", ".join(
            f"{key} {_setting(value)}" for key, value in settings.items() if value != default[key]
        )
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _data_facts(path: Path) -> dict[str, str]:
    """What a reader of a model card asks of the training data; nothing where the run's own description is not there, or damaged."""
    try:
        about = read_description(path)
    except (OSError, ValueError):
        return {}
    facts = {"source": f"{about.source['name']}, stored as {about.size[0]}x{about.size[1]} ({about.fit})"}
    for name, counts in about.counts.items():
        listed = sorted(counts.items(), key=lambda pair: -pair[1])[:MANY_LINES]
        more = f", and {len(counts) - MANY_LINES} more classes" if len(counts) > MANY_LINES else ""
        facts[f"{name} images"] = f"{sum(counts.values())}: " + ", ".join(f"{label} {n}" for label, n in listed) + more
    return facts


def limits_html(results: Results) -> str:
    """For what the model is, and how its data are cited and licensed."""
    data = " ".join(
        f"{name}: {value.rstrip('.')}."
        for name, value in (("Data", results.citation), ("License of the data", results.license))
        if value
    )
    return f"<p>{LIMITS}</p>" + (f"<p>{text(data)}</p>" if data else "")


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def json_lines(path: Path, kind: str | None, shape: dict) -> list[dict]:
    """The lines of a file that have a shape, of one kind of entry if it has several; what is damaged is left out."""
    return [
        entry for entry in read_json_lines(path) if kind in (None, entry.get("kind")) and misfit(entry, shape) is None
    ]
