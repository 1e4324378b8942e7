"""The page of a run stands alone, tells what is known, and nothing else."""

import json
import re
import shutil

import pytest

from harness.report import draw_results


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_the_page_of_a_run_has_its_figures_with_intervals_and_its_story(run):
    draw_results(run)
    page, metrics = (run / "report.html").read_text(), json.loads((run / "metrics.json").read_text())
    low, high = metrics["tta"]["intervals"]["balanced_accuracy"]
    assert f"<b>{metrics['tta']['balanced_accuracy']:.3f}</b><small>{low:.3f} to {high:.3f}</small>" in page
    for title in ("Classes", "What the views add", "Calibration", "Operating points", "Training", "Use and limits"):
        assert f"<h2>{title}</h2>" in page
    assert metrics["dataset"][:12] in page
    assert "torch " in page  # versions, from starts.jsonl
    assert "model.name shufflenet_v2_x0_5" in page
    assert len(re.findall("data:image/png;base64,", page)) == 4
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
    for title in ("Training", "What the views add", "Operating points"):
        assert f"<h2>{title}</h2>" not in page
    assert "scores of &lt;other&gt; lesions" in page
