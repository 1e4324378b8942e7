"""The page of a run stands alone, tells what is known, and nothing else."""

import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.evaluation.gallery import least_sure, worst_mistakes
from harness.report.page import draw_results
from harness.report.tensorboard import board_results
from shards.reader import SplitReader


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_the_page_of_a_run_has_its_figures_with_intervals_and_its_story(run):
    draw_results(run)
    page, metrics = (run / "report.html").read_text(), json.loads((run / "metrics.json").read_text())
    low, high = metrics["tta"]["intervals"]["balanced_accuracy"]
    assert f"<b>{metrics['tta']['balanced_accuracy']:.3f}</b><small>{low:.3f} to {high:.3f}</small>" in page
    for title in (
        "Classes",
        "Other readings of the same predictions",
        "Calibration",
        "Operating points",
        "Training",
        "Use and limits",
    ):
        assert f"<h2>{title}</h2>" in page
    assert metrics["dataset"][:12] in page
    assert "torch " in page  # versions, from starts.jsonl
    assert "model.name shufflenet_v2_x0_5" in page
    assert len(re.findall("data:image/png;base64,", page)) == 4
    rows = pd.read_csv(run / "predictions.csv")
    wrong = (rows["prediction"] != rows["label"]).sum()
    assert (
        len(re.findall("data:image/jpeg;base64,", page)) == min(8, wrong) + min(8, len(rows)) + 1
    )  # and augmented ones
    assert "<th>sex</th>" in page
    assert "<tr class=small><td>female</td>" in page
    assert (run / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_network(run):
    draw_results(run)
    page = (run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page


def test_a_result_without_a_training_beside_it_has_a_page_too(run, tmp_path):
    out = tmp_path / "result"
    out.mkdir()
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("calibration", "operating_points"):
        del metrics[name]
    warning = "scores of <other> lesions"
    (out / "metrics.json").write_text(json.dumps(metrics | {"views": "none", "warnings": [warning]}))
    shutil.copy(run / "predictions.csv", out)
    draw_results(out)
    page = (out / "report.html").read_text()
    for title in ("Training", "The worst mistakes", "Operating points"):
        assert f"<h2>{title}</h2>" not in page
    assert "scores of &lt;other&gt; lesions" in page


def test_the_worst_mistakes_and_the_least_sure_are_chosen_by_their_probabilities():
    rows = pd.DataFrame(
        {
            "key": [1, 2, 3, 4],
            "label": ["a", "a", "b", "b"],
            "prediction": ["a", "b", "a", "a"],
            "p_a": [0.9, 0.45, 0.99, 0.6],
            "p_b": [0.1, 0.55, 0.01, 0.4],
        }
    )
    assert worst_mistakes(rows)["key"].tolist() == [3, 4, 2]
    assert least_sure(rows)["key"].tolist() == [2, 4, 1, 3]


def test_the_pictures_that_were_kept_are_those_of_the_predictions(run, dataset):
    listed = json.loads((run / "pictures" / "pictures.json").read_text())
    rows = pd.read_csv(run / "predictions.csv").set_index("key")
    assert all(rows.loc[key, "label"] != rows.loc[key, "prediction"] for key in listed["mistakes"])
    reader = SplitReader(dataset, "test")
    (place,) = [n for n, key in enumerate(reader.table(0).key) if key == listed["unsure"][0]]
    ((_, data),) = reader.read(np.array([0]), np.array([place]))
    kept = Image.open(run / "pictures" / f"{listed['unsure'][0]:08d}.jpg")
    difference = np.asarray(kept, float) - np.asarray(Image.open(io.BytesIO(data)), float)
    assert abs(difference).mean() < 3  # encoded twice


def test_tensorboard_shows_results_once_with_curves_and_settings(run):
    for _ in range(2):
        board_results(run, draw_results(run))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    metrics, step = (
        json.loads((run / "metrics.json").read_text())["tta"],
        json.loads((run / "state.json").read_text())["step"],
    )
    (found,) = [event.value for event in events.Scalars("result/balanced_accuracy") if event.step == step + 1]
    assert found == pytest.approx(metrics["balanced_accuracy"])
    assert "result/confusion" in events.Tags()["images"]
    assert "result/mel" in events.Tags()["tensors"]
    assert any("hparams" in tag for tag in events.summary_metadata)
