"""The report of a run stands alone, tells what is known, and nothing else."""

import io
import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Results
from harness.report import fonts
from harness.report.fonts import drawable
from harness.report.gallery import least_certain, worst_mistakes
from harness.report.page import draw_report
from harness.report.plots import _in_legend, draw_confusion, draw_curves
from harness.report.text import efficiency_facts
from harness.report.text import title as words
from shards.index import load
from shards.reader import SplitReader
from support.processes import peak_memory


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_the_page_of_a_run_has_its_figures_with_intervals_and_its_story(run):
    draw_report(run)
    page, metrics = (run / "report.html").read_text(), json.loads((run / "metrics.json").read_text())
    low, high = metrics["tta"]["intervals"]["balanced_accuracy"]
    assert f"<b>{metrics['tta']['balanced_accuracy']:.3f}</b><small>{low:.3f} to {high:.3f}</small>" in page
    for title in (
        "Classes",
        "Views and class priors",
        "Calibration",
        "Operating points",
        "Subgroup performance",
        "Training",
        "Provenance",
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


def test_a_line_that_a_crash_has_torn_costs_the_page_nothing_else(run):
    draw_report(run)
    page = (run / "report.html").read_text()
    for name in ("starts.jsonl", "log.jsonl"):
        with open(run / name, "ab") as file:
            file.write(b'{"step": 5, "wor\xc3')
    draw_report(run)
    assert (run / "report.html").read_text() == page


def test_an_epoch_that_was_trained_before_the_start_that_validated_it_has_no_speed(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    rates = []
    for i, line in enumerate(lines):
        entry = json.loads(line)
        if entry["kind"] == "epoch":
            entry["images_per_s"] = 0.0 if not rates else 100.0
            rates.append(entry["images_per_s"])
            lines[i] = json.dumps(entry)
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    draw_report(run)
    assert rates[:2] == [0, 100]
    assert "<dd>100 (median over epochs)</dd>" in (run / "report.html").read_text()


def test_the_page_needs_no_network(run):
    draw_report(run)
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
    draw_report(out)
    page = (out / "report.html").read_text()
    for title in ("Training", "Worst mistakes", "Operating points"):
        assert f"<h2>{title}</h2>" not in page
    assert "scores of &lt;other&gt; lesions" in page


def test_the_worst_mistakes_and_the_least_certain_are_chosen_by_their_probabilities():
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
    assert least_certain(rows)["key"].tolist() == [2, 4, 1, 3]


def kept(folder) -> set[int]:
    return {int(path.stem) for path in (folder / "images").glob("0*.jpg")}


def test_the_images_are_those_of_the_predictions(run, dataset):
    rows = pd.read_csv(run / "predictions.csv")
    chosen = set(worst_mistakes(rows)["key"]) | set(least_certain(rows)["key"])
    assert kept(run) == chosen
    reader, key = SplitReader(dataset, "test"), least_certain(rows)["key"].iloc[0]
    (place,) = np.flatnonzero(reader.table(0).key == key)
    ((_, data),) = reader.read(np.array([0]), np.array([place]))
    thumbnail = Image.open(run / "images" / f"{key:08d}.jpg")
    difference = np.asarray(thumbnail, float) - np.asarray(Image.open(io.BytesIO(data)), float)
    assert abs(difference).mean() < 3  # encoded twice


def test_a_report_drawn_again_has_the_same_bytes_with_or_without_the_dataset(run, dataset):
    before = (run / "report.html").read_bytes(), kept(run)
    shutil.rmtree(run / "images")
    draw_report(run, dataset)
    assert ((run / "report.html").read_bytes(), kept(run)) == before
    draw_report(run)
    assert ((run / "report.html").read_bytes(), kept(run)) == before


def test_the_report_of_a_dataset_whose_shards_are_gone_has_no_images_but_all_else(run, packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "data")
    for shard in copy.glob("*.tar"):
        shard.unlink()
    draw_report(run, load(copy))
    page = (run / "report.html").read_text()
    assert kept(run) == set()
    assert "<h2>Worst mistakes</h2>" not in page
    assert "<h2>Classes</h2>" in page


def test_every_text_of_a_file_is_escaped(run):
    evil = "<script>alert('x')</script>"
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"model": evil, "group_name": evil, "citation": evil, "license": evil, "warnings": [evil], "split": evil}
    metrics["subgroups"] = {
        evil: {evil: metrics["subgroups"]["sex"]["male"], "b": metrics["subgroups"]["sex"]["female"]}
    }
    metrics["protocol"]["name"] = metrics["operating_points"][0]["positive"] = evil
    (run / "metrics.json").write_text(json.dumps(metrics))
    rows = pd.read_csv(run / "predictions.csv")
    rows["image_id"] = [f"{evil}{number}" for number in range(len(rows))]
    rows.to_csv(run / "predictions.csv", index=False)
    draw_report(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10


@pytest.fixture(scope="module")
def many_classes(finished_run, tmp_path_factory):
    """A folder of results of 1,000 images of 500 of 1,000 classes."""
    folder, draw = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    classes, labels = tuple(f"class {n:03d}" for n in range(1000)), np.arange(1000) % 500
    probabilities = draw.random((1000, 1000)) + 0.7 * np.eye(1000)[labels]
    probabilities /= probabilities.sum(1, keepdims=True)
    metrics = compute_metrics(probabilities, labels, classes)
    unknown = {name: dict.fromkeys(row) for name, row in metrics["per_class"].items()}
    metrics["intervals"] = dict.fromkeys(metrics) | {"per_class": unknown}
    content = json.loads((finished_run / "metrics.json").read_text())
    subgroups = {"sex": {f"value {n}": content["subgroups"]["sex"]["male"] for n in range(300)}}
    parts = {"tta": metrics, "center": metrics, "prior_corrected": None, "operating_points": [], "subgroups": subgroups}
    del content["format"]
    (folder / "metrics.json").write_text(Results(**content | parts).to_json())
    names = np.array(classes)
    rows = {"key": range(1000), "image_id": [f"i{n}" for n in range(1000)], "group": "g", "label": names[labels]}
    rows |= {"prediction": names[probabilities.argmax(1)], "spread": 0}
    rows |= {f"p_{name}": column for name, column in zip(classes, probabilities.T.round(7), strict=True)}
    pd.DataFrame(rows).to_csv(folder / "predictions.csv", index=False)
    return folder


@pytest.mark.slow
def test_the_report_of_a_thousand_classes_fits_into_a_gigabyte_and_is_whole(many_classes):
    code = "import sys, pathlib; from harness.report.page import draw_report; draw_report(pathlib.Path(sys.argv[1]))"
    assert peak_memory(code, many_classes) < 1000
    page = (many_classes / "report.html").read_text()
    assert len(page) < 3e6
    assert all(page.count(f"<td>class {n:03d}</td>") == 1 for n in range(1000))  # the table is complete
    shown = page.partition("<details>")[0]
    metrics = json.loads((many_classes / "metrics.json").read_text())["tta"]["per_class"]
    f1 = {name: row["f1"] for name, row in metrics.items() if row["f1"] is not None}
    visible = re.findall(r"<td>(class \d+)</td>", shown)
    assert len(visible) == 20
    assert max(f1[name] for name in visible) <= min(f1[name] for name in f1 if name not in visible)
    assert "the 10 classes of the lowest area" in page
    with Image.open(many_classes / "confusion.png") as plot:
        assert max(plot.size) < 2000


def test_few_classes_are_all_in_the_open(run):
    draw_report(run)
    assert "<details>" not in (run / "report.html").read_text()


def test_class_names_are_drawn_as_they_are():
    names = ("costs $_ or $^", "100 %", "<b>", "_x")
    assert draw_confusion(np.eye(4, dtype=int).tolist(), names, "four").startswith(b"\x89PNG")
    rows = pd.DataFrame({"label": names} | {f"p_{name}": [0.7, 0.1, 0.1, 0.1] for name in names})
    assert draw_curves(rows, compute_metrics(np.full((4, 4), 0.25), np.arange(4), names)).startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error:Glyph")  # what matplotlib says where it draws an empty box
def test_a_class_that_begins_with_an_underscore_is_in_the_legend():
    axes = Figure().subplots()
    axes.plot([0, 1], [0, 1], label=_in_legend("_nv", 0.5))
    assert [text.get_text() for text in axes.legend().get_texts()] == [" _nv 0.500"]


def test_names_of_metrics_become_words_and_those_of_classes_stay():
    assert words("balanced_accuracy") == "balanced accuracy"
    assert words("average_precision of p_bkl") == "average precision of p_bkl"


def test_names_in_scripts_that_no_font_here_has_are_drawn_as_numbers_and_stay_apart(monkeypatch):
    names = ("黒色腫", "母斑", "Rücken", "ναίβος")
    assert [drawable(name) for name in names[2:]] == list(names[2:])
    monkeypatch.setattr(fonts, "families", lambda: ("DejaVu Sans",))
    fonts._letters.cache_clear()
    assert [drawable(name) for name in names[:2]] == [r"\u9ed2\u8272\u816b", r"\u6bcd\u6591"]
    draw_confusion(np.eye(4, dtype=int).tolist(), names, "four")
    fonts._letters.cache_clear()


@pytest.mark.filterwarnings("error:Glyph")
def test_names_in_other_scripts_are_drawn_where_a_font_has_them():
    draw_confusion(np.eye(2, dtype=int).tolist(), ("黒色腫", "שומה"), "two")


def test_long_names_stay_apart_and_leave_the_matrix_its_room():
    names = [
        f"Animalia_Chordata_Mammalia_Carnivora_Phocidae_Halichoerus_grypus_{end}" for end in ("grypus", "macrorhynchus")
    ]
    assert len({drawable(name) for name in names}) == 2
    assert max(len(drawable(name)) for name in names) <= fonts.MAX_NAME
    short, long = (
        Image.open(io.BytesIO(draw_confusion([[1, 2], [3, 4]], of, "two"))).size for of in (("a", "b"), tuple(names))
    )
    assert long[0] > short[0] + 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what matplotlib says where there is no room left
        draw_confusion(np.eye(7, dtype=int).tolist(), (*names, *"abcde"), "seven")


def test_citation_and_license_of_the_data_are_printed_where_they_are_known(run):
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"citation": "", "license": ""}))
    draw_report(run)
    assert "License of the data" not in (run / "report.html").read_text()
    told = {"citation": "Tschandl et al., 2018.", "license": "CC BY-NC 4.0", "group_name": "patient"}
    (run / "metrics.json").write_text(json.dumps(metrics | told))
    draw_report(run)
    page = (run / "report.html").read_text()
    assert "<p>Data: Tschandl et al., 2018. License of the data: CC BY-NC 4.0.</p>" in page
    assert "resampled by patient" in page


def test_tensorboard_shows_results_once_with_curves_and_settings(run):
    for _ in range(2):
        draw_report(run)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    metrics, step = (
        json.loads((run / "metrics.json").read_text())["tta"],
        json.loads((run / "state.json").read_text())["step"],
    )
    (found,) = [event.value for event in events.Scalars("result/balanced_accuracy") if event.step == step + 1]
    assert found == pytest.approx(metrics["balanced_accuracy"])
    assert "result/confusion" in events.Tags()["images"]
    assert "result/mel" in events.Tags()["tensors"]
    (tag,) = (tag for tag in events.summary_metadata if tag.endswith("session_start_info"))
    content = HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)
    told = content.session_start_info.hparams
    assert told["optim.lr"].number_value == pytest.approx(1e-3)
    assert told["model.name"].string_value == "shufflenet_v2_x0_5"


def test_memory_and_use_of_the_gpu_are_told_as_far_as_they_are_known():
    entries = [
        {"rss_bytes": 2e9, "peak_gpu_bytes": 9e9, "mfu": 0.3},
        {"rss_bytes": 3e9, "peak_gpu_bytes": 8e9, "mfu": 0.4},
    ]
    assert efficiency_facts(entries) == {
        "memory": "at most 9.0 GB of the GPU, 3.0 GB of the process",
        "model FLOP utilisation": "35.0% (median over epochs)",
    }
    assert efficiency_facts([{"rss_bytes": 2e9}]) == {"memory": "at most 2.0 GB of the process"}
    assert efficiency_facts([{"images_per_s": 2.0}]) == {}  # of a log from before
