"""What predictions are worth: each reading of them, by hand or against the plain one."""

import numpy as np
import pandas as pd
import pytest

from harness.config import Eval, Optim
from harness.evaluation.calibration import class_priors
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Predictions, bin_values, compute_results, summary

CLASSES = ("mel", "nv", "bcc")
HEAD = {"split": "test", "views": "spins:3", "warnings": ["a leak"]}


@pytest.fixture
def found() -> Predictions:
    """120 images of 80 lesions under 3 views, more often right than not."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 120)
    spins = draw.dirichlet((1, 1, 1), (120, 3)) + 0.7 * np.eye(3)[labels][:, None]
    spins /= spins.sum(2, keepdims=True)
    mean = spins.mean(1)
    spread = spins[np.arange(120), :, mean.argmax(1)].std(1)
    return Predictions(np.arange(120), labels, spins[:, 0], mean, spread, spins)


@pytest.fixture
def facts() -> pd.DataFrame:
    draw = np.random.default_rng(1)
    sexes = np.where(np.arange(120) < 100, np.where(np.arange(120) % 2, "male", "female"), "")
    ages = [f"{age:.1f}" for age in draw.integers(0, 18, 120) * 5]
    return pd.DataFrame({"group": [f"L{n % 80}" for n in range(120)], "sex": sexes, "age": ages})


def eval_model(found, facts, settings=None, prior=(0.2, 0.7, 0.1), validation=None, balance="none") -> dict:
    settings = settings or Eval(subgroups=("sex", "age", "camera"), positive_classes=("mel", "mel+akiec"))
    counts = dict(zip(CLASSES, (round(100 * share) for share in prior), strict=True))
    return compute_results(found, validation, facts, class_priors(Optim(balance=balance), counts), CLASSES, settings)


def test_pooled_views_count_each_view_as_a_prediction_of_its_own(found, facts):
    pooled = eval_model(found, facts)["pooled"]
    assert pooled["images"] == 360
    guesses = found.view_probs.argmax(2)
    assert pooled["accuracy"] == pytest.approx((guesses == found.labels[:, None]).mean())
    low, high = pooled["intervals"]["accuracy"]
    alone = compute_metrics(found.tta_probs, found.labels, CLASSES, facts["group"].to_numpy())["intervals"]["accuracy"]
    assert high - low > 0.6 * (alone[1] - alone[0])  # three views of a lesion are not three lesions
    assert "pooled" not in eval_model(Predictions(*list(vars(found).values())[:5]), facts)


def test_logit_adjustment_divides_by_the_prior(found, facts):
    parts = eval_model(found, facts, prior=(0.25, 0.5, 0.25))
    moved = found.tta_probs / np.array([0.25, 0.5, 0.25])
    by_hand = compute_metrics(moved / moved.sum(1, keepdims=True), found.labels, CLASSES)
    assert parts["adjusted"]["balanced_accuracy"] == pytest.approx(by_hand["balanced_accuracy"])
    assert parts["adjusted"]["loss"] == pytest.approx(by_hand["loss"])
    assert parts["adjusted"]["to"] == "equal"
    assert "if all classes were equally frequent" in summary(HEAD | parts)
    assert "adjusted" not in eval_model(found, facts, Eval(prior_correction=0))


def test_after_balanced_training_the_second_reading_is_at_the_frequencies_of_training(found, facts):
    parts = eval_model(found, facts, prior=(0.25, 0.5, 0.25), balance="sampler")
    moved = found.tta_probs * np.array([0.25, 0.5, 0.25])
    by_hand = compute_metrics(moved / moved.sum(1, keepdims=True), found.labels, CLASSES)
    assert parts["adjusted"]["accuracy"] == pytest.approx(by_hand["accuracy"])
    assert parts["adjusted"]["loss"] == pytest.approx(by_hand["loss"])
    assert parts["adjusted"]["to"] == "training"
    assert "if classes were as frequent as in training" in summary(HEAD | parts)


def test_a_class_that_training_lacked_keeps_its_probability_under_adjustment(found, facts):
    assert np.isfinite(eval_model(found, facts, prior=(0.5, 0.5, 0))["adjusted"]["loss"])


def test_a_breakdown_holds_each_image_once_with_its_own_score(found, facts):
    breakdown = eval_model(found, facts)["breakdown"]
    assert list(breakdown) == ["sex", "age"]  # the source knows of no camera
    assert list(breakdown["sex"]) == ["female", "male", "unknown"]
    for cells in breakdown.values():
        assert sum(cell["images"] for cell in cells.values()) == 120
    men = (facts["sex"] == "male").to_numpy()
    alone = compute_metrics(found.tta_probs[men], found.labels[men], CLASSES, facts["group"][men].to_numpy())
    cell = breakdown["sex"]["male"]
    assert cell["accuracy"] == alone["accuracy"]
    assert cell["intervals"]["balanced_accuracy"] == alone["intervals"]["balanced_accuracy"]
    assert (cell["small"], breakdown["sex"]["unknown"]["small"]) == (False, True)


def test_a_cell_of_one_class_has_no_area_under_the_curve(found, facts):
    facts["sex"] = np.where(found.labels == 0, "male", "female")
    cell = eval_model(found, facts)["breakdown"]["sex"]["male"]
    assert cell["macro_auc"] is None
    assert cell["balanced_accuracy"] == cell["accuracy"]


def test_many_numbers_are_cut_into_bands_and_text_is_left_as_it_is():
    ages = bin_values(pd.Series(["5.0", "85.0", "", "40", "45", "60", "20", "nan", "35.0"]))
    assert list(ages.cat.categories) == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99", "unknown"]
    assert ages.tolist()[:4] == ["0 to 19", "80 to 99", "unknown", "40 to 59"]
    shares = bin_values(pd.Series([f"{n / 10:.1f}" for n in range(10)]))
    assert list(shares.cat.categories)[:2] == ["0 to 0.2", "0.2 to 0.4"]
    assert bin_values(pd.Series(["3", "1", "3"])).cat.categories.tolist() == ["1", "3"]
    assert bin_values(pd.Series(["", ""])).tolist() == ["unknown", "unknown"]


def test_thresholds_and_temperature_come_from_validation_alone(found, facts):
    other = Predictions(found.keys, found.labels, found.center_probs, found.tta_probs[:, [1, 0, 2]], found.tta_std)
    parts, moved = (eval_model(found, facts, validation=one) for one in (found, other))
    (point,), (elsewhere,) = parts["operating_points"], moved["operating_points"]  # akiec is no class here
    assert point["positive"] == "mel"
    assert point["sensitivity"]["value"] >= 0.9
    assert elsewhere["threshold"] != point["threshold"]
    assert parts["calibration"]["loss"] <= parts["tta"]["loss"]
    assert parts["tta"] == moved["tta"]
    assert "calibration" not in eval_model(found, facts)


def test_probabilities_that_are_none_are_refused(found, facts):
    broken = found.tta_probs.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="finite and sum to 1"):
        eval_model(Predictions(found.keys, found.labels, found.center_probs, broken, found.tta_std), facts)
    with pytest.raises(ValueError, match="finite and sum to 1"):
        eval_model(Predictions(found.keys, found.labels, 2 * found.center_probs, found.tta_probs, found.tta_std), facts)


def test_the_words_tell_every_reading(found, facts):
    words = summary(HEAD | eval_model(found, facts, validation=found))
    for part in ("each view as a prediction of its own", "equally frequent", "temperature", "mel at the threshold"):
        assert part in words
    assert words.endswith("warning: a leak")
