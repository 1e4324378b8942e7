"""Results of predictions: each part by hand or against the others, and their way to a file and back."""

import json

import numpy as np
import pandas as pd
import pytest

from harness.config import Eval, Optim
from harness.evaluation.calibration import class_priors
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Predictions, Results, classes_of, compute_results, read_results
from harness.evaluation.subgroups import bin_values
from harness.report.text import summary

CLASSES = ("mel", "nv", "bcc")
ABOUT = {
    **{"split": "test", "views": "spins:3", "image_size": 32, "dataset": "0" * 64, "group_name": "lesion"},
    **{"protocol": {"name": "lesion"}, "warnings": ["a leak"], "model": "m", "trained_on": "1" * 64, "best_epoch": 2},
}


@pytest.fixture
def predictions() -> Predictions:
    """120 images of 80 lesions under 3 views, more often right than not."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 120)
    spins = draw.dirichlet((1, 1, 1), (120, 3)) + 0.7 * np.eye(3)[labels][:, None]
    spins /= spins.sum(2, keepdims=True)
    mean = spins.mean(1)
    spread = spins[np.arange(120), :, mean.argmax(1)].std(1)
    return Predictions(np.arange(120), labels, spins[:, 0], mean, spread, spins)


@pytest.fixture
def samples() -> pd.DataFrame:
    draw = np.random.default_rng(1)
    sexes = np.where(np.arange(120) < 100, np.where(np.arange(120) % 2, "male", "female"), "")
    ages = [f"{age:.1f}" for age in draw.integers(0, 18, 120) * 5]
    return pd.DataFrame({"group": [f"L{n % 80}" for n in range(120)], "sex": sexes, "age": ages})


def results_of(predictions, samples, settings=None, prior=(0.2, 0.7, 0.1), validation=None, balance="none") -> dict:
    settings = settings or Eval(subgroups=("sex", "age", "camera"), positive_classes=("mel", "mel+akiec"))
    counts = dict(zip(CLASSES, (round(100 * share) for share in prior), strict=True))
    return compute_results(
        predictions, validation, samples, class_priors(Optim(balance=balance), counts), CLASSES, settings
    )


def test_per_view_views_count_each_view_as_a_prediction_of_its_own(predictions, samples):
    per_view = results_of(predictions, samples)["per_view"]
    assert per_view["images"] == 360
    guesses = predictions.view_probs.argmax(2)
    assert per_view["accuracy"] == pytest.approx((guesses == predictions.labels[:, None]).mean())
    low, high = per_view["intervals"]["accuracy"]
    alone = compute_metrics(predictions.tta_probs, predictions.labels, CLASSES, samples["group"].to_numpy())[
        "intervals"
    ]["accuracy"]
    assert high - low > 0.6 * (alone[1] - alone[0])  # three views of a lesion are not three lesions
    assert "per_view" not in results_of(Predictions(*list(vars(predictions).values())[:5]), samples)


def test_prior_correction_divides_by_the_frequencies_of_training(predictions, samples):
    parts = results_of(predictions, samples, prior=(0.25, 0.5, 0.25))
    moved = predictions.tta_probs / np.array([0.25, 0.5, 0.25])
    by_hand = compute_metrics(moved / moved.sum(1, keepdims=True), predictions.labels, CLASSES)
    assert parts["prior_corrected"]["balanced_accuracy"] == pytest.approx(by_hand["balanced_accuracy"])
    assert parts["prior_corrected"]["loss"] == pytest.approx(by_hand["loss"])
    assert parts["prior_corrected"]["target_name"] == "equal"
    assert "prior-corrected to equal class frequencies" in summary(Results(**ABOUT, **parts))
    assert "prior_corrected" not in results_of(predictions, samples, Eval(prior_correction=False))


def test_after_balanced_training_the_correction_is_to_the_frequencies_of_training(predictions, samples):
    parts = results_of(predictions, samples, prior=(0.25, 0.5, 0.25), balance="sampler")
    moved = predictions.tta_probs * np.array([0.25, 0.5, 0.25])
    by_hand = compute_metrics(moved / moved.sum(1, keepdims=True), predictions.labels, CLASSES)
    assert parts["prior_corrected"]["accuracy"] == pytest.approx(by_hand["accuracy"])
    assert parts["prior_corrected"]["loss"] == pytest.approx(by_hand["loss"])
    assert parts["prior_corrected"]["target_name"] == "training"
    assert "prior-corrected to the class frequencies of training" in summary(Results(**ABOUT, **parts))


def test_a_class_that_training_lacked_keeps_its_probability_under_prior_correction(predictions, samples):
    assert np.isfinite(results_of(predictions, samples, prior=(0.5, 0.5, 0))["prior_corrected"]["loss"])


def test_subgroups_hold_each_image_once_with_its_own_metrics(predictions, samples):
    subgroups = results_of(predictions, samples)["subgroups"]
    assert list(subgroups) == ["sex", "age"]  # the source knows of no camera
    assert list(subgroups["sex"]) == ["female", "male", "unknown"]
    for cells in subgroups.values():
        assert sum(cell["images"] for cell in cells.values()) == 120
    men = (samples["sex"] == "male").to_numpy()
    alone = compute_metrics(
        predictions.tta_probs[men], predictions.labels[men], CLASSES, samples["group"][men].to_numpy()
    )
    cell = subgroups["sex"]["male"]
    assert cell["accuracy"] == alone["accuracy"]
    assert cell["intervals"]["balanced_accuracy"] == alone["intervals"]["balanced_accuracy"]
    assert (cell["small"], subgroups["sex"]["unknown"]["small"]) == (False, True)


def test_a_subgroup_of_one_class_has_no_area_under_the_curve(predictions, samples):
    samples["sex"] = np.where(predictions.labels == 0, "male", "female")
    cell = results_of(predictions, samples)["subgroups"]["sex"]["male"]
    assert cell["macro_auc"] is None
    assert cell["balanced_accuracy"] == cell["accuracy"]


def test_many_numbers_are_cut_into_bins_and_text_is_left_as_it_is():
    ages = bin_values(pd.Series(["5.0", "85.0", "", "40", "45", "60", "20", "nan", "35.0"]))
    assert list(ages.cat.categories) == ["0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 99", "unknown"]
    assert ages.tolist()[:4] == ["0 to 19", "80 to 99", "unknown", "40 to 59"]
    shares = bin_values(pd.Series([f"{n / 10:.1f}" for n in range(10)]))
    assert list(shares.cat.categories)[:2] == ["0 to 0.2", "0.2 to 0.4"]
    for numbers, first in (
        (range(1_000_000_000, 1_000_000_040), "1000000000 to 1000000009"),
        (range(20200101, 20200129), "20200100 to 20200104"),  # dates
        (range(10**13, 10**13 + 30 * 10**11, 10**11), "10000000000000 to 10499999999999"),
        (range(10**17, 10**17 + 3000, 100), "100000000000000000 to 100000000000000499"),
        ([-1e-7 * n for n in range(9)], "-0.0000008 to -0.0000006"),
    ):
        assert bin_values(pd.Series([str(number) for number in numbers])).cat.categories[0] == first
    endless = bin_values(pd.Series([*map(str, range(9)), "inf", "-inf", "1e308"]))
    assert list(endless.cat.categories) == ["0 to 1", "2 to 3", "4 to 5", "6 to 7", "8 to 9", "unknown"]
    assert bin_values(pd.Series(["3", "1", "3"])).cat.categories.tolist() == ["1", "3"]
    assert bin_values(pd.Series(["", ""])).tolist() == ["unknown", "unknown"]


def test_positive_classes_are_named_as_they_are_or_joined_by_a_plus():
    classes = ("HER2+", "mel", "nv")
    assert classes_of("HER2+", classes) == ["HER2+"]
    assert classes_of("mel+nv", classes) == ["mel", "nv"]
    assert classes_of("mel+nevus", classes) == classes_of("", classes) == []


def test_thresholds_and_temperature_come_from_validation_alone(predictions, samples):
    other = Predictions(
        predictions.keys,
        predictions.labels,
        predictions.center_probs,
        predictions.tta_probs[:, [1, 0, 2]],
        predictions.tta_std,
    )
    parts, moved = (results_of(predictions, samples, validation=one) for one in (predictions, other))
    (point,), (elsewhere,) = parts["operating_points"], moved["operating_points"]  # akiec is no class here
    assert point["positive"] == "mel"
    assert point["sensitivity"]["value"] >= 0.9
    assert elsewhere["threshold"] != point["threshold"]
    assert parts["calibration"]["loss"] <= parts["tta"]["loss"]
    assert parts["tta"] == moved["tta"]
    assert "calibration" not in results_of(predictions, samples)


def test_probabilities_that_are_none_are_refused(predictions, samples):
    broken = predictions.tta_probs.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="finite and sum to 1"):
        results_of(
            Predictions(predictions.keys, predictions.labels, predictions.center_probs, broken, predictions.tta_std),
            samples,
        )
    with pytest.raises(ValueError, match="finite and sum to 1"):
        results_of(
            Predictions(
                predictions.keys,
                predictions.labels,
                2 * predictions.center_probs,
                predictions.tta_probs,
                predictions.tta_std,
            ),
            samples,
        )


def test_the_text_tells_every_part(predictions, samples):
    words = summary(Results(**ABOUT, **results_of(predictions, samples, validation=predictions)))
    for part in (
        "each view as a prediction of its own",
        "TTA gain",
        "equal class frequencies",
        "resampled by lesion",
        "temperature",
        "mel at the threshold",
    ):
        assert part in words
    assert words.endswith("warning: a leak")


@pytest.mark.parametrize("full", [True, False])
def test_results_come_back_from_their_file_as_they_were(predictions, samples, tmp_path, full):
    parts = results_of(predictions, samples, validation=predictions if full else None)
    if not full:
        del parts["per_view"], parts["prior_corrected"]
    results = Results(**ABOUT, **parts)
    (tmp_path / "metrics.json").write_text(results.to_json(), encoding="utf-8")
    assert read_results(tmp_path) == results
    content = json.loads(results.to_json())
    assert content["format"] == 4
    assert ("calibration" in content, "per_view" in content) == (full, full)
    assert None not in content.values()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"format": 3, "plain": {}}, "has format 3, and this version of dermharness reads format 4"),
        ({"format": 4, "split": "test"}, "is damaged .*views.*launch/evaluate.py"),
        ({"format": 4, "beauty": 1}, "is damaged .*beauty"),
        ({}, "is damaged .*format"),
        ([1], "is damaged"),
    ],
)
def test_a_file_that_is_no_result_of_this_version_is_refused_with_what_to_do(tmp_path, content, sentence):
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.json"):
        read_results(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_results(tmp_path)
