"""What `metrics.json` must look like, so that whoever wrote it, its readers find what they look for.

In: the content of the file. Out: what is wrong with it, in words. Invariants: what fits can be printed, drawn and compared.
"""

from typing import Any

from harness.evaluation.metrics import CLASS_METRICS, SUMMARY_METRICS
from harness.evaluation.subgroups import SUBGROUP_METRICS
from shards.description import SETTING
from shards.shape import misfit

CALIBRATION_METRICS = ("loss", "brier", "calibration_error")
RATES = ("sensitivity", "specificity", "positive_predictive_value")  # of an operating point
TARGETS = ("equal", "training")  # of a prior correction
NUMBER, INTERVAL = (float, None), ([float, float], None)


def _all(names: tuple[str, ...], shape: Any) -> dict[str, Any]:
    return dict.fromkeys(names, shape)


METRICS = _all(SUMMARY_METRICS, NUMBER) | {
    "images": int,
    "per_class": {str: _all(CLASS_METRICS, NUMBER) | {"images": int}},
    "confusion": [[int]],
    "intervals": _all(SUMMARY_METRICS, INTERVAL) | {"per_class": {str: _all(CLASS_METRICS, INTERVAL)}},
}
SUBGROUP = {"images": int, "small": bool, "intervals": _all(SUBGROUP_METRICS, INTERVAL)}
CALIBRATED = {"temperature": float, "intervals": _all(CALIBRATION_METRICS, INTERVAL)}
POINT = {"positive": str, "wanted_sensitivity": float, "threshold": float, "positives": int}
CORRECTED = METRICS | {"target_name": str, "model_prior": [float], "target_prior": [float]}
SHAPE = {
    **_all(("split", "views", "dataset", "model", "trained_on"), str),
    **{"image_size": int, "best_epoch": int, "warnings": [str], "protocol": {"name": str, str: (*SETTING, [SETTING])}},
    **{"center": METRICS, "tta": METRICS, "tta_gain": _all(SUMMARY_METRICS, {"gain": NUMBER, "interval": INTERVAL})},
}
OPTIONAL = {
    **_all(("group_name", "citation", "license"), str),
    "per_view": METRICS,
    "prior_corrected": CORRECTED,
    "calibration": CALIBRATED | _all(CALIBRATION_METRICS, float),
    "operating_points": [POINT | _all(RATES, {"value": NUMBER, "interval": INTERVAL})],
    "ensemble": {
        "members": [str],
        "best": str,
        "chosen_on": str,
        "gain": _all(SUMMARY_METRICS, {"gain": NUMBER, "interval": INTERVAL}),
    },
    "subgroups": {str: {str: SUBGROUP | _all(SUBGROUP_METRICS, NUMBER)}},
}


def misfit_of_results(content: dict[str, Any]) -> str | None:
    """What is wrong with the content of a `metrics.json`, without its format; None if nothing is."""
    if unknown := sorted(set(content) - set(SHAPE) - set(OPTIONAL)):
        return f"it has an unknown {unknown[0][:40]!r}"
    present = {name: shape for name, shape in OPTIONAL.items() if name in content}
    if problem := misfit(content, SHAPE | present):
        return problem
    if content.get("calibration") and not content["calibration"]["temperature"] > 0:
        return "its temperature is not above 0"
    if present.get("prior_corrected") and content["prior_corrected"]["target_name"] not in TARGETS:
        return f"its prior correction is to none of {', '.join(TARGETS)}"
    classes = list(content["tta"]["per_class"])
    for name in ("center", "tta", "per_view", "prior_corrected"):
        if name in content and (problem := _unequal_sizes(content[name], classes)):
            return f"{problem} of {name}"
    return None


def _unequal_sizes(metrics: dict[str, Any], classes: list[str]) -> str | None:
    """Which part of metrics is not of the classes."""
    rows = metrics["confusion"]
    if not classes or len(rows) != len(classes) or {len(row) for row in rows} != {len(classes)}:
        return "the size of the confusion"
    names = (list(metrics["per_class"]), list(metrics["intervals"]["per_class"]))
    return None if names == (classes, classes) else "the classes"
