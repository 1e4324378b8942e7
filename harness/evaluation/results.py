"""Evaluation results: the contents of `metrics.json`, and how they are computed from predictions.

In: `Predictions` of a split and of the validation split, or a folder of results. Out: `Results`. Invariants: nothing is
tuned on the split that is evaluated (temperature and thresholds come from validation, class priors from training); every
reader of `metrics.json` goes through `Results`, so its format stands here alone.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

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
from harness.evaluation.layout import CALIBRATION_METRICS, misfit_of_results
from harness.evaluation.metrics import compute_metrics, paired_differences, pick
from harness.evaluation.subgroups import subgroup_metrics
from shards.shape import misfit, parse_json

FORMAT = 4  # of metrics.json
METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.csv"


@dataclass(frozen=True)
class Predictions:
    """Predictions of a whole split: N samples sorted by key, C classes of the model, V views. On rank 0; N is 0 on the others.

    keys: (N,) int64. labels: (N,) int64, numbers of the model's classes. center_probs: (N, C) probabilities of the center
    view. tta_probs: (N, C) probabilities, averaged over the views. tta_std: (N,) standard deviation over the views of the
    predicted class's probability. view_probs: (N, V, C) probabilities of each view, where views are random; else None.
    """

    keys: np.ndarray
    labels: np.ndarray
    center_probs: np.ndarray
    tta_probs: np.ndarray
    tta_std: np.ndarray
    view_probs: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of `metrics.json`; "metrics" are what `compute_metrics` returns, with intervals.

    What was evaluated:
    split, views: as in the settings. image_size: side of the model's input in pixels. dataset: its fingerprint.
    protocol: how it was split. group_name: what is never cut by a split and is resampled for intervals (lesion, patient).
    citation, license: of the data, empty where unknown. warnings: what a reader of the metrics must be told.
    model: its name. trained_on: fingerprint of its training dataset. best_epoch: the one of its weights.

    What was found:
    center: metrics of the center view. tta: metrics of the average over views. tta_gain: {metric: {gain, interval}}, tta
    minus center, paired. per_view: metrics with each random view as a prediction of its own. prior_corrected: metrics of
    the average at other class frequencies, with model_prior and target_prior (C shares each) and target_name (`equal` or
    `training`). calibration: temperature fitted on validation, and loss, brier and calibration_error with it.
    operating_points: thresholds chosen on validation, with their rates on this split. subgroups: {column: {value: metrics}}.
    ensemble: of several runs: members, best (one of them), chosen_on (what it was chosen on), gain over it as in tta_gain.
    """

    split: str
    views: str
    image_size: int
    dataset: str
    group_name: str = "group"
    citation: str = ""
    license: str = ""
    protocol: dict[str, Any]
    warnings: list[str]
    model: str
    trained_on: str
    best_epoch: int
    center: dict[str, Any]
    tta: dict[str, Any]
    tta_gain: dict[str, Any]
    per_view: dict[str, Any] | None = None
    prior_corrected: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    operating_points: list[dict[str, Any]] = field(default_factory=list)
    subgroups: dict[str, dict[str, Any]] = field(default_factory=dict)
    ensemble: dict[str, Any] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The model's class names, in the order of its outputs."""
        return tuple(self.tta["per_class"])

    def to_json(self) -> str:
        """The text of `metrics.json`; what was not computed is left out."""
        content = {part.name: getattr(self, part.name) for part in fields(self)}
        content = {"format": FORMAT} | {name: value for name, value in content.items() if value is not None}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path | str = METRICS_FILE) -> "Results":
        """Read what `to_json` wrote; `path` is named in errors.

        Raises:
            ValueError: it is damaged, or of another format.
        """
        try:
            content = parse_json(text)
            if problem := misfit(content, {"format": int}):
                raise ValueError(problem)
            found = content.pop("format")
            if found == FORMAT:
                if problem := misfit_of_results(content):
                    raise ValueError(problem)
                return cls(**content)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}). Restore a copy, or run launch/evaluate.py on the run."
            ) from error
        raise ValueError(
            f"{path} has format {found}, and this version of dermharness reads format {FORMAT}. Read it with the version that "
            "wrote it, or train the run again with this one."
        )


def read_results(folder: Path) -> Results:
    """The results in a folder: of a finished run, or written by `launch/evaluate.py`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged, or of another format.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {METRICS_FILE}. Give the folder of a finished run, or a result of launch/evaluate.py."
        )
    return Results.from_json(path.read_bytes(), path)


def read_predictions(folder: Path) -> pd.DataFrame:
    """The rows of `predictions.csv`, as `evaluate.prediction_rows` made them; names are text.

    Raises:
        FileNotFoundError: there are none.
        ValueError: it is no such table.
    """
    path = folder / PREDICTIONS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {PREDICTIONS_FILE}. Run launch/evaluate.py on the run.")
    as_text: Any = {"image_id": str, "group": str, "label": str, "prediction": str}
    try:
        rows = pd.read_csv(path, dtype=as_text | {"key": np.int64}, keep_default_na=False, index_col=False)
        names = [name.removeprefix("p_") for name in rows if name.startswith("p_")]
        if missing := [name for name in ("key", *as_text) if name not in rows]:
            raise ValueError(f"it has no column {missing[0]}")
        if rows["image_id"].duplicated().any():
            raise ValueError("it names an image twice")
        if not len(rows) or not set(rows["label"]) | set(rows["prediction"]) <= set(names):
            raise ValueError("it has no rows, or names a class without a column of probabilities")
        probabilities = rows[[f"p_{name}" for name in names]].to_numpy(np.float64)
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("a probability is not between 0 and 1")
    except (ValueError, TypeError, OverflowError) as error:  # pandas' own are ValueErrors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} is damaged ({reason}). Restore a copy, or run launch/evaluate.py on the run."
        ) from error
    return rows


def compute_results(
    predictions: Predictions,
    validation: Predictions | None,
    samples: pd.DataFrame,
    prior: Prior | None,
    classes: tuple[str, ...],
    settings: Eval,
) -> dict[str, Any]:
    """All that is found about a split: the second half of `Results`, by field name.

    Args:
        validation: predictions of the split that temperature and thresholds are chosen on; None for neither.
        prior: None for no prior correction.
        samples: N rows in the order of the predictions: `group` and what else the source told of an image, as text.
        classes: C names.

    Raises:
        ValueError: probabilities that are not finite or do not sum to 1.
    """
    labels, groups = predictions.labels, samples["group"].astype(str).to_numpy()
    center, tta = predictions.center_probs, predictions.tta_probs
    parts: dict[str, Any] = {
        "center": compute_metrics(center, labels, classes, groups),
        "tta": compute_metrics(tta, labels, classes, groups),
        "tta_gain": paired_differences([center], [tta], labels, classes, groups),
    }
    if predictions.view_probs is not None:  # as the 2021 notebook counted: each view is a prediction of its own
        n_views = predictions.view_probs.shape[1]
        probabilities = predictions.view_probs.reshape(-1, len(classes))  # (N * V, C)
        repeated = np.repeat(labels, n_views), np.repeat(groups, n_views)
        parts["per_view"] = compute_metrics(probabilities, repeated[0], classes, repeated[1])
    if settings.prior_correction and prior is not None:
        parts["prior_corrected"] = {
            "model_prior": prior.model_prior.tolist(),
            "target_prior": prior.target_prior.tolist(),
            "target_name": prior.target_name,
            **compute_metrics(change_prior(tta, prior), labels, classes, groups),
        }
    if validation is not None:
        parts["calibration"] = _calibration(predictions, validation, classes, groups)
        parts["operating_points"] = _operating_points(predictions, validation, classes, groups, settings)
    parts["subgroups"] = {
        column: subgroup_metrics(pd.Series(samples[column]), tta, labels, classes, groups)
        for column in settings.subgroups
        if column in samples
    }
    return parts


def classes_of(positive: str, classes: tuple[str, ...]) -> list[str]:
    """The classes that an entry of `eval.positive_classes` means: one by its name, or several joined by +; none if one is unknown."""
    names = [positive] if positive in classes else positive.split("+")
    return names if set(names) <= set(classes) else []


def _calibration(
    predictions: Predictions, validation: Predictions, classes: tuple[str, ...], groups: np.ndarray
) -> dict[str, Any]:
    """The temperature, fitted on `validation`, and the metrics of `predictions` with it."""
    temperature = fit_temperature(validation.tta_probs, validation.labels)
    metrics = compute_metrics(with_temperature(predictions.tta_probs, temperature), predictions.labels, classes, groups)
    return {"temperature": temperature} | pick(metrics, CALIBRATION_METRICS)


def _operating_points(
    predictions: Predictions, validation: Predictions, classes: tuple[str, ...], groups: np.ndarray, settings: Eval
) -> list[dict[str, Any]]:
    """Thresholds, chosen on `validation`, and their rates on `predictions`."""
    points = []
    for positive in settings.positive_classes:
        names = classes_of(positive, classes)
        if not names:
            continue  # of another dataset
        numbers = [classes.index(name) for name in names]
        (scores, is_positive), on_validation = (
            (split.tta_probs[:, numbers].sum(1), np.isin(split.labels, numbers)) for split in (predictions, validation)
        )
        threshold = threshold_for(*on_validation, settings.sensitivity)
        if threshold is None:
            continue  # validation has no such image
        point = {"positive": positive, "wanted_sensitivity": settings.sensitivity, "threshold": threshold}
        rates = at_threshold(scores, is_positive, threshold, groups)
        points.append(point | {"positives": int(is_positive.sum())} | rates)
    return points
