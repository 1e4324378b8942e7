"""Scores equal scikit-learn's, and what is not defined is not zero."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from harness.metrics import score, table

NAMES = ("a", "b", "c", "d")


@st.composite
def predictions(draw):
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    probabilities = rng.dirichlet(np.ones(4), n).astype(np.float32)
    return probabilities, rng.integers(0, draw(st.integers(1, 4)), n)


@given(predictions())
def test_scores_equal_scikit_learns(drawn):
    probabilities, labels = drawn
    found = score(probabilities, labels, NAMES)
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
    found = score(probabilities, np.array([0, 0, 1, 1]), ("x", "y"))
    assert found["accuracy"] == 0.75
    assert found["balanced_accuracy"] == 0.75
    assert found["per_class"]["x"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "auc": 1.0,
        "images": 2,
    }
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean())


def test_a_class_without_images_is_shown_as_not_defined():
    shown = table(score(np.array([[0.8, 0.2]]), np.array([0]), ("x", "y")))
    assert "not defined" in shown.splitlines()[2]
    assert "0.000" not in shown


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
        score(probabilities, labels, ("x", "y"))
