"""A leak study: every arm is scored on the same unseen images, and what is interrupted goes on."""

import signal
import subprocess
import time

import pandas as pd
import pytest

from harness.evaluation.results import read_predictions, read_results
from launch import leak_study
from support.processes import ROOT, command, environment, launch

TINY = [
    "--run.epochs",
    "2",
    "--model.name",
    "shufflenet_v2_x0_5",
    "--data.image_size",
    "32",
    "--data.global_batch_size",
    "12",
]


@pytest.fixture(scope="module")
def duplicates(source, tmp_path_factory):
    """The table of an audit with one confirmed pair."""
    images = pd.read_csv(source / "HAM10000_metadata.csv").drop_duplicates("lesion_id")
    one, other = images[images["dx"] == "nv"]["image_id"].iloc[:2]
    path = tmp_path_factory.mktemp("audit") / "audit.csv"
    pd.DataFrame([("yes", one, other)], columns=["same", "image_id_a", "image_id_b"]).to_csv(path, index=False)
    return path


def words(source, out, *more) -> list[str]:
    return [*map(str, (source, "--out", out, "--seeds", 1, *more)), *TINY]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_scores_all_arms_on_the_same_images(source, duplicates, tmp_path):
    out = tmp_path / "study"
    arguments = words(source, out, "--arms", "image,lesion-united", "--merge-duplicates", duplicates)
    process = subprocess.Popen(
        command("leak_study", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoints = out / "runs" / "image-0" / "checkpoints"
    deadline = time.monotonic() + 60
    while not checkpoints.is_dir():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    assert "stopped as asked; the same command continues" in said
    assert not (out / "study.csv").exists()

    done = launch("leak_study", *arguments, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs are finished" in done.stdout
    table = pd.read_csv(out / "study.csv")
    assert table["arm"].tolist() == ["image", "lesion-united"]
    for name in ("image", "lesion-united"):
        run = out / "runs" / f"{name}-0"
        row = table[table["arm"] == name].iloc[0]
        assert row["claimed_balanced_accuracy"] == read_results(run).tta["balanced_accuracy"]
        assert read_results(run).split == "val"
        assert row["unseen_balanced_accuracy"] == read_results(run / "evaluation-unseen").tta["balanced_accuracy"]
    shown = [
        set(read_predictions(out / "runs" / f"{name}-0" / "evaluation-unseen")["image_id"])
        for name in ("image", "lesion-united")
    ]
    assert shown[0] == shown[1]
    assert "* below a training accuracy of 0.98" in (out / "study.md").read_text().replace("\\", "")
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")

    again = launch("leak_study", *arguments, timeout=100)  # all is there
    assert again.returncode == 0
    assert "train loss" not in again.stdout
    longer = launch(
        "leak_study", *arguments, "--run.epochs", "3"
    )  # finished runs would stay as they are, beside longer ones
    assert longer.returncode == 1
    assert "another recipe (run.epochs: 2 is now 3)" in longer.stderr
    other = launch(
        "leak_study", *words(source, out, "--arms", "image", "--merge-duplicates", duplicates, "--holdout", 0.3)
    )
    assert other.returncode == 1
    assert "another holdout (0.15, now 0.3)" in other.stderr


def test_a_folder_is_of_one_study_with_one_recipe_and_one_choice_of_columns(tmp_path):
    study = leak_study.Study(tmp_path / "source", tmp_path, None, 0.15, (32, 32), [], [])
    parts = {"columns": "a", "recipe": {"optim.lr": 0.1, "augment.crop_side": (0.8, 1.0)}}
    leak_study.note_parameters(study, parts)
    leak_study.note_parameters(study, parts)
    for other, said in (
        ({"columns": "b"}, "another columns"),
        ({"recipe": {"optim.lr": 0.2}}, "optim.lr: 0.1 is now 0.2"),
    ):
        with pytest.raises(ValueError, match=said):
            leak_study.note_parameters(study, parts | other)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--arms", "lesion-united"], "lesion-united needs the duplicates"),
        (["--task", "9"], "'--task' must be 0 to 3"),
        (["--epochs", "3"], "Unknown option --epochs"),
        (["--arms", "lesions", "--task", "0"], "An arm must be one of"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_anything_is_packed(source, tmp_path, capsys, caplog, more, said):
    assert leak_study.main(words(source, tmp_path / "study", *more)) == 1
    assert said in caplog.text + capsys.readouterr().err
    assert not (tmp_path / "study" / "data").exists()
