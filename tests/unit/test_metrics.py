"""Metrics equal scikit-learn's, and what is not defined is not zero."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn import metrics as sk

from harness.evaluation.metrics import (
    SUMMARY_METRICS,
    _metric_samples,
    bootstrap,
    compute_metrics,
    paired_differences,
    percentile_interval,
)
from harness.report.text import class_table
from support.processes import peak_memory

NAMES = ("a", "b", "c", "d")


@st.composite
def predictions(draw):
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    probabilities = rng.dirichlet(np.ones(4), n).astype(np.float32)
    return probabilities, rng.integers(0, draw(st.integers(1, 4)), n)


@given(predictions())
def test_metrics_equal_scikit_learns(drawn):
    probabilities, labels = drawn
    found = compute_metrics(probabilities, labels, NAMES)
    guesses, present = probabilities.argmax(1), np.unique(labels)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, guesses))
    recalls = sk.recall_score(labels, guesses, labels=present, average=None, zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recalls.mean())
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(labels, guesses, labels=present, average="macro", zero_division=0)
    )
    exact = probabilities.astype(np.float64) / probabilities.astype(np.float64).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(sk.log_loss(labels, exact, labels=range(4)), rel=1e-4)
    assert found["confusion"] == sk.confusion_matrix(labels, guesses, labels=range(4)).tolist()
    for number, name in enumerate(NAMES):
        row = found["per_class"][name]
        if number not in present:
            assert (row["recall"], row["f1"], row["auc"]) == (None, None, None)
        elif len(present) > 1:
            assert row["auc"] == pytest.approx(sk.roc_auc_score(labels == number, probabilities[:, number]))
        if number in guesses:
            expected = sk.precision_score(labels, guesses, labels=[number], average=None, zero_division=0)[0]
            assert row["precision"] == pytest.approx(expected)
        else:
            assert row["precision"] is None


def test_a_hand_worked_example():
    probabilities = np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7], [0.1, 0.9]])
    found = compute_metrics(probabilities, np.array([0, 0, 1, 1]), ("x", "y"))
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == 0.75
    assert found["per_class"]["x"] == {
        **{"precision": 1.0, "recall": 0.5, "specificity": 1.0, "f1": pytest.approx(2 / 3), "auc": 1.0},
        **{"average_precision": 1.0, "images": 2},
    }
    assert found["weighted_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["kappa"] == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert found["brier"] == pytest.approx(2 * (0.2**2 + 0.6**2 + 0.3**2 + 0.1**2) / 4)
    # Confidences 0.8, 0.6, 0.7, 0.9 lie in four of the 15 bins; the second is wrong.
    assert found["calibration_error"] == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4)
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean())


@given(predictions(), st.integers(0, 99))
def test_weighted_metrics_equal_scikit_learns(drawn, seed):
    """What a resample computes: each image counts as often as its weight says."""
    probabilities, labels = drawn
    weights = np.random.default_rng(seed).integers(0, 4, len(labels)).astype(np.float32)
    assume(weights.sum())
    found = {name: values[0] for name, values in _metric_samples(probabilities, labels, NAMES, weights[None]).items()}
    guesses, drawn_labels = probabilities.argmax(1), np.unique(labels[weights > 0])
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, guesses, sample_weight=weights))
    f1 = {"labels": drawn_labels, "sample_weight": weights, "zero_division": 0}
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, guesses, average="macro", **f1))
    assert found["weighted_f1"] == pytest.approx(sk.f1_score(labels, guesses, average="weighted", **f1))
    kappa = sk.cohen_kappa_score(labels, guesses, sample_weight=weights, labels=range(4))
    assert found["kappa"] == pytest.approx(kappa, nan_ok=True)
    for number, name in enumerate(NAMES):
        if number in drawn_labels and len(drawn_labels) > 1:
            truth, scores = labels == number, probabilities[:, number]
            assert found[f"auc of {name}"] == pytest.approx(sk.roc_auc_score(truth, scores, sample_weight=weights))
            area = sk.average_precision_score(truth, scores, sample_weight=weights)
            assert found[f"average_precision of {name}"] == pytest.approx(area, rel=1e-5)
        else:
            assert np.isnan(found[f"auc of {name}"])


def test_tied_scores_count_half():
    probabilities = np.array([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])
    labels = np.array([0, 1, 0, 1])
    found = compute_metrics(probabilities, labels, ("x", "y"))["per_class"]["y"]
    assert found["auc"] == sk.roc_auc_score(labels, probabilities[:, 1]) == 0.875
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(labels, probabilities[:, 1]))


def test_areas_of_folds_are_means_and_all_else_counts_the_images_together():
    generator = np.random.default_rng(4)
    probabilities, folds = generator.dirichlet(np.ones(4), 90), np.arange(90) % 3
    labels = np.where(
        folds == 2, generator.integers(0, 3, 90), generator.integers(0, 4, 90)
    )  # the last class: in two folds
    probabilities[folds == 1] = probabilities[folds == 1] ** 3  # scores of another scale
    probabilities /= probabilities.sum(1, keepdims=True)
    found, together = (compute_metrics(probabilities, labels, NAMES, np.arange(90), of) for of in (folds, None))
    for number, name in enumerate(NAMES):
        of_folds = [
            sk.roc_auc_score(labels[folds == fold] == number, probabilities[folds == fold, number])
            for fold in range(3 if number < 3 else 2)
        ]
        assert found["per_class"][name]["auc"] == pytest.approx(np.mean(of_folds))
        assert found["per_class"][name]["auc"] != together["per_class"][name]["auc"]
        low, high = found["intervals"]["per_class"][name]["auc"]
        assert low < found["per_class"][name]["auc"] < high
    for name in set(SUMMARY_METRICS) - {"macro_auc"}:
        assert found[name] == together[name]
        assert found["intervals"][name] == together["intervals"][name]


def drawn_predictions(generator, n_groups: int, of_each: int):
    """Groups whose images are all predicted right or all wrong (so images are far from independent)."""
    labels = np.repeat(generator.integers(0, 2, n_groups), of_each)
    right = np.repeat(generator.random(n_groups) < 0.8, of_each)
    guesses = np.where(right, labels, 1 - labels)
    return np.eye(2)[guesses] * 0.8 + 0.1, labels, np.repeat(np.arange(n_groups), of_each)


def test_the_calibration_error_has_no_interval():
    """Its percentile interval would leave out the truth of a well-calibrated model."""
    probabilities, labels, groups = drawn_predictions(np.random.default_rng(2), 60, 1)
    intervals = compute_metrics(probabilities, labels, ("x", "y"), groups)["intervals"]
    assert [name for name in SUMMARY_METRICS if intervals[name] is None] == ["calibration_error"]
    gains = paired_differences(
        [probabilities], [probabilities**2 / (probabilities**2).sum(1, keepdims=True)], labels, ("x", "y"), groups
    )
    assert gains["calibration_error"]["interval"] is None
    assert gains["calibration_error"]["gain"] != 0


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent():
    generator, covered = np.random.default_rng(5), {"accuracy": 0, "balanced_accuracy": 0}
    trials = 1500
    for _ in range(trials):
        probabilities, labels, groups = drawn_predictions(generator, 150, 2)
        (found,) = bootstrap([probabilities], labels, ("x", "y"), groups, 400)
        for name in covered:
            low, high = percentile_interval(found[name])
            covered[name] += low <= 0.8 <= high
    for name, count in covered.items():
        assert 0.93 <= count / trials <= 0.97, (name, count / trials)


def test_intervals_resample_groups_not_images():
    """Ten copies of each image must not make the interval narrower."""
    probabilities, labels, groups = drawn_predictions(np.random.default_rng(1), 60, 1)
    (alone,) = bootstrap([probabilities], labels, ("x", "y"), groups)
    (copied,) = bootstrap([np.repeat(probabilities, 10, 0)], np.repeat(labels, 10), ("x", "y"), np.repeat(groups, 10))
    assert percentile_interval(copied["accuracy"]) == pytest.approx(percentile_interval(alone["accuracy"]))


def test_a_metric_that_few_resamples_define_has_no_interval():
    probabilities = np.array([[0.8, 0.2], [0.7, 0.3], [0.3, 0.7]])
    found = compute_metrics(probabilities, np.array([0, 0, 1]), ("x", "y"), np.arange(3))
    assert found["per_class"]["y"]["recall"] == 1.0
    assert found["intervals"]["per_class"]["y"]["recall"] is None  # a third of the resamples have no y
    assert found["intervals"]["loss"][0] <= found["loss"] <= found["intervals"]["loss"][1]


def test_paired_gains_are_surer_than_two_intervals():
    generator = np.random.default_rng(3)
    before = generator.dirichlet(np.ones(3), 400)
    labels = generator.integers(0, 3, 400)
    after = 0.95 * before + 0.05 * np.eye(3)[labels]
    names, groups = ("a", "b", "c"), np.arange(400)
    gain = paired_differences([before], [after], labels, names, groups)["loss"]
    assert gain["interval"][1] < 0  # surely better
    one, other = (compute_metrics(p, labels, names, groups)["intervals"]["loss"] for p in (before, after))
    assert gain["interval"][1] - gain["interval"][0] < one[1] - one[0]
    assert other[1] > one[0] - 1


def test_a_class_without_images_is_printed_as_not_defined():
    text = class_table(compute_metrics(np.array([[0.8, 0.2]]), np.array([0]), ("x", "y")))
    assert "not defined" in text.splitlines()[2]
    assert "0.000" not in text


@pytest.mark.parametrize("resamples", [0, 20])
def test_a_thousand_classes_fit_into_a_gigabyte(resamples):
    code = """
import sys
import numpy as np
from harness.evaluation.metrics import bootstrap, compute_metrics
draw, classes = np.random.default_rng(0), tuple(f"class {n}" for n in range(1000))
labels, probabilities = draw.integers(0, 1000, 5000), draw.random((5000, 1000), np.float32)
probabilities /= probabilities.sum(1, keepdims=True)
if int(sys.argv[1]):
    bootstrap([probabilities], labels, classes, np.arange(5000) // 2, int(sys.argv[1]))
else:
    assert sum(map(sum, compute_metrics(probabilities, labels, classes)["confusion"])) == 5000
"""
    assert peak_memory(code, resamples) < 1000


@given(st.integers(0, 10**6))
def test_areas_are_those_of_all_images_one_by_one(seed):
    """The areas, counted over runs of images, are exactly what each pair of images says."""
    draw = np.random.default_rng(seed)
    n = int(draw.integers(2, 40))
    labels, weights = draw.integers(0, 2, n), draw.integers(0, 4, (3, n)).astype(np.float32)
    weights[:, 0] += 1
    first = draw.integers(1, 8, n) / 8  # many ties
    probabilities = np.stack([first, 1 - first], 1)
    found = _metric_samples(probabilities, labels, ("x", "y"), weights)["auc of x"]
    for area, counts in zip(found, weights, strict=True):
        pairs = counts[labels == 0][:, None] * counts[labels == 1]
        higher, lower = first[labels == 0][:, None], first[labels == 1]
        wins = (pairs * ((higher > lower) + 0.5 * (higher == lower))).sum()
        assert area == wins / pairs.sum() if pairs.sum() else np.isnan(area)


@pytest.mark.parametrize(
    ("probabilities", "labels"),
    [
        (np.empty((0, 2)), np.empty(0, int)),
        (np.array([[0.5, 0.6]]), np.array([0])),
        (np.array([[np.nan, 0.6]]), np.array([0])),
        (np.array([[0.5, 0.5]]), np.array([2])),
        (np.array([[0.5, 0.5, 0.0]]), np.array([1])),
    ],
)
def test_broken_predictions_are_refused(probabilities, labels):
    with pytest.raises(ValueError, match=r"robabilities|Labels"):
        compute_metrics(probabilities, labels, ("x", "y"))
