"""Results as human-readable text, for a terminal.

In: `Results`. Out: lines of text. Invariants: metrics are printed by their names; what is not defined says so.
"""

from statistics import median

from harness.evaluation.calibration import is_at_edge
from harness.evaluation.results import Results

# The lines below the table of classes. Of the two F1 averages only the macro one: the other is mostly the commonest class's.
SUMMARY_LINES = (
    ("accuracy", "balanced_accuracy", "macro_f1"),
    ("macro_auc", "kappa"),
    ("loss", "brier", "calibration_error"),
)
CLASS_COLUMNS = ("precision", "recall", "f1", "auc")
PER_VIEW_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
PRIOR_METRICS = ("accuracy", "balanced_accuracy", "macro_auc", "loss")
PRIOR_TEXT = {
    "equal": "prior-corrected to equal class frequencies",
    "training": "prior-corrected to the class frequencies of training",
}
PRIOR_NOTES = {
    "equal": "At equal class frequencies: probabilities divided by how frequent each class was in training.",
    "training": "At the class frequencies of training, which the training made up for: probabilities multiplied by them.",
}
LIMITS = (
    "For research on image classification. Not a medical device: do not use it for a diagnosis. The metrics hold for images "
    "of the same kind, from the same sources; performance on another population may be lower. Intervals cover the sampling "
    "of this split, not the difference to another site."
)


def format_metric(value: float | None, interval: list[float] | None = None, form: str = ".3f") -> str:
    """A metric with its interval: `0.812 (0.790 to 0.833)`, or `not defined`."""
    if value is None:
        return "not defined"
    return f"{value:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")


def title(name: str) -> str:
    """A name of a metric as words; the class in `recall of my_class` as it is."""
    metric, of, label = name.partition(" of ")
    return metric.replace("_", " ") + of + label


def class_table(metrics: dict, group_name: str = "group") -> str:
    """Per-class and summary metrics, as from `compute_metrics`; 95 % intervals where there are any."""
    intervals = metrics.get("intervals")
    width = max(10, *(len(name) + 2 for name in metrics["per_class"]))
    cell = 20 if intervals else 13
    lines = [f"{'class':<{width}}{'images':>8}" + "".join(f"{name:>{cell}}" for name in CLASS_COLUMNS)]
    for label, row in metrics["per_class"].items():
        of_class = intervals["per_class"][label] if intervals else {}
        cells = "".join(f"{_compact(row[name], of_class.get(name)):>{cell}}" for name in CLASS_COLUMNS)
        lines.append(f"{label:<{width}}{row['images']:>8}{cells}")
    lines += [_named(metrics, names, separator=",  ") for names in SUMMARY_LINES]
    if intervals:
        lines.append(f"in brackets: 95 % bootstrap intervals, resampled by {group_name}")
    return "\n".join(lines)


def summary(results: Results) -> str:
    """What an evaluation found, as text of several lines."""
    tta, center = results.tta, results.center
    lines = [
        f"{results.split} split, {tta['images']} images, views: {results.views}",
        class_table(tta, results.group_name),
    ]
    if results.views != "none":
        gain = format_metric(**_gain(results, "balanced_accuracy"), form="+.3f")
        lines.append(
            f"TTA gain {gain} balanced accuracy over the single center view ({format_metric(center['balanced_accuracy'])})"
        )
    if found := results.ensemble:
        lines.append(describe_ensemble(found))
    if results.per_view:
        values = _named(results.per_view, PER_VIEW_METRICS, with_intervals=False)
        lines.append(f"each view as a prediction of its own: {values}")
    if corrected := results.prior_corrected:
        lines.append(f"{PRIOR_TEXT[corrected['target_name']]}: {_named(corrected, PRIOR_METRICS)}")
    if calibration := results.calibration:
        lines.append(
            f"temperature {describe_temperature(calibration['temperature'])}: calibration error "
            f"{tta['calibration_error']:.3f} -> {calibration['calibration_error']:.3f}, loss {tta['loss']:.3f} -> "
            f"{calibration['loss']:.3f}"
        )
    for point in results.operating_points:
        rates = ", ".join(f"{name} {format_metric(**point[name])}" for name in ("sensitivity", "specificity"))
        lines.append(
            f"{point['positive']} at the threshold {point['threshold']:.3f} (sensitivity {point['wanted_sensitivity']:.2f} on "
            f"validation): {rates}"
        )
    return "\n".join(lines + [f"warning: {warning}" for warning in results.warnings])


def describe_ensemble(ensemble: dict) -> str:
    """What several runs are worth beside the best of them, in one line; as `Results.ensemble`."""
    gain = ensemble["gain"]["balanced_accuracy"]
    return (
        f"ensemble of {len(ensemble['members'])} runs: {format_metric(gain['gain'], gain['interval'], '+.3f')} balanced accuracy over "
        f"the best of them alone ({ensemble['best']}, chosen on {ensemble['chosen_on']})"
    )


def describe_temperature(temperature: float) -> str:
    """A fitted temperature, and where it comes from."""
    edge = ", at the edge of its range, so that it calibrates little" if is_at_edge(temperature) else ""
    return f"{temperature:.2f}, fitted on validation{edge}"


def _named(metrics: dict, names: tuple[str, ...], separator: str = ", ", with_intervals: bool = True) -> str:
    intervals = metrics.get("intervals", {}) if with_intervals else {}
    return separator.join(f"{title(name)} {format_metric(metrics[name], intervals.get(name))}" for name in names)


def _gain(results: Results, name: str) -> dict:
    return {"value": results.tta_gain[name]["gain"], "interval": results.tta_gain[name]["interval"]}


def _compact(value: float | None, interval: list[float] | None) -> str:
    return format_metric(value) + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval and value is not None else "")


def efficiency_facts(epochs: list[dict]) -> dict[str, str]:
    """Memory and use of the GPU, as far as the epochs' entries tell."""
    facts, memory = {}, []
    for name, where in (("peak_gpu_bytes", "of the GPU"), ("rss_bytes", "of the process")):
        if known := [entry[name] for entry in epochs if name in entry]:
            memory.append(f"{max(known) / 1e9:.1f} GB {where}")
    if memory:
        facts["memory"] = f"at most {', '.join(memory)}"
    if known := [entry["mfu"] for entry in epochs if "mfu" in entry]:
        facts["model FLOP utilisation"] = f"{median(known):.1%} (median over epochs)"
    return facts
