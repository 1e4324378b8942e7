"""The log tells each step once, however often the run was interrupted."""

import json

from harness.log import Log, verdict


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_continuing_removes_what_came_after_the_checkpoint(tmp_path):
    with Log(tmp_path, 0, True) as log:
        for step in (5, 10, 15):
            log.write("train", step, {"loss": step / 10})
        log.flush()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut off by a crash
    with Log(tmp_path, 10, True) as log:
        log.write("train", 15, {"loss": 99.0})
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == [(5, 0.5), (10, 1.0), (15, 99.0)]


def test_the_result_of_a_run_that_continues_is_written_anew(tmp_path):
    for loss in (1.0, 2.0):
        with Log(tmp_path, 10, True) as log:
            log.write("result", 10, {"split": "test", "loss": loss})
    assert entries(tmp_path) == [{"kind": "result", "step": 10, "split": "test", "loss": 2.0}]


def test_tensorboard_shows_each_step_once_with_the_later_value(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (10, 2.0)):
        with Log(tmp_path, start, True) as log:
            for step in range(start + 5, 21, 5):
                log.write("train", step, {"loss": value})
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    shown = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert shown == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_ranks_that_do_not_write_leave_no_file(tmp_path):
    with Log(tmp_path, 0, False) as log:
        log.begin_bar("epoch", 10, 0)
        log.write("train", 1, {"loss": 1.0})
        log.move_bar(5)
        log.flush()
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_says_what_limits_the_run_and_what_to_change():
    assert verdict(0.001, 2, 4).startswith("compute-bound: 0.1%")
    assert verdict(0.38, 2, 4) == (
        "input-bound: 38% of the time waiting for data; raise data.threads to 4 or pack smaller (python -m shards pack --size)"
    )
    assert "give the process more cores" in verdict(0.38, 4, 4)
