"""Images as people have them are predicted as an evaluation predicts them, in the order given, and none is lost in silence."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness.evaluation.output import output_rows
from harness.evaluation.results import Predictions, read_predictions
from harness.evaluation.trained import Choices, open_together
from shards import cli
from shards.index import load, load_table
from shards.inputs import find_inputs
from support.processes import launch

PROBABILITIES = [f"p_{name}" for name in ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")]


def predicted(run: Path, *words, out: Path, ranks: int = 1, code: int = 0):
    done = launch("predict", run, *words, "--out", out, ranks=ranks)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def originals(source: Path, ids) -> list[Path]:
    return [next(source.rglob(f"{name}.jpg")) for name in ids]


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)


def test_image_files_are_predicted_as_the_evaluation_predicted_them(finished_run, source, tmp_path):
    evaluated = read_predictions(finished_run).set_index("image_id")
    files = originals(source, evaluated.index)
    predicted(finished_run, *files, out=tmp_path / "p.csv")
    rows = read(tmp_path / "p.csv")
    assert rows["image"].tolist() == list(map(str, files))
    assert np.abs(rows[PROBABILITIES].to_numpy() - evaluated[PROBABILITIES].to_numpy()).max() < 1e-6
    assert rows["prediction"].tolist() == evaluated["prediction"].tolist()
    assert set(rows["error"]) == {""}
    (point,) = [
        one
        for one in json.loads((finished_run / "metrics.json").read_text())["operating_points"]
        if one["positive"] == "mel"
    ]
    assert rows["is_mel"].tolist() == (evaluated["p_mel"] >= point["threshold"]).tolist()


def test_packed_shards_are_predicted_by_their_image_ids(finished_run, packed, tmp_path):
    evaluated = read_predictions(finished_run)
    predicted(finished_run, packed, out=tmp_path / "p.csv")
    rows = read(tmp_path / "p.csv")
    assert rows["image"].tolist() == evaluated["image_id"].tolist()
    assert np.array_equal(rows[PROBABILITIES], evaluated[PROBABILITIES])
    predicted(finished_run, packed, "--split", "val", out=tmp_path / "val.csv")
    assert set(read(tmp_path / "val.csv")["image"]).isdisjoint(rows["image"])


@pytest.fixture
def photos(source, tmp_path) -> Path:
    """Twenty images of other sizes and kinds, among them three that cannot be read."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for number, file in enumerate(sorted(source.rglob("*.jpg"))[:17]):
        with Image.open(file) as opened:
            image = opened.resize((40 + 7 * number, 90 - 3 * number)).convert(["RGB", "L", "RGBA", "CMYK"][number % 4])
            kind = ["jpg", "png", "png", "jpg"][number % 4]
            image.save(folder / ("deeper" if number % 3 == 0 else "") / f"{number:02d}.{kind}")
    (folder / "05cut.jpg").write_bytes(next(source.rglob("*.jpg")).read_bytes()[:900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("left alone")
    return folder


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_writes_the_same_bytes_and_names_what_cannot_be_read(
    finished_run, photos, tmp_path, ranks
):
    outs = [tmp_path / f"{number}.csv" for number in (1, ranks)]
    for out, number in zip(outs, (1, ranks), strict=True):
        done = predicted(finished_run, photos, "--views", "dihedral8", out=out, ranks=number, code=3)
        assert "3 of 20 images could not be read" in done.stdout, done.stdout
        assert "the thresholds (is_...) were chosen for the views flips at 32 pixels" in done.stdout
    assert outs[0].read_bytes() == outs[1].read_bytes()
    rows = read(outs[0])
    assert rows["image"].tolist() == sorted(rows["image"])
    bad = rows[rows["error"] != ""]
    assert [Path(name).name for name in bad["image"]] == ["05cut.jpg", "empty.jpg", "text.png"]
    assert (bad[["prediction", "p_mel", "is_mel"]] == "").all().all()
    assert "Cannot decode the image" in bad["error"].iloc[0]
    assert "empty" in bad["error"].iloc[1]
    alone = tmp_path / "alone.csv"  # what stands beside it in a batch changes nothing, be it good or bad
    good = rows.loc[rows["error"] == "", "image"].tolist()
    predicted(finished_run, *good[3:9], "--views", "dihedral8", out=alone)
    expected = rows.set_index("image").loc[good[3:9], PROBABILITIES].astype(float)
    assert np.abs(read(alone)[PROBABILITIES].to_numpy() - expected.to_numpy()).max() < 1e-6


def test_every_format_says_the_same_and_a_page_shows_it(finished_run, photos, tmp_path):
    pytest.importorskip("pyarrow")
    hostile = photos / "a<b>&.png"
    shutil.copy(photos / "01.png", hostile)
    words = (hostile, *sorted(photos.glob("0[1-4].*")), photos / "text.png", "--temperature", "--prior-correction")
    outs = [tmp_path / f"p{kind}" for kind in (".csv", ".jsonl", ".parquet")]
    for out in outs:
        predicted(finished_run, *words, "--page", tmp_path / "page.html", "--overwrite", out=out, code=3)
    table = read(outs[0])
    lines = pd.DataFrame(map(json.loads, outs[1].read_text().splitlines()))
    parquet = pd.read_parquet(outs[2])
    assert list(table) == list(lines) == list(parquet)
    for other in (lines, parquet):
        assert table["image"].tolist() == other["image"].tolist()
        assert table["is_mel"].tolist() == other["is_mel"].tolist()
        seen = pd.to_numeric(table["p_mel"], errors="coerce").to_numpy()
        np.testing.assert_allclose(seen, other["p_mel"].astype(float).to_numpy(), rtol=1e-5)
    assert np.allclose(parquet.loc[parquet["error"] == "", PROBABILITIES].sum(axis=1), 1, atol=1e-5)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == len(table)
    assert "a&lt;b&gt;&amp;.png" in page
    assert "<b>&.png" not in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.jpg"], "There is no nowhere.jpg"),
        (["none"], "none has no image"),
        (["none/*.jpg"], "none/*.jpg has no image"),
        (["t.csv"], "t.csv needs --image-column. It has: file, note"),
        (["PACKED", "a.png"], "Give it alone"),
        (["a.png", "--out", "old.csv"], "old.csv exists. Give --overwrite"),
        (["a.png", "--out", "p.xlsx"], "must end in .csv, .jsonl, .parquet"),
        (["a.png", "--out", "no/p.csv"], "The folder no of --out does not exist"),
        (["a.png", "--views", "ten"], "ten"),
        (
            ["a.png", "--temperature", "--views", "none"],
            "was fitted for the views flips at 32 pixels, and these are none at 32",
        ),
        (["t.csv", "--image-column", "file", "--out", "t.csv", "--overwrite"], "--out t.csv is one of the inputs"),
        (["a.png", "--page", "../here/a.png", "--overwrite"], "is one of the inputs, and would be lost"),
        (["a.png", "--page", "p.csv"], "--page and --out are one file"),
        (["a.png", "--page", "none", "--overwrite"], "none is a folder. Give --page"),
        (["a.png", "--out", "folder.csv", "--overwrite"], "folder.csv is a folder. Give --out"),
        (["https://u:p@localhost:9/x.JPG?sig=1"], "https://localhost:9/x.JPG is an image behind a URL. Download it"),
        (["RUN"], "is a run's folder. To average several runs"),
    ],
)
def test_what_cannot_be_predicted_is_said_before_anything_is_computed(
    finished_run, packed, tmp_path, capsys, monkeypatch, words, said
):
    from launch.predict import main

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.new("RGB", (9, 9)).save("a.png")
    Path("old.csv").write_text("mine")
    Path("none").mkdir()
    Path("folder.csv").mkdir()
    pd.DataFrame({"file": ["a.png"], "note": ""}).to_csv("t.csv", index=False)
    words = [{"PACKED": str(packed), "RUN": str(finished_run)}.get(word, word) for word in words]
    out = [] if "--out" in words else ["--out", "p.csv"]
    assert main([str(finished_run), *words, *out]) == 1
    assert said in capsys.readouterr().err
    assert Path("old.csv").read_text() == "mine"
    assert Path("t.csv").read_text() == "file,note\na.png,\n"
    Image.open("a.png").load()


def test_a_class_with_a_plus_is_not_two_joined_by_one():
    probabilities = np.array([[0.5, 0.3, 0.2]])
    predictions = Predictions(np.arange(1), np.zeros(1, int), probabilities, probabilities, np.zeros(1))
    points = [{"positive": "HER2+", "threshold": 0.2}, {"positive": "a+b", "threshold": 0.9}]
    rows = output_rows(["x"], predictions, ("a", "b", "HER2+"), {}, points)
    assert rows[["is_HER2+", "is_a+b"]].to_numpy().tolist() == [["true", "false"]]


def test_cells_that_are_no_names_of_images_have_their_reason(finished_run, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_bytes(b"file\na.png\nb\x00.png\n \n")
    predicted(finished_run, tmp_path / "t.csv", "--image-column", "file", out=tmp_path / "p.csv", code=3)
    whole, *errors = read(tmp_path / "p.csv")["error"]
    assert whole == ""
    assert ["no such image" in error for error in errors] == [True] * len(errors)


def test_a_folder_without_a_run_and_one_without_weights_are_refused(finished_run, tmp_path, capsys):
    from launch.predict import main

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), "--out", str(tmp_path / "p.csv")]
    assert main([str(tmp_path), *words]) == 1
    assert "holds no run" in capsys.readouterr().err
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert main([str(run), *words]) == 1
    assert str(run) in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_inputs_keep_the_order_in_which_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.png", "b/in/3.PNG", "a.png", "c[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    Path("b/.hidden.png").write_bytes(b"")
    Path("t.tsv").write_text("name\tlabel\n2\tx\ngone\ty\n1\tx\n")
    found = find_inputs(["c[1].png", "b", "a.png", "b/*.png"])
    assert found.names == ["c[1].png", "b/1.png", "b/2.png", "b/in/3.PNG", "a.png", "b/1.png", "b/2.png"]
    found = find_inputs(["t.tsv"], "name")
    assert found.names == ["2", "gone", "1"]
    assert list(found.missing) == [1]
    assert "no such image below" in found.missing[1]
    assert [path.name for path in found.paths if path.is_file()] == ["2.png", "1.png"]


def test_a_file_whose_name_is_not_utf8_is_predicted(finished_run, tmp_path):
    """As in old archives."""
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(os.fsdecode(os.fsencode(folder) + b"/photo\xe9.png"))
    for out in (tmp_path / "p.csv", tmp_path / "p.jsonl"):
        predicted(finished_run, folder, "--page", tmp_path / f"{out.suffix}.html", out=out)
        assert "\\udce9.png" in out.read_text()
    assert "udce9.png" in (tmp_path / ".csv.html").read_text()


def test_a_huge_picture_is_named_and_a_long_one_is_predicted(finished_run, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    Image.new("L", (20_000, 30)).save(tmp_path / "long.png")
    predicted(finished_run, tmp_path / "huge.png", tmp_path / "long.png", out=tmp_path / "p.csv", code=3)
    rows = read(tmp_path / "p.csv")
    assert "decompression bomb" in rows["error"].iloc[0]
    assert rows["error"].iloc[1] == ""


@pytest.fixture(scope="module")
def second_run(finished_run, tmp_path_factory):
    """A run on the same data from another seed."""
    run = tmp_path_factory.mktemp("second") / "run"
    done = launch("train", "--config", finished_run.parent / "tiny.yaml", "--run.folder", run, "--run.seed", "1")
    assert done.returncode == 0, done.stderr
    return run


def test_an_ensemble_averages_probabilities_and_says_what_it_is_worth(finished_run, second_run, source, tmp_path):
    files = originals(source, read_predictions(finished_run)["image_id"])
    outs = [tmp_path / f"{number}.csv" for number in range(3)]
    for out, words in zip(outs, ([finished_run], [second_run], [finished_run, "--with", second_run]), strict=True):
        predicted(words[0], *files, *words[1:], out=out)
    one, other, both = (read(out)[PROBABILITIES].to_numpy() for out in outs)
    assert np.abs((one + other) / 2 - both).max() < 1e-6
    assert np.abs(one - other).max() > 1e-4
    done = launch("evaluate", finished_run, "--with", second_run, "--out", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "result" / "metrics.json").read_text())
    told = metrics["ensemble"]
    assert told["members"] == [str(finished_run), str(second_run)]
    assert (told["best"] in told["members"], told["chosen_on"]) == (True, "validation")
    evaluated = read_predictions(tmp_path / "result")
    assert np.abs(evaluated[PROBABILITIES].to_numpy() - both).max() < 1e-6
    best = json.loads((Path(told["best"]) / "metrics.json").read_text())["tta"]["loss"]
    assert told["gain"]["loss"]["gain"] == pytest.approx(metrics["tta"]["loss"] - best, abs=1e-5)
    assert "ensemble of 2 runs" in done.stdout
    assert "ensemble of 2 runs" in (tmp_path / "result" / "report.html").read_text()


def test_each_set_of_runs_has_a_folder_and_none_is_that_of_another_run(finished_run, second_run, tmp_path, capsys):
    from launch.evaluate import _folder_name, main

    runs = [open_together([finished_run, second_run], Choices()), open_together([second_run, finished_run], Choices())]
    names = [_folder_name(members, load(members[0].config.data.path)) for members in (*runs, runs[0][:1])]
    assert len(set(names)) == 3
    before = (second_run / "metrics.json").read_bytes()
    assert main([str(finished_run), "--out", str(second_run)]) == 1
    assert "is a run's folder" in capsys.readouterr().err
    assert (second_run / "metrics.json").read_bytes() == before


def test_an_average_over_balanced_and_other_trainings_is_of_no_one_prior(finished_run, second_run, tmp_path, capsys):
    from launch.predict import main

    balanced = shutil.copytree(second_run, tmp_path / "balanced")
    settings = (balanced / "config.yaml").read_text()
    (balanced / "config.yaml").write_text(settings.replace("balance: none", "balance: sampler"))
    done = launch("evaluate", finished_run, "--with", balanced, "--views", "none", "--out", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "result" / "metrics.json").read_text())
    assert "prior_corrected" not in metrics
    assert "no prior correction: classes were balanced" in metrics["warnings"][0]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), "--with", str(balanced), "--prior-correction", "--out", str(tmp_path / "p.csv")]
    assert main([str(finished_run), *words]) == 1
    assert "Leave out --prior-correction" in capsys.readouterr().err


def test_runs_of_other_classes_or_another_preparation_are_no_ensemble(finished_run, source, tmp_path, capsys):
    from launch.predict import main

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = [str(tmp_path / "a.png"), "--out", str(tmp_path / "p.csv")]
    assert main([str(finished_run), *words, "--with", str(finished_run)]) == 1
    assert "named twice" in capsys.readouterr().err
    other = shutil.copytree(finished_run, tmp_path / "other")
    assert cli.main(["pack", str(source), str(tmp_path / "small"), "--size", "40x30"]) == 0
    shutil.copy(tmp_path / "small" / "dataset.json", other)
    assert main([str(finished_run), *words, "--with", str(other)]) == 1
    assert "stored as 40x30 by cover, quality 90" in capsys.readouterr().err
    shutil.copy(finished_run / "dataset.json", other)
    for progress in other.rglob("progress.json"):
        progress.write_text(progress.read_text().replace('"mel"', '"melanoma"'))
        manifest = json.loads((progress.parent / "manifest.json").read_text())
        from shards.files import sha256

        manifest["progress.json"] = sha256(progress)
        (progress.parent / "manifest.json").write_text(json.dumps(manifest))
    assert main([str(finished_run), *words, "--with", str(other)]) == 1
    assert "know other classes (mel, melanoma" in capsys.readouterr().err


@pytest.mark.slow  # .ci/run installs grad-cam for these
def test_heat_maps_stand_beside_the_images_and_in_the_report(finished_run, source, tmp_path):
    pytest.importorskip("pytorch_grad_cam")
    run = shutil.copytree(finished_run, tmp_path / "run")
    settings = (run / "config.yaml").read_text().replace("image_size: 32", "image_size: 64")
    (run / "config.yaml").write_text(settings)
    files = sorted(source.rglob("*.jpg"))[:5]
    predicted(run, *files, "--page", tmp_path / "p.html", "--explain", out=tmp_path / "p.csv")
    assert (tmp_path / "p.html").read_text().count("where the model looks in") == 5
    done = launch("evaluate", run, "--views", "none", "--explain", "--out", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    maps = list((tmp_path / "result" / "images").glob("*-heat.jpg"))
    assert len(maps) >= 5
    with Image.open(maps[0]) as heat_map:
        assert np.ptp(np.asarray(heat_map)) > 100
    assert "where the model looks for" in (tmp_path / "result" / "report.html").read_text()


def test_packed_shards_of_classes_that_the_model_does_not_know_are_refused(finished_run, tmp_path, capsys):
    from launch.predict import main

    for number in range(24):
        path = tmp_path / "root" / ("mel", "wart")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    assert cli.main(["pack", str(tmp_path / "root"), str(tmp_path / "other"), "--size", "48x36"]) == 0
    assert main([str(finished_run), str(tmp_path / "other"), "--out", str(tmp_path / "p.csv")]) == 1
    assert "classes that the model does not know: wart" in capsys.readouterr().err


def test_a_page_that_cannot_be_drawn_is_said_first(finished_run, packed, tmp_path, capsys):
    from launch.predict import main

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "old.html").write_text("mine")
    words = [str(finished_run), str(tmp_path / "a.png"), "--out", str(tmp_path / "p.csv")]
    for more, said in (
        (["--explain"], "Give --page FILE.html"),
        (["--page", str(tmp_path / "old.html")], "old.html exists"),
        (["--page", str(tmp_path / "no" / "p.html")], "does not exist"),
    ):
        assert main([*words, *more]) == 1
        assert said in capsys.readouterr().err
    assert (
        main([str(finished_run), str(packed), "--out", str(tmp_path / "p.csv"), "--page", str(tmp_path / "p.html")])
        == 1
    )
    assert "launch/evaluate.py draws a report" in capsys.readouterr().err


def test_the_most_similar_training_images_stand_below_an_image(finished_run, source, dataset, tmp_path):
    tables = [load_table(dataset, shard) for shard in dataset.split("train")]
    ids = pd.concat(tables)["image_id"].tolist()
    run = shutil.copytree(finished_run, tmp_path / "run")
    words = (*originals(source, ids[3:6]), "--page", tmp_path / "p.html", "--nearest", "2", "--overwrite")
    predicted(run, *words, out=tmp_path / "p.csv")
    page = (tmp_path / "p.html").read_text()
    nearest = re.findall(r"<div class=alike>.*?</div>", page)
    assert len(nearest) == 3
    for found in nearest:
        told = re.findall(r">(\S+), (\S+), (\S+?)</figure>", found)
        assert len(told) == 2
        assert {name for _, _, name in told} <= set(ids)
        assert float(told[0][1]) >= float(told[1][1])
    (features,) = run.glob("features-best-*.npy")
    made = features.read_bytes()
    features.write_bytes(made[:500])  # a file that a full disk cut off is made anew
    predicted(run, *words, out=tmp_path / "p.csv")
    assert features.read_bytes() == made
    assert (tmp_path / "p.html").read_text() == page
    predicted(run, *words, "--image-size", "64", out=tmp_path / "p.csv")
    assert len(list(run.glob("features-best-*.npy"))) == 2  # those of another image size are others


def test_nearest_images_need_the_data_of_the_training(finished_run, source, tmp_path, capsys):
    from launch.predict import main

    assert cli.main(["pack", str(source), str(tmp_path / "other"), "--size", "40x30"]) == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = [
        str(finished_run),
        str(tmp_path / "a.png"),
        "--out",
        str(tmp_path / "p.csv"),
        "--page",
        str(tmp_path / "p.html"),
    ]
    assert main([*words, "--nearest", "2", "--data", str(tmp_path / "other")]) == 1
    assert "Give that as --data" in capsys.readouterr().err
    assert main([*words, "--nearest", "2", "--data", str(tmp_path / "gone")]) == 1
    assert "No packed dataset" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
