"""A probe is a run like any other, the same on any number of processes."""

import pytest
import torch

from harness.evaluation.results import read_results
from harness.run.stop import exit_code
from harness.training.probe import refuse_training
from harness.training.train import refuse_probe
from support.processes import launch, state, weights


@pytest.fixture(scope="module")
def asked(finished_run):
    (best,) = (finished_run / "checkpoints").glob("best-*")
    return ["--config", finished_run.parent / "tiny.yaml", "--model.weights", best / "model.safetensors"]


@pytest.fixture(scope="module")
def probed(asked, tmp_path_factory):
    run = tmp_path_factory.mktemp("probe") / "run"
    done = launch("probe", *asked, "--run.folder", run)
    assert done.returncode == 0, done.stderr
    assert "penalty C =" in done.stdout
    return run


def test_nothing_but_the_head_changes(probed, finished_run):
    before, after = weights(finished_run, "best-"), weights(probed, "best-")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_the_run_is_finished_and_has_a_report_and_can_be_evaluated(probed, asked, tmp_path):
    assert state(probed)["status"] == "finished"
    assert (probed / "report.html").is_file()
    results = read_results(probed)
    done = launch("evaluate", probed, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert read_results(tmp_path / "again").tta == results.tta
    again = launch("probe", *asked, "--run.folder", probed)
    assert again.returncode == 0
    assert "is finished. Its results again" in again.stdout


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(probed, asked, tmp_path):
    done = launch("probe", *asked, "--run.folder", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    for name in ("probe.csv", "predictions.csv", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (probed / name).read_bytes(), name


def test_a_probe_that_is_asked_to_stop_stops_before_its_features_are_there(asked, tmp_path, monkeypatch):
    limit = ["--run.time_limit_minutes", "0.0001", "--run.folder", tmp_path / "run"]
    done = launch("probe", *asked, *limit)
    assert done.returncode == 75, done.stderr
    assert "the same command starts the probe again" in done.stdout
    assert "features of" not in done.stdout
    assert state(tmp_path / "run")["status"] == "stopped"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # the launcher would start it again
    assert exit_code("stopped") == exit_code("finished") == 0


def test_what_cannot_be_probed_is_refused(asked, finished_run, tmp_path):
    done = launch("probe", *asked, "--model.weights", "none", "--run.folder", tmp_path / "run")
    assert done.returncode == 1
    assert "A probe of random weights says nothing" in done.stderr
    done = launch("probe", *asked, "--run.monitor", "last", "--run.folder", tmp_path / "run")
    assert "must not be last" in done.stderr


def test_a_training_does_not_take_the_results_of_a_probe_for_its_own(probed):
    with pytest.raises(ValueError, match=r"holds a linear probe\. Name another --run\.folder"):
        refuse_probe(probed)


def test_the_folder_of_a_training_is_left_alone(finished_run):
    with pytest.raises(ValueError, match="holds checkpoints of a training"):
        refuse_training(finished_run)
