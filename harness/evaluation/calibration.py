"""What a validation split tells about the probabilities, to be used on another split: pure functions.

In: probabilities and labels of the validation split. Out: a temperature, thresholds. What stays true: nothing here sees
the split that is judged; what was chosen on validation is applied to it as it is.
"""

from dataclasses import dataclass

import numpy as np

from harness.config import Optim
from harness.evaluation.metrics import bootstrap_weights, percentile_interval

TINY = np.finfo(np.float32).tiny


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the log loss (Guo et al., 2017); above 1 where the model is too sure of itself.

    Args:
        probabilities: (N, C), also averages over views. labels: (N,) integers.

    Returns:
        T between 0.05 and 20, never with a higher log loss on these images than 1.
    """
    from scipy.optimize import minimize_scalar  # slow to import, used once a run

    images = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -np.log(with_temperature(probabilities, np.exp(log_temperature))[images, labels].clip(TINY)).mean()

    edge = np.log(20)
    found = minimize_scalar(loss, bounds=(-edge, edge), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if found.fun <= loss(0.0) else 1.0


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of logits divided by a temperature: (N, C) to (N, C) float64."""
    logits = np.log(probabilities.astype(np.float64).clip(TINY)) / temperature
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


@dataclass(frozen=True)
class Prior:
    """How frequent a model takes the classes for, and how frequent its second reading does.

    assumed: (C,) shares that its probabilities take for granted. other: (C,) shares of the second reading.
    to: what the second reading's are called, `equal` or `training`.
    """

    model_prior: np.ndarray
    target_prior: np.ndarray
    target_name: str


def class_priors(optim: Optim, counts: dict[str, int]) -> Prior:
    """What a model takes for granted: the frequencies of its training images, or equal ones if they were made up for.

    Args:
        counts: training images by class; a class without any has the share 0 in both readings.
    """
    images = np.array(list(counts.values()), float)
    training, equal = images / images.sum(), (images > 0) / (images > 0).sum()
    return Prior(training, equal, "equal") if optim.balance == "none" else Prior(equal, training, "training")


def change_prior(probabilities: np.ndarray, prior: Prior, strength: float = 1.0) -> np.ndarray:
    """Probabilities as they would be at the other frequencies: logit adjustment (Menon et al., 2021), or its way back.

    Args:
        probabilities: (N, C); a class of share 0 keeps its own. strength: 0 changes nothing, 1 goes all the way.

    Returns:
        (N, C) float64.
    """
    known = prior.model_prior > 0
    factors = np.where(known, prior.target_prior / np.where(known, prior.model_prior, 1.0), 1.0) ** strength
    moved = probabilities.astype(np.float64) * factors
    return moved / moved.sum(1, keepdims=True)


def threshold_for(scores: np.ndarray, positive: np.ndarray, sensitivity: float) -> float | None:
    """The highest threshold at which at least this share of the positives has `score >= threshold`; None without any."""
    ranked = np.sort(scores[positive])[::-1]
    if not len(ranked):
        return None
    return float(ranked[int(np.ceil(sensitivity * len(ranked) - 1e-9)) - 1])


def at_threshold(scores: np.ndarray, positive: np.ndarray, threshold: float, groups: np.ndarray) -> dict:
    """Sensitivity, specificity and positive predictive value of a threshold chosen elsewhere, with 95 % intervals.

    Args:
        scores: (N,). positive: (N,) bool. groups: (N,) names of what is independent, as in `metrics.score`.
    """
    said = scores >= threshold
    parts = [_rates(said, positive, weights) for weights in bootstrap_weights(groups)]
    whole = _rates(said, positive, np.ones((1, len(said)), np.float32))
    found = {}
    for name, values in whole.items():
        known = np.isfinite(values[0])
        edges = percentile_interval(np.concatenate([part[name] for part in parts]))
        found[name] = {"value": float(values[0]) if known else None, "interval": edges if known else None}
    return found


def _rates(said: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    hits, misses = (weights[:, positive & way].sum(1, dtype=np.float64) for way in (said, ~said))
    alarms, passed = (weights[:, ~positive & way].sum(1, dtype=np.float64) for way in (said, ~said))
    with np.errstate(invalid="ignore"):
        return {
            "sensitivity": hits / (hits + misses),
            "specificity": passed / (passed + alarms),
            "positive_predictive_value": hits / (hits + alarms),
        }
