"""Temperature and thresholds are chosen on one split and applied to another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss

from harness.config import Optim
from harness.evaluation.calibration import (
    Prior,
    at_threshold,
    change_prior,
    class_priors,
    fit_temperature,
    is_at_edge,
    threshold_for,
    with_temperature,
)
from harness.evaluation.metrics import compute_metrics
from harness.report.text import describe_temperature


def overconfident(n: int, temperature: float, seed: int = 0):
    """Predictions whose logits are `temperature` times too large."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, 4)) * 1.5
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([generator.choice(4, p=row) for row in truth])
    return with_temperature(truth, 1 / temperature), labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_spoiled_the_probabilities_is_found(temperature):
    probabilities, labels = overconfident(6000, temperature)
    assert fit_temperature(probabilities, labels) == pytest.approx(temperature, rel=0.06)


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_the_log_loss_on_the_split_that_it_was_fitted_on_is_never_worse(n, seed):
    generator = np.random.default_rng(seed)
    probabilities, labels = generator.dirichlet(np.ones(3) * 0.3, n), generator.integers(0, 3, n)
    after = with_temperature(probabilities, fit_temperature(probabilities, labels))
    names = ("a", "b", "c")
    assert compute_metrics(after, labels, names)["loss"] <= compute_metrics(probabilities, labels, names)["loss"] + 1e-9
    assert (after.argmax(1) == with_temperature(probabilities, 1.0).argmax(1)).all()  # no prediction changes


def test_on_another_split_the_calibration_error_falls():
    probabilities, labels = overconfident(2000, 3.0)
    others, their_labels = overconfident(2000, 3.0, seed=1)
    after = with_temperature(others, fit_temperature(probabilities, labels))
    names = tuple("abcd")
    before, now = compute_metrics(others, their_labels, names), compute_metrics(after, their_labels, names)
    assert now["calibration_error"] < before["calibration_error"] / 3
    assert now["loss"] == pytest.approx(log_loss(their_labels, after), rel=1e-6)


def test_certain_and_impossible_are_no_infinities():
    probabilities, labels = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0, 1, 1])
    temperature = fit_temperature(probabilities, labels)
    assert np.isfinite(with_temperature(probabilities, temperature)).all()


@given(st.integers(1, 50), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_the_threshold_is_the_highest_that_finds_the_wanted_share(n, sensitivity, seed):
    generator = np.random.default_rng(seed)
    scores, positive = generator.integers(0, 8, n) / 8, generator.random(n) < 0.5
    threshold = threshold_for(scores, positive, sensitivity)
    if not positive.any():
        assert threshold is None
        return
    found = (scores[positive] >= threshold).mean()
    assert found >= sensitivity - 1e-9
    higher = scores[scores > threshold]
    if len(higher):
        assert (scores[positive] >= higher.min()).mean() < sensitivity


def test_rates_at_a_threshold_by_hand():
    scores = np.array([0.9, 0.8, 0.3, 0.7, 0.2, 0.1])
    positive = np.array([True, True, True, False, False, False])
    found = at_threshold(scores, positive, 0.5, np.arange(6))
    assert found["sensitivity"]["value"] == pytest.approx(2 / 3)
    assert found["specificity"]["value"] == pytest.approx(2 / 3)
    assert found["positive_predictive_value"]["value"] == pytest.approx(2 / 3)
    many = at_threshold(np.tile(scores, 50), np.tile(positive, 50), 0.5, np.arange(300))
    low, high = many["sensitivity"]["interval"]
    assert 0.5 < low < 2 / 3 < high < 0.8


def test_rates_that_are_not_defined_are_none():
    found = at_threshold(np.array([0.1, 0.2]), np.array([False, False]), 0.5, np.arange(2))
    assert found["sensitivity"] == {"value": None, "interval": None}
    assert found["positive_predictive_value"]["value"] is None
    assert found["specificity"]["value"] == 1.0


def test_the_frequencies_that_a_model_takes_for_granted_are_those_of_its_training_unless_they_were_made_up_for():
    counts = {"mel": 10, "nv": 80, "bcc": 10, "df": 0}
    training, equal = [0.1, 0.8, 0.1, 0], pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    plain = class_priors(Optim(), counts)
    assert (plain.model_prior.tolist(), plain.target_prior.tolist(), plain.target_name) == (training, equal, "equal")
    for balance in ("weights", "logit-adjust", "sampler"):
        balanced = class_priors(Optim(balance=balance), counts)
        assert (balanced.model_prior.tolist(), balanced.target_prior.tolist(), balanced.target_name) == (
            equal,
            training,
            "training",
        )


def test_changing_the_class_frequencies_is_bayes_rule_and_has_a_way_back():
    training, equal = np.array([0.1, 0.8, 0.1, 0]), np.array([1 / 3, 1 / 3, 1 / 3, 0])
    draw = np.random.default_rng(0)
    likelihoods = draw.random((50, 4))
    posterior = likelihoods * np.array([0.1, 0.8, 0.1, 0.0])
    posterior /= posterior.sum(1, keepdims=True)
    flat = change_prior(posterior, Prior(training, equal, "equal"))
    assert flat[:, :3] == pytest.approx(likelihoods[:, :3] / likelihoods[:, :3].sum(1, keepdims=True))
    assert change_prior(flat, Prior(equal, training, "training")) == pytest.approx(posterior)


def test_a_temperature_at_the_edge_of_its_range_is_known_for_one():
    labels = np.arange(400) % 2
    wrong = np.full((400, 2), 1e-4)
    wrong[np.arange(400), np.where(np.arange(400) < 200, labels, 1 - labels)] = (
        1 - 1e-4
    )  # sure, and right half the time
    assert is_at_edge(fit_temperature(wrong, labels))
    right = np.full((400, 2), 0.4)
    right[np.arange(400), labels] = 0.6  # unsure, and always right
    assert is_at_edge(fit_temperature(right, labels))
    assert not is_at_edge(fit_temperature(*overconfident(2000, 3.0)))
    assert (
        describe_temperature(20.0)
        == "20.00, fitted on validation, at the edge of its range, so that it calibrates little"
    )
    assert describe_temperature(1.5) == "1.50, fitted on validation"
