"""Runs side by side: their metrics, their spread, and the paired difference of two."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from harness.evaluation.calibration import Prior, change_prior
from launch.compare import main


@pytest.fixture
def better(finished_run, tmp_path):
    """A result on the same images with every probability moved towards the label."""
    folder = tmp_path / "better"
    folder.mkdir()
    shutil.copy(finished_run / "metrics.json", folder)
    rows = pd.read_csv(finished_run / "predictions.csv")
    columns = [name for name in rows if name.startswith("p_")]
    for column in columns:
        rows[column] = 0.5 * rows[column] + 0.5 * (rows["label"] == column.removeprefix("p_"))
    rows.to_csv(folder / "predictions.csv", index=False)
    return folder


def test_two_results_are_compared_on_the_same_images(finished_run, better, capsys):
    assert main([str(finished_run), str(better)]) == 0
    shown = capsys.readouterr().out
    assert "mean +- deviation" in shown
    assert "balanced accuracy" in shown
    assert f"{better} minus {finished_run}" in shown
    loss = next(line for line in shown.splitlines() if line.startswith("loss  "))
    assert "-" in loss
    assert "interval includes 0" not in loss


def test_a_result_compared_with_itself_differs_in_nothing(finished_run, tmp_path, capsys):
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    assert main([str(finished_run), str(copy)]) == 0
    shown = capsys.readouterr().out
    assert "+0.000 (+0.000 to +0.000)  interval includes 0" in shown
    assert "recall of mel       +0.000" in shown


def test_two_settings_of_several_seeds_are_compared_by_their_means(finished_run, better, tmp_path, capsys):
    one, other = (["--metrics", "loss", str(finished_run)], [str(better)])

    def gain_in_loss(*words):
        assert main(list(words)) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss  "))

    single = gain_in_loss(*one, *other)
    assert gain_in_loss(*one, "--against", *other) == single
    assert gain_in_loss(*one, *other, "--against", *other, str(finished_run)).split()[1] == "+0.000"
    half = float(gain_in_loss(*one, str(finished_run), "--against", str(finished_run), *other).split()[1])
    assert half == pytest.approx(float(single.split()[1]) / 2, abs=0.0011)


def test_runs_trained_in_different_ways_are_compared_at_one_class_prior(finished_run, tmp_path, capsys):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    rows = pd.read_csv(finished_run / "predictions.csv")
    columns = [f"p_{name}" for name in metrics["tta"]["per_class"]]
    corrected = metrics["prior_corrected"]
    model_prior, target_prior = corrected["model_prior"], corrected["target_prior"]
    there = Prior(np.array(model_prior), np.array(target_prior), "equal")
    back = {"target_name": "training", "model_prior": target_prior, "target_prior": model_prior}
    balanced = tmp_path / "balanced"  # the same knowledge, told as if all classes were equally frequent
    balanced.mkdir()
    rows[columns] = change_prior(rows[columns].to_numpy(), there)
    rows.to_csv(balanced / "predictions.csv", index=False)
    told = metrics | {"tta": corrected, "prior_corrected": metrics["tta"] | back}
    (balanced / "metrics.json").write_text(json.dumps(told))
    losses = {}
    for prior in ("own", "equal", "training"):
        assert main(["--prior", prior, "--metrics", "loss", str(finished_run), str(balanced)]) == 0
        shown = capsys.readouterr().out
        losses[prior] = [float(x) for x in re.findall(rf"^(?:{balanced}|loss) +([+-]?\d+\.\d+)", shown, re.M)]
    plain, moved = metrics["tta"]["loss"], corrected["loss"]
    assert losses["own"] == pytest.approx([moved, moved - plain], abs=6e-4)
    assert losses["equal"] == pytest.approx([moved, 0], abs=6e-4)
    assert losses["training"] == pytest.approx([plain, 0], abs=6e-4)


def test_a_result_without_prior_correction_is_not_compared_at_another_prior(better, capsys):
    metrics = json.loads((better / "metrics.json").read_text())
    del metrics["prior_corrected"]
    (better / "metrics.json").write_text(json.dumps(metrics))
    assert main(["--prior", "equal", str(better)]) == 1
    assert "--prior-correction true" in capsys.readouterr().err


def test_results_on_different_images_are_not_paired(finished_run, better, capsys):
    rows = pd.read_csv(better / "predictions.csv")
    rows.iloc[1:].to_csv(better / "predictions.csv", index=False)
    metrics = json.loads((better / "metrics.json").read_text())
    (better / "metrics.json").write_text(json.dumps(metrics | {"dataset": "another"}))
    assert main([str(finished_run), str(better)]) == 0
    shown = capsys.readouterr().out
    assert "no paired difference" in shown
    assert "note: they differ in the dataset" in shown


def test_what_cannot_be_compared_is_said(finished_run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "has no metrics.json" in capsys.readouterr().err
    assert main([str(finished_run), "--metrics", "beauty"]) == 1
    assert "Unknown metric beauty" in capsys.readouterr().err


def test_classes_and_images_in_another_order_are_the_same_ones(finished_run, better, tmp_path, capsys):
    assert main([str(finished_run), str(better), "--prior", "equal"]) == 0
    before = capsys.readouterr().out.partition("minus")[2]
    metrics = json.loads((better / "metrics.json").read_text())
    for name in ("model_prior", "target_prior"):
        metrics["prior_corrected"][name] = metrics["prior_corrected"][name][::-1]
    for part in (one for one in metrics.values() if isinstance(one, dict) and "per_class" in one):
        for found in (part, part["intervals"]):
            found["per_class"] = dict(reversed(found["per_class"].items()))
        if "confusion" in part:
            part["confusion"] = [row[::-1] for row in part["confusion"][::-1]]
    (better / "metrics.json").write_text(json.dumps(metrics))
    rows = pd.read_csv(better / "predictions.csv")[::-1]
    columns = [name for name in rows if name.startswith("p_")]
    rows = rows[[*(name for name in rows if name not in columns), *columns[::-1]]]
    rows.to_csv(better / "predictions.csv", index=False)
    assert main([str(finished_run), str(better), "--prior", "equal"]) == 0
    assert capsys.readouterr().out.partition("minus")[2] == before


def test_other_classes_are_named_and_other_images_said(finished_run, better, capsys):
    rows = pd.read_csv(better / "predictions.csv")
    rows.assign(image_id="other" + rows["image_id"]).to_csv(better / "predictions.csv", index=False)
    assert main([str(finished_run), str(better)]) == 0
    assert "they were evaluated on different images" in capsys.readouterr().out
    renamed = {"p_mel": "p_melanoma"}
    rows = rows.rename(columns=renamed).replace({"label": {"mel": "melanoma"}, "prediction": {"mel": "melanoma"}})
    rows.to_csv(better / "predictions.csv", index=False)
    text = (better / "metrics.json").read_text().replace('"mel"', '"melanoma"')
    (better / "metrics.json").write_text(text)
    assert main([str(finished_run), str(better)]) == 0
    assert "some of them do not know the classes mel, melanoma" in capsys.readouterr().out
