"""What a validation split and class frequencies tell about probabilities, to be applied to another split: pure functions.

In: probabilities and labels of the validation split, class frequencies of training. Out: a temperature, thresholds,
corrected probabilities. Invariants: nothing here sees the split that is evaluated; what was chosen on validation is applied
to it unchanged.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.config import Optim
from harness.evaluation.metrics import bootstrap_weights, percentile_interval

TINY = np.finfo(np.float32).tiny
MAX_TEMPERATURE = 20.0


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the log loss (Guo et al., 2017); above 1 where the model is overconfident.

    Args:
        probabilities: (N, C), also averages over views. labels: (N,) integers.

    Returns:
        T between 0.05 and 20, never with a higher log loss on these images than 1.
    """
    from scipy.optimize import minimize_scalar  # slow to import, used once a run

    images = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = with_temperature(probabilities, float(np.exp(log_temperature)))
        return -np.log(scaled[images, labels].clip(TINY)).mean()

    edge = np.log(MAX_TEMPERATURE)
    fit: Any = minimize_scalar(loss, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(fit.x)) if fit.fun <= loss(0.0) else 1.0


def is_at_edge(temperature: float) -> bool:
    """Whether `fit_temperature` found no best one within its range: then it calibrates nothing."""
    return abs(np.log(temperature)) > 0.99 * np.log(MAX_TEMPERATURE)


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of logits divided by a temperature: (N, C) to (N, C) float64."""
    logits = np.log(probabilities.astype(np.float64).clip(TINY)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@dataclass(frozen=True)
class Prior:
    """Class frequencies that a model's probabilities assume, and those that they are corrected to.

    model_prior: (C,) shares that sum to 1. target_prior: (C,) shares that sum to 1. target_name: what the target's are
    called, `equal` or `training`.
    """

    model_prior: np.ndarray
    target_prior: np.ndarray
    target_name: str


def class_priors(optim: Optim, counts: dict[str, int]) -> Prior:
    """The prior of a model: the frequencies of its training images, or equal ones if training was balanced.

    Args:
        counts: training images by class; a class without any has the share 0 in both priors.
    """
    images = np.array(list(counts.values()), float)
    training, equal = images / images.sum(), (images > 0) / (images > 0).sum()
    return Prior(training, equal, "equal") if optim.balance == "none" else Prior(equal, training, "training")


def change_prior(probabilities: np.ndarray, prior: Prior) -> np.ndarray:
    """Prior correction: probabilities as they would be at the target's class frequencies (Bayes' rule).

    Post-hoc logit adjustment (Menon et al., 2021) where the target is `equal`, and its inverse where it is `training`.

    Args:
        probabilities: (N, C); a class of share 0 keeps its own.

    Returns:
        (N, C) float64.
    """
    is_known = prior.model_prior > 0
    factors = np.where(is_known, prior.target_prior / np.where(is_known, prior.model_prior, 1.0), 1.0)
    weighted = probabilities.astype(np.float64) * factors
    return weighted / weighted.sum(1, keepdims=True)


def threshold_for(scores: np.ndarray, is_positive: np.ndarray, sensitivity: float) -> float | None:
    """The highest threshold at which at least this share of the positives has `score >= threshold`; None without any.

    Args:
        scores: (N,). is_positive: (N,) bool. sensitivity: 0 to 1.
    """
    ranked = np.sort(scores[is_positive])[::-1]
    if not len(ranked):
        return None
    return float(ranked[int(np.ceil(sensitivity * len(ranked) - 1e-9)) - 1])


def at_threshold(scores: np.ndarray, is_positive: np.ndarray, threshold: float, groups: np.ndarray) -> dict[str, Any]:
    """Sensitivity, specificity and positive predictive value of a threshold chosen elsewhere, with 95 % intervals.

    Args:
        scores: (N,). is_positive: (N,) bool. groups: (N,) names of what is independent, as in `compute_metrics`.

    Returns:
        {name: {value, interval}}, both None where the rate is not defined.
    """
    predicted = scores >= threshold
    parts = [_rates(predicted, is_positive, weights) for weights in bootstrap_weights(groups)]
    exact = _rates(predicted, is_positive, np.ones((1, len(predicted)), np.float32))
    rates = {}
    for name, (value,) in exact.items():
        is_defined = bool(np.isfinite(value))
        interval = percentile_interval(np.concatenate([part[name] for part in parts]))
        rates[name] = {"value": float(value) if is_defined else None, "interval": interval if is_defined else None}
    return rates


def _rates(predicted: np.ndarray, is_positive: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each rate for each row of weights: (R, N) counts of the images, to (R,) float64."""

    def count(images: np.ndarray) -> np.ndarray:
        return weights[:, images].sum(1, dtype=np.float64)

    true_positive, false_negative = count(is_positive & predicted), count(is_positive & ~predicted)
    false_positive, true_negative = count(~is_positive & predicted), count(~is_positive & ~predicted)
    with np.errstate(invalid="ignore"):
        return {
            "sensitivity": true_positive / (true_positive + false_negative),
            "specificity": true_negative / (true_negative + false_positive),
            "positive_predictive_value": true_positive / (true_positive + false_positive),
        }
