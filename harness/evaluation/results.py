"""What predictions are worth: everything in `metrics.json`, and the same in words.

In: `Predictions` of a split, and of validation. Out: plain numbers. What stays true: the split that is judged chooses
nothing; temperature and thresholds come from validation, class frequencies from training.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.config import Eval
from harness.evaluation.calibration import (
    Prior,
    at_threshold,
    change_prior,
    fit_temperature,
    threshold_for,
    with_temperature,
)
from harness.evaluation.metrics import compute_metrics, format_metric, paired_differences, table

CALIBRATION = ("loss", "brier", "calibration_error")
SUBGROUP_METRICS = ("accuracy", "balanced_accuracy", "macro_auc")
PRIOR_METRICS = ("accuracy", "balanced_accuracy", "macro_auc", "loss")
FREQUENCIES = {
    "equal": "if all classes were equally frequent",
    "training": "if classes were as frequent as in training",
}
MIN_SUBGROUP = 30  # images below which a breakdown's figure says little
BANDS = 6  # most bands of a column of numbers


@dataclass(frozen=True)
class Predictions:
    """Predictions of a whole split, sorted by key; C are the model's classes.

    keys: (N,) int64. labels: (N,) int64. plain: (N, C) probabilities of the upright view. mean: (N, C) probabilities,
    averaged over the views. spread: (N,) standard deviation over the views of the predicted class's probability.
    spins: (N, V, C) probabilities of each view, where the views are random; None otherwise.
    """

    keys: np.ndarray
    labels: np.ndarray
    center_probs: np.ndarray
    tta_probs: np.ndarray
    tta_std: np.ndarray
    view_probs: np.ndarray | None = None


def compute_results(
    found: Predictions,
    validation: Predictions | None,
    facts: pd.DataFrame,
    prior: Prior,
    classes: tuple[str, ...],
    settings: Eval,
) -> dict:
    """All figures of a split.

    Args:
        validation: predictions of the split that temperature and thresholds are chosen on; None for neither.
        facts: (N) rows in the order of the predictions: `group` and what else the source told of an image, as text.
        prior: class frequencies that the model's probabilities take for granted, and those of the second reading.
        classes: C names.

    Returns:
        the parts of `metrics.json`: plain, tta, gain, and where they are defined pooled, adjusted, calibration,
        operating_points, breakdown.
    """
    groups = facts["group"].astype(str).to_numpy()
    parts = {
        "plain": compute_metrics(found.center_probs, found.labels, classes, groups),
        "tta": compute_metrics(found.tta_probs, found.labels, classes, groups),
        "gain": paired_differences([found.center_probs], [found.tta_probs], found.labels, classes, groups),
    }
    if found.view_probs is not None:  # as the 2021 notebook counted: each view is a prediction of its own
        views = found.view_probs.shape[1]
        pooled = (np.repeat(values, views) for values in (found.labels, groups))
        parts["pooled"] = compute_metrics(
            found.view_probs.reshape(-1, len(classes)), next(pooled), classes, next(pooled)
        )
    if settings.prior_correction:
        moved = change_prior(found.tta_probs, prior, settings.prior_correction)
        way = {"to": prior.target_name, "strength": settings.prior_correction}
        shares = {"assumed": prior.model_prior.tolist(), "other": prior.target_prior.tolist()}
        parts["adjusted"] = way | shares | compute_metrics(moved, found.labels, classes, groups)
    if validation is not None:
        parts["calibration"] = _calibrated(found, validation, classes, groups)
        parts["operating_points"] = _operating_points(found, validation, classes, groups, settings)
    parts["breakdown"] = {
        column: _by_value(found, facts[column], classes, groups) for column in settings.subgroups if column in facts
    }
    return parts


def summary(metrics: dict) -> str:
    """What an evaluation found, for people."""
    scores, plain, gain = metrics["tta"], metrics["plain"], metrics["gain"]["balanced_accuracy"]
    lines = [f"{metrics['split']} split, {scores['images']} images, views: {metrics['views']}", table(scores)]
    if metrics["views"] != "none":
        lines.append(
            f"the views gain {format_metric(gain['gain'], gain['interval'], '+.3f')} balanced accuracy over the plain one "
            f"({format_metric(plain['balanced_accuracy'])})"
        )
    if pooled := metrics.get("pooled"):
        lines.append(
            f"each view as a prediction of its own: accuracy {format_metric(pooled['accuracy'])}, balanced accuracy "
            f"{format_metric(pooled['balanced_accuracy'])}, macro f1 {format_metric(pooled['macro_f1'])}"
        )
    if adjusted := metrics.get("adjusted"):
        intervals = adjusted["intervals"]
        figures = [
            f"{name.replace('_', ' ')} {format_metric(adjusted[name], intervals[name])}" for name in PRIOR_METRICS
        ]
        lines.append(f"{FREQUENCIES[adjusted['to']]} (logit adjustment): {', '.join(figures)}")
    if calibration := metrics.get("calibration"):
        before, after = scores["calibration_error"], calibration["calibration_error"]
        lines.append(
            f"temperature {calibration['temperature']:.2f} (fitted on validation): calibration error {before:.3f} becomes "
            f"{after:.3f}, loss {scores['loss']:.3f} becomes {calibration['loss']:.3f}"
        )
    for point in metrics.get("operating_points", []):
        rates = {name: format_metric(**point[name]) for name in ("sensitivity", "specificity")}
        lines.append(
            f"{point['positive']} at the threshold {point['threshold']:.3f} (sensitivity {point['wanted_sensitivity']:.2f} on "
            f"validation): sensitivity {rates['sensitivity']}, specificity {rates['specificity']}"
        )
    return "\n".join(lines + [f"warning: {warning}" for warning in metrics["warnings"]])


def bin_values(values: pd.Series) -> pd.Series:
    """Values of a column to break down by: text as it is, many numbers in bands, `unknown` where there is none.

    Args:
        values: (N,) text.

    Returns:
        (N,) ordered categories.
    """
    empty = values.isin(["", "nan", "None", "unknown"])
    numbers = pd.to_numeric(values[~empty], errors="coerce")
    if len(numbers) and numbers.notna().all() and numbers.nunique() > BANDS:
        steps = (digit * 10.0**power for power in range(-6, 12) for digit in (1, 2, 5))
        width = next(step for step in steps if numbers.max() // step - numbers.min() // step < BANDS)
        lows = (numbers // width) * width
        last = width - 1 if width >= 1 and (numbers % 1 == 0).all() else width  # whole numbers: 20 to 39
        names = {low: f"{low:g} to {low + last:g}" for low in sorted(lows.unique())}
        cut = lows.map(names)
        order = list(names.values())
    else:
        cut, order = values[~empty], sorted(values[~empty].unique())
    cut = cut.reindex(values.index, fill_value="unknown")
    return pd.Series(pd.Categorical(cut, [*order, "unknown"] if empty.any() else order), values.index)


def _calibrated(found: Predictions, validation: Predictions, classes: tuple[str, ...], groups: np.ndarray) -> dict:
    """The temperature, fitted on `validation`, and what it makes of `found`."""
    temperature = fit_temperature(validation.tta_probs, validation.labels)
    scores = compute_metrics(with_temperature(found.tta_probs, temperature), found.labels, classes, groups)
    figures = {name: scores[name] for name in CALIBRATION}
    return {"temperature": temperature} | figures | {"intervals": {name: scores["intervals"][name] for name in figures}}


def _operating_points(
    found: Predictions, validation: Predictions, classes: tuple[str, ...], groups: np.ndarray, settings: Eval
) -> list[dict]:
    """Thresholds, chosen on `validation`, and what they do on `found`."""
    points = []
    for positive in settings.positive_classes:
        numbers = [classes.index(name) for name in positive.split("+") if name in classes]
        if len(numbers) < len(positive.split("+")):
            continue  # of another dataset
        here, there = ((p.tta_probs[:, numbers].sum(1), np.isin(p.labels, numbers)) for p in (found, validation))
        threshold = threshold_for(*there, settings.sensitivity)
        if threshold is not None:
            point = {"positive": positive, "wanted_sensitivity": settings.sensitivity, "threshold": threshold}
            points.append(point | {"positives": int(here[1].sum())} | at_threshold(*here, threshold, groups))
    return points


def _by_value(found: Predictions, values: pd.Series, classes: tuple[str, ...], groups: np.ndarray) -> dict[str, dict]:
    """Figures of the images with each value of a column; cells of few images are marked."""
    cells, cut = {}, bin_values(values)
    for value in cut.cat.categories:
        here = (cut == value).to_numpy()
        scores = compute_metrics(found.tta_probs[here], found.labels[here], classes, groups[here])
        counts = {
            "images": int(here.sum()),
            "groups": len(np.unique(groups[here])),
            "small": bool(here.sum() < MIN_SUBGROUP),
        }
        figures = {name: scores[name] for name in SUBGROUP_METRICS}
        cells[str(value)] = (
            counts | figures | {"intervals": {name: scores["intervals"][name] for name in SUBGROUP_METRICS}}
        )
    return cells
