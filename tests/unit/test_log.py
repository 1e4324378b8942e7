"""The log tells each step once, however often the run was interrupted."""

import json
import os

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from harness.distributed.trackers import check_trackers
from harness.distributed.world import World
from harness.run.log import RESULT, Log, read_json_lines, verdict
from harness.run.progress import Progress
from harness.run.state import failure_noted, note_start, write_state


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_continuing_removes_what_came_after_the_checkpoint(tmp_path):
    with Log().start(tmp_path, 0, True) as log:
        for step in (5, 10, 15):
            log.write("train", step, {"loss": step / 10})
        log.flush()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a crash
    with Log().start(tmp_path, 10, True) as log:
        log.write("train", 15, {"loss": 99.0})
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == [(5, 0.5), (10, 1.0), (15, 99.0)]


def test_a_step_whose_epoch_is_validated_again_loses_its_validation_alone(tmp_path):
    """A run was stopped before it; the next one was killed after it, before the checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for in_epoch, kinds in ((False, ("train", "val", "epoch")), (True, ("val", "epoch"))):
        with Log().start(tmp_path, 5, True, in_epoch=in_epoch) as log:
            for kind in kinds:
                log.write(kind, 5, {"loss": 1.0})
    assert [entry["kind"] for entry in entries(tmp_path)] == ["train", "val", "epoch"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for kind in ("train", "val", "epoch"):
        assert [event.step for event in board.Scalars(f"{kind}/loss")] == [5], kind


def test_the_result_of_a_run_that_continues_is_written_anew(tmp_path):
    for loss in (1.0, 2.0):
        with Log().start(tmp_path, 10, True) as log:
            log.write("result", 10, {"split": "test", "loss": loss})
    assert entries(tmp_path) == [{"kind": "result", "step": 10, "split": "test", "loss": 2.0}]


def test_tensorboard_shows_each_step_once_with_the_later_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (10, 2.0)):
        with Log().start(tmp_path, start, True) as log:
            for step in range(start + 5, 21, 5):
                log.write("train", step, {"loss": value})
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_a_start_is_noted_on_a_line_of_its_own_also_behind_one_that_a_crash_has_torn(tmp_path):
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n{"step": 5, "wor')
    note_start(tmp_path, {"step": 5})
    note_start(tmp_path, {"step": 10})
    assert read_json_lines(tmp_path / "starts.jsonl") == [{"step": 0}, {"step": 5}, {"step": 10}]
    assert (tmp_path / "starts.jsonl").read_text().count("\n") == 4
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_a_failure_is_noted_where_no_new_file_can_be_made(tmp_path):
    write_state(tmp_path, "running", Progress(step=7))
    (tmp_path / f".state.json.{os.getpid()}.tmp").mkdir()  # in the way of the file that would take its place
    with pytest.raises(OSError, match="in the evaluation"), failure_noted(tmp_path, World("fp32")):
        raise OSError("in the evaluation" + 10_000 * "\N{GREEK SMALL LETTER MU}")
    said = json.loads((tmp_path / "state.json").read_text())
    assert (said["status"], said["step"], said["rank"]) == ("failed", 7, 0)
    assert said["error"].startswith("OSError: in the evaluation")


def test_a_state_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / f".state.json.{os.getpid()}.tmp").mkdir()
    with pytest.raises(OSError, match=r"Cannot write .*state.json .*Make room or repair the disk"):
        write_state(tmp_path, "running", Progress())


def test_ranks_that_do_not_write_leave_no_file(tmp_path):
    with Log().start(tmp_path, 0, False) as log:
        log.begin_bar("epoch", 10, 0)
        log.write("train", 1, {"loss": 1.0})
        log.move_bar(5)
        log.flush()
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_says_what_limits_the_run_and_what_to_change():
    assert verdict(0.001, 0.0, 2, 4).startswith("compute-bound: 0.1%")
    assert verdict(0.38, 0.01, 2, 4) == (
        "input-bound: 38% of the time waiting for data; raise data.threads to 4 or pack smaller (python -m shards pack --size)"
    )
    assert "give the process more cores" in verdict(0.38, 0.01, 4, 4)
    assert verdict(0.043, 0.04, 16, 16) == (  # short epochs on a fast GPU
        "compute-bound: 4.3% of the time waiting for data (4.0% for the first batch of each epoch); more decoding would not help"
    )


def test_trackers_get_what_the_log_gets_results_too(tmp_path):
    told = []
    with Log().start(tmp_path, 0, True, board=False, track=lambda numbers, step: told.append((step, numbers))) as log:
        log.write("train", 1, {"loss": 2.0, "samples": "00ff"})
        log.write(RESULT, 2, {"accuracy": 0.5})
    assert told == [(1, {"train/loss": 2.0}), (2, {"result/accuracy": 0.5})]
    assert not (tmp_path / "tensorboard").exists()


def test_trackers_are_started_by_name_with_the_settings(tmp_path, monkeypatch):
    told = []

    class Notebook(GeneralTracker):
        name, requires_logging_directory, tracker = "notebook", False, None

        def __init__(self, project):
            super().__init__()
            told.append(project)

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step):
            told.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    world = World("fp32")
    check_trackers(("tensorboard", "notebook"))
    world.start_trackers(("tensorboard", "notebook"), tmp_path, {"optim.lr": 0.1})
    world.track({"train/loss": 2.0}, 3)
    assert told == ["dermharness", {"optim.lr": 0.1}, (3, {"train/loss": 2.0})]


def test_trackers_that_are_not_to_be_had_are_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"knows aim, .*wandb.* Got 'diary'"):
        check_trackers(("diary",))
    monkeypatch.setattr("harness.distributed.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match="pip install wandb"):
        check_trackers(("tensorboard", "wandb"))
