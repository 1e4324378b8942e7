"""The folds of a cross-validation: compared and told as one result of all their images."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import read_results
from launch.compare import main

N_FOLDS, N_IMAGES = 3, 240
LESIONS = np.arange(N_IMAGES) // 2  # two images of each
FOLDS = LESIONS % N_FOLDS
GROUPS = np.array([f"lesion{number}" for number in LESIONS])


def drawn(seed: int, n_classes: int, certainty: float) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) probabilities and (N,) labels; the labels are of the images, not of the seed."""
    labels = np.random.default_rng(0).integers(0, n_classes, N_IMAGES)
    noise = np.random.default_rng(seed).dirichlet(np.ones(n_classes), N_IMAGES)
    return (1 - certainty) * noise + certainty * np.eye(n_classes)[labels], labels


@pytest.fixture
def write(finished_run, tmp_path):
    """Writes the results of one fold, or of all images by one model: write(name, fold, seed, certainty, protocol) -> its folder."""
    metrics = json.loads((finished_run / "metrics.json").read_text())
    classes = read_results(finished_run).classes

    def written(name, fold, seed=1, certainty=0.2, protocol=None, **others):
        folder = tmp_path / name
        folder.mkdir()
        probabilities, labels = drawn(seed, len(classes), certainty)
        rows = pd.DataFrame({"key": np.arange(N_IMAGES), "group": GROUPS})
        rows["image_id"] = [f"image{number}" for number in range(N_IMAGES)]
        rows["label"] = np.array(classes)[labels]
        rows["prediction"] = np.array(classes)[probabilities.argmax(1)]
        rows[[f"p_{name}" for name in classes]] = probabilities
        here = np.full(N_IMAGES, True) if fold is None else fold == FOLDS
        rows[here].sample(frac=1, random_state=seed).to_csv(folder / "predictions.csv", index=False)
        cut = {"name": "lesion", "seed": 0, "folds": N_FOLDS, "fold": fold} if fold is not None else {"name": "lesion"}
        told = {"protocol": cut | (protocol or {}), "dataset": f"data{fold}", "trained_on": f"data{fold}"} | others
        (folder / "metrics.json").write_text(json.dumps(metrics | told))
        return str(folder)

    return written


def shown_by(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_all_folds_are_told_as_one_result_of_all_images(write, finished_run, capsys):
    shown = shown_by(capsys, *(write(f"fold{fold}", fold) for fold in range(N_FOLDS)))
    classes = read_results(finished_run).classes
    probabilities, labels = drawn(1, len(classes), 0.2)
    together = compute_metrics(probabilities, labels, classes, GROUPS)
    assert f"3 of 3 folds together (0, 1, 2): {N_IMAGES} images" in shown
    low, high = together["intervals"]["balanced_accuracy"]
    assert f"balanced accuracy {together['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f})" in shown
    recall = together["per_class"]["mel"]["recall"]
    assert re.search(rf"^mel +{(labels == classes.index('mel')).sum()} .* {recall:.3f} \(", shown, re.M)
    areas = [
        compute_metrics(probabilities[fold == FOLDS], labels[fold == FOLDS], classes)["macro_auc"]
        for fold in range(N_FOLDS)
    ]
    assert f"macro auc {np.mean(areas):.3f} (" in shown
    assert "differ in the dataset" not in shown
    two = shown_by(capsys, *(write(f"of two {fold}", fold) for fold in (0, 2)))
    assert "2 of 3 folds together (0, 2)" in two
    assert "paired difference" not in two  # they have no image in common, and that is no news


def test_two_recipes_are_compared_on_the_images_of_all_folds(write, capsys):
    before = [write(f"a{fold}", fold) for fold in range(N_FOLDS)]
    after = [write(f"b{fold}", fold, seed=2, certainty=0.3) for fold in range(N_FOLDS)]
    folds = shown_by(capsys, *before, "--against", *after[::-1])
    whole = shown_by(capsys, write("a", None), write("b", None, seed=2, certainty=0.3))
    assert f"3 runs of folds ({after[-1]} ...) minus 3 runs of folds ({before[0]} ...)" in folds

    def gains(text):
        return {line[:20]: line[20:] for line in text.partition("minus")[2].splitlines() if line[20:21] in ("+", "-")}

    assert "macro auc           " in gains(folds)
    for name, gain in gains(whole).items():
        if "auc" not in name:  # areas are of each fold
            assert gains(folds)[name] == gain, name


def test_seeds_of_each_fold_are_means_in_whatever_order(write, capsys):
    seeds = [write(f"{seed}-{fold}", fold, seed=seed) for fold in range(N_FOLDS) for seed in (1, 2)]
    other = [write(f"b{fold}", fold, seed=3, certainty=0.3) for fold in range(N_FOLDS)]
    shown = shown_by(capsys, *seeds, "--against", *other)
    assert shown.partition("against")[0].count("3 of 3 folds together") == 2
    assert f"minus 6 runs of folds with 2 seeds ({seeds[0]} ...)" in shown


def test_folds_of_different_cuts_are_not_taken_together(write, capsys):
    folders = [write("0", 0), write("1", 1, protocol={"seed": 1}), write("2", 2, split="val")]
    assert "together" not in shown_by(capsys, *folders)
    of_others = [write(f"other{fold}", fold, dataset="elsewhere") for fold in range(N_FOLDS)]
    assert "together" not in shown_by(capsys, *of_others)
    known = [write(f"known{fold}", fold) for fold in range(N_FOLDS)]
    shown = shown_by(capsys, *known, "--against", write("all", None))
    assert "no paired difference: they are of different folds" in shown


def test_folds_of_two_models_or_recipes_are_never_mixed(write, finished_run, capsys):
    """Where one of them lacks a fold, the other's does not take its place."""
    good = [write(f"good{fold}", fold, certainty=0.9) for fold in (0, 1)]
    bad = [write(f"bad{fold}", fold, certainty=0.0, model="resnet50") for fold in range(N_FOLDS)]
    shown = shown_by(capsys, good[0], *bad, good[1])
    assert (
        f"2 of 3 folds together (0, 1): 160 images, each scored by the run of its fold\nruns: {', '.join(good)}"
        in shown
    )
    assert (
        f"3 of 3 folds together (0, 1, 2): 240 images, each scored by the run of its fold\nruns: {', '.join(bad)}"
        in shown
    )
    shown = shown_by(capsys, *good, "--against", *bad)
    assert "no paired difference: they were evaluated on different images (folds 0, 1 and 0, 1, 2)" in shown
    config = (finished_run / "config.yaml").read_text()
    for number, folder in enumerate(bad):
        lr = "0.5" if number == 1 else "0.25"
        Path(folder, "config.yaml").write_text(re.sub(r"(?m)^  lr: .*$", f"  lr: {lr}", config))
    shown = shown_by(capsys, *bad)
    assert "2 of 3 folds together (0, 2)" in shown
    assert f"note: {bad[1]} (fold 1) is not among them: recipe" in shown


def test_a_fold_that_is_not_among_them_is_named(write, capsys):
    folders = [
        write("0", 0),
        write("1", 1),
        write("2", 2, protocol={"united_pairs": 3}),
        write("again", 0, citation="others"),
    ]
    shown = shown_by(capsys, *folders)
    assert f"note: {folders[2]} (fold 2) is not among them: protocol's united_pairs" in shown
    assert f"note: {folders[3]} (fold 0) is not among them: citation" in shown
    assert "2 of 3 folds together (0, 1)" in shown


@pytest.mark.parametrize(("damage", "said"), [("twice", "names an image twice"), ("class", "have no class mel")])
def test_predictions_that_do_not_fit_are_said(write, capsys, damage, said):
    folders = [write(f"fold{fold}", fold) for fold in range(N_FOLDS)]
    path = Path(folders[1], "predictions.csv")
    rows = pd.read_csv(path)
    damaged = pd.concat([rows, rows[:1]]) if damage == "twice" else rows[rows["label"] != "mel"].drop(columns="p_mel")
    damaged[~(damaged["prediction"] == "mel") | (damage == "twice")].to_csv(path, index=False)
    assert main(folders) == 1
    assert said in capsys.readouterr().err


def test_a_common_test_set_of_all_folds_is_no_cross_validation(write, finished_run, capsys):
    classes = read_results(finished_run).classes
    folders = [write(f"held{fold}", None, seed=fold + 1, protocol={"folds": 3, "fold": fold}) for fold in range(2)]
    shown = shown_by(capsys, *folders)
    assert "together" not in shown
    assert f"{folders[1]} minus {folders[0]}" in shown
    first, second = (compute_metrics(*drawn(seed, len(classes), 0.2), classes)["accuracy"] for seed in (1, 2))
    assert f"accuracy            {second - first:+.3f}" in shown
