"""A run that goes on is the same run in wandb, MLflow and Comet."""

import json
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from harness.distributed import trackers
from harness.distributed.trackers import start_trackers
from support.processes import SAVING, Begun, command, state

SETTINGS = {"optim.lr": 0.1, "data.threads": 2}


@pytest.fixture
def accelerator(monkeypatch) -> Accelerator:
    """One of its own for the test: what it knows is shared in a process."""
    for shared in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(shared, "_shared_state", {})
    return Accelerator(cpu=True)


class Comet:
    """What Accelerate asks of the package comet_ml: `start` that returns an experiment."""

    __version__ = "3.50.0"

    def __init__(self):
        self.started: list[dict] = []

    def start(self, **options):
        self.started.append(options)
        return self

    def log_parameters(self, values) -> None:
        self.started[-1]["parameters"] = values


@pytest.fixture
def comet(monkeypatch) -> Comet:
    package = Comet()
    monkeypatch.setitem(sys.modules, "comet_ml", package)
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, folder: names)
    monkeypatch.delenv("COMET_EXPERIMENT_KEY", raising=False)
    return package


def test_comet_gets_one_key_for_all_starts_of_a_run(accelerator, comet, tmp_path):
    for _ in range(2):
        start_trackers(accelerator, ("tensorboard", "comet_ml"), tmp_path, SETTINGS)
        accelerator.trackers = []
    first, second = comet.started
    assert first["experiment_key"] == second["experiment_key"]
    assert first["mode"] == second["mode"] == "get_or_create"
    assert first["experiment_key"].isalnum()
    assert 32 <= len(first["experiment_key"]) <= 50
    assert first["parameters"] == second["parameters"] == SETTINGS
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"comet_ml": first["experiment_key"]}
    (tmp_path / "other").mkdir()
    start_trackers(accelerator, ("comet_ml",), tmp_path / "other", SETTINGS)
    assert comet.started[2]["experiment_key"] != first["experiment_key"]


def test_a_key_of_the_environment_is_taken_and_a_damaged_file_starts_anew(accelerator, comet, tmp_path, monkeypatch):
    (tmp_path / "trackers.json").write_text("{")
    monkeypatch.setenv("COMET_EXPERIMENT_KEY", "k" * 32)
    start_trackers(accelerator, ("comet_ml",), tmp_path, SETTINGS)
    assert comet.started[0]["experiment_key"] == "k" * 32


def test_tensorboard_alone_leaves_no_file(accelerator, tmp_path):
    start_trackers(accelerator, ("tensorboard",), tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_cannot_go_on_says_what_to_do(accelerator, comet, tmp_path, monkeypatch):
    def refuse(**options):
        raise RuntimeError("no such experiment")

    comet.start = refuse
    with pytest.raises(ConnectionError, match=r"comet_ml.*no such experiment.*trackers\.json"):
        start_trackers(accelerator, ("comet_ml",), tmp_path, SETTINGS)


def test_mlflow_goes_on_in_the_same_run_though_a_setting_changed(accelerator, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    for settings in (SETTINGS, SETTINGS | {"data.threads": 4}):
        start_trackers(accelerator, ("mlflow",), tmp_path, settings)
        accelerator.log({"train/loss": 1.0}, step=1)
        mlflow.end_run()
        accelerator.trackers = []
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 1


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    words = command("driven", "--config", tiny, "--run.folder", tmp_path / "run", *SAVING, "--run.trackers", "[wandb]")
    for disturb, code in (("stop@3", 75), ("", 0)):
        process = Begun(words, DISTURB=disturb)
        _, error = process.communicate(timeout=120)
        assert process.returncode == code, error
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert ids == {json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]}
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert state(tmp_path / "run")["status"] == "finished"
