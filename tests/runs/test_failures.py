"""When a rank fails, all end within a bounded time, the one at fault is named, and the same command continues."""

import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from harness.config import load_config
from harness.model.build import build_model
from harness.model.optim import lr_at
from harness.training import preflight
from harness.training.preflight import check_settings
from shards.index import load, load_table
from support.processes import (
    SAVING,
    Begun,
    assert_equal_weights,
    bare_ranks,
    command,
    deterministic_log,
    ended,
    launch,
    start,
    state,
    weights,
)


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_when_a_rank_is_killed_the_other_names_it_and_ends(finished_run, tmp_path, dying):
    run = tmp_path / "run"
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, f"die@4:{dying}")
    assert ranks[dying].wait(timeout=60) == -signal.SIGKILL
    seconds, errors = ended(ranks[1 - dying], 40)
    assert ranks[1 - dying].returncode == 1
    assert re.search(rf"error: rank {dying} \(.*process {ranks[dying].pid}\) ended without a word", errors), errors
    assert seconds < 20
    assert (state(run)["status"], state(run)["rank"]) == ("failed", dying)
    assert state(run)["step"] in ((2, 3) if dying == 0 else (3,))  # rank 0 may die while it writes the third checkpoint


@pytest.mark.slow
def test_when_a_rank_hangs_the_other_names_it_and_ends(finished_run, tmp_path):
    """As one that waits for a disk that is away, or stands still in a debugger; the collective would wait for 30 minutes."""
    run = tmp_path / "run"
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, "slow@1", DEAD_S="8")
    while state(run).get("step", 0) < 2:
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    seconds, errors = ended(ranks[0], 60)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert re.search(rf"rank 1 \(.*process {ranks[1].pid}\) ended without a word, or hangs", errors), errors
    assert seconds < 30
    assert (state(run)["status"], state(run)["rank"]) == ("failed", 1)
    assert ranks[1].wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_folder_that_the_machines_do_not_share_is_refused_at_the_start(finished_run, tmp_path):
    places = tmp_path / "one", tmp_path / "two"
    for place in places:
        place.mkdir()
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", "runs/run", "", folders=places)
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    found = (
        f"the run folder {places[0] / 'runs' / 'run'} of rank 0 .* is not the one of rank 1 .*process {ranks[1].pid}"
    )
    assert re.search(found, said[0][1]), said
    assert not any(any(place.iterdir()) for place in places)  # nothing was written, or it is removed


@pytest.mark.slow
def test_when_rank_0_is_frozen_the_others_name_it_and_end(finished_run, tmp_path):
    """It serves the store that the ranks watch each other by: whoever asks it waits for ever."""
    run = tmp_path / "run"
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, "slow@1", DEAD_S="8")
    while state(run).get("step", 0) < 2:
        time.sleep(0.05)
    os.kill(ranks[0].pid, signal.SIGSTOP)
    try:
        seconds, errors = ended(ranks[1], 60)
    finally:
        os.kill(ranks[0].pid, signal.SIGKILL)
    assert re.search(rf"rank 0 \(.*process {ranks[0].pid}\) hangs", errors), errors
    assert seconds < 40
    assert (state(run)["status"], state(run)["rank"]) == ("failed", 0)
    ranks[0].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [0, 1])
def test_when_a_rank_is_alive_but_stuck_it_is_named_and_all_end(finished_run, tmp_path, stuck):
    """As in a kernel that never ends, or a read from a file system that is away: its other threads still run."""
    run = tmp_path / "run"
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, f"hang@4:{stuck}", STUCK_S="5")
    (first, errors), (second, _) = ended(ranks[1 - stuck], 60), ended(ranks[stuck], 60)
    assert re.search(rf"rank {stuck} \(.*process {ranks[stuck].pid}\) is stuck: .* 5 s after", errors), errors
    assert first + second < 60
    assert (state(run)["status"], state(run)["rank"]) == ("failed", stuck)
    assert state(run)["step"] == 3


@pytest.mark.slow
def test_the_others_wait_for_rank_0_longer_than_a_collective_may(finished_run, tmp_path):
    """It copies to a slow disk, downloads weights, or computes intervals of a million images."""
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    limits = {"COLLECTIVE_TIMEOUT_S": "5", "STUCK_S": "5", "TURN_S": "6", "SLOW_S": "15"}
    ranks = bare_ranks(config, run, "long-save@3:0", "--run.epochs", "1", **limits)
    said = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1] + said[1][1]
    assert "rank 0 has been at 'save' for" in said[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("launched", ["torchrun", "alone"])
def test_when_a_rank_raises_its_error_is_the_runs_and_the_next_start_continues(finished_run, tmp_path, launched):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    if launched == "torchrun":
        words = command("driven", "--config", config, "--run.folder", run, *SAVING, ranks=2)
        _, errors = ended(start(words, DISTURB="raise@4:1"), 60)
    else:
        ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, "raise@4:1")
        errors = ended(ranks[1], 60)[1] + ended(ranks[0], 30)[1]
    assert "error: a fault that was asked for" in errors
    assert (state(run)["status"], state(run)["rank"]) == ("failed", 1)
    assert state(run)["error"].endswith("ValueError: a fault that was asked for")
    assert "Traceback" in (run / "errors" / "rank-1.txt").read_text()
    assert state(run)["step"] == 3
    done = launch("train", "--config", config, "--run.folder", run, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    assert state(run)["status"] == "finished"
    assert "error" not in state(run)


def restarting(config, run) -> list[str]:
    """torchrun that restarts both ranks up to twice."""
    words = command("driven", "--config", config, "--run.folder", run, *SAVING, ranks=2)
    at = words.index("--standalone")
    return [*words[:at], "--max-restarts", "2", "--monitor-interval", "0.5", *words[at:]]


def starts(run) -> list[int]:
    """The step of each start."""
    return [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_launcher_that_restarts_after_a_rank_was_killed_ends_with_a_finished_run(finished_run, tmp_path):
    run = tmp_path / "run"
    launcher = start(restarting(finished_run.parent / "tiny.yaml", run), DISTURB="die@4:1", ONCE="1")
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert state(run)["status"] == "finished"
    assert starts(run) == [0, 3]


@pytest.mark.slow
def test_an_error_that_repeats_ends_a_launcher_that_restarts_and_a_stop_is_not_restarted(finished_run, tmp_path):
    storm, asked, config = tmp_path / "storm", tmp_path / "asked", finished_run.parent / "tiny.yaml"
    launcher = start(restarting(config, storm), DISTURB="raise@2:1")
    launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert starts(storm) == [0, 1, 2]
    assert state(storm)["status"] == "failed"
    launcher = start(restarting(config, asked), DISTURB="stop@2")
    launcher.communicate(timeout=60)
    assert (launcher.returncode, state(asked)["status"], len(starts(asked))) == (0, "stopped", 1)


@pytest.mark.slow
def test_a_nan_loss_names_its_step_and_samples_and_keeps_the_checkpoint_before(finished_run, packed, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, "--run.save_every_minutes", "0", "--run.sync_every", "2"]
    done = launch("driven", *words, disturb="nan@3")  # an image of the 3rd step, in the interval of the 3rd and 4th
    assert done.returncode == 1
    found = re.search(r"Loss became NaN or Inf at step 3; samples (\d{8})", done.stderr)
    assert found, done.stderr
    assert int(found[1]) in pd_keys(packed)
    assert state(run)["status"] == "failed"
    assert "--run.on_changed_settings accept" in state(run)["error"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002"]
    done = launch("train", *words)  # the fault is gone
    assert done.returncode == 0, done.stderr
    assert_equal_weights(weights(run), weights(finished_run))


def pd_keys(packed) -> set[int]:
    """Keys of the training samples."""
    dataset = load(packed)
    return {int(key) for shard in dataset.split("train") for key in load_table(dataset, shard)["key"]}


@pytest.mark.slow
def test_the_samples_of_a_bad_loss_are_named_though_another_rank_has_them(finished_run, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = command("driven", "--config", config, "--run.folder", run, ranks=2)
    _, errors = ended(start(words, DISTURB="nan@1:1"), 60)
    assert re.search(r"Loss became NaN or Inf at step 1; samples \d{8}", errors), errors
    assert state(run)["status"] == "failed"


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(finished_run, tmp_path):
    """The loss of the last step before a checkpoint is finite; what it did to the weights is not."""
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, *SAVING]
    done = launch("driven", *words, disturb="inf@3")
    assert done.returncode == 1
    assert "Weights contain NaN or Inf at step 3" in done.stderr
    newest = max((run / "checkpoints").iterdir())
    assert newest.name == "step-00000002"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "model.safetensors").values())


@pytest.mark.slow
def test_another_rate_continues_by_force_and_the_results_say_so(finished_run, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, *SAVING]
    assert launch("driven", *words, disturb="stop@3").returncode == 75
    refused = launch("train", *words, "--optim.lr", "0.0005")
    assert refused.returncode == 1
    assert "optim.lr: 0.001 is now 0.0005" in refused.stderr
    assert "--run.on_changed_settings accept" in refused.stderr
    done = launch(
        "train", *words, "--optim.lr", "0.0005", "--data.global_batch_size", "10", "--run.on_changed_settings", "accept"
    )
    assert done.returncode == 0, done.stderr
    assert "epoch 1 starts over" in done.stdout  # its batches are others now
    said = results_warnings(run)
    assert "changed during training: optim.lr: 0.001 is now 0.0005" in said
    again = launch("evaluate", run, "--out", tmp_path / "again")
    assert "changed during training: optim.lr" in again.stdout
    before = (run / "config.yaml").read_bytes(), (run / "changes.json").read_bytes()
    longer = launch("train", *words, "--run.epochs", "9", "--run.on_changed_settings", "accept")
    assert longer.returncode == 1
    assert "is finished, with other settings" in longer.stderr
    assert ((run / "config.yaml").read_bytes(), (run / "changes.json").read_bytes()) == before


@pytest.mark.slow
def test_settings_that_do_not_fit_the_checkpoint_leave_the_run_as_it_was(finished_run, tmp_path):
    """The command of before continues it, and the results tell of no change."""
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, *SAVING]
    assert launch("driven", *words, disturb="stop@3").returncode == 75
    before = (run / "config.yaml").read_bytes()
    for other in (("--optim.name", "sgd"), ("--model.name", "resnet18")):
        done = launch("train", *words, *other, "--run.on_changed_settings", "accept")
        assert done.returncode == 1
        assert re.search(r"'optim.name' or .* was another|'model.name' is resnet18", done.stderr), done.stderr
        assert "Restore a copy" not in done.stderr
        assert ((run / "config.yaml").read_bytes(), (run / "changes.json").exists()) == (before, False)
    done = launch("train", *words)
    assert done.returncode == 0, done.stderr
    assert results_warnings(run) == results_warnings(finished_run)
    assert_equal_weights(weights(run, "best-"), weights(finished_run, "best-"))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "new"), [(6, 12), (12, 6)])
def test_the_learning_rate_follows_the_epochs_also_when_the_batch_size_changes(finished_run, tmp_path, batch, new):
    """Steps of another batch size before it would have ended the schedule too early, or never."""
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, *SAVING]
    assert launch("driven", *words, "--data.global_batch_size", batch, disturb="stop@8").returncode == 75
    done = launch("train", *words, "--data.global_batch_size", new, "--run.on_changed_settings", "accept")
    assert done.returncode == 0, done.stderr
    settings = load_config(run / "config.yaml")
    rates = [line["lr"] for line in deterministic_log(run) if line["kind"] == "train"]
    n_batches = sum(load(settings.data.path).split("train").samples) // new
    expected = [lr_at(step, settings.optim, n_batches, settings.run.epochs) for step in range(3 * n_batches)]
    assert rates[-n_batches:] == expected[-n_batches:]
    assert rates[-1] > 0


@pytest.mark.slow
def test_scores_of_another_monitor_are_not_compared(finished_run, tmp_path):
    run, config = tmp_path / "run", finished_run.parent / "tiny.yaml"
    words = ["--config", config, "--run.folder", run, *SAVING]
    assert launch("driven", *words, "--run.monitor", "last", disturb="stop@8").returncode == 75
    more = ("--run.monitor", "loss", "--run.patience", "1", "--run.on_changed_settings", "accept")
    done = launch("train", *words, *more)
    assert done.returncode == 0, done.stderr
    assert "'run.monitor' was last: the next epoch is the best so far by loss" in done.stdout
    assert re.search(r"epoch +2/3 .* best$", done.stdout, re.MULTILINE), done.stdout


def results_warnings(run) -> list[str]:
    return json.loads((run / "metrics.json").read_text())["warnings"]


def test_batch_normalisation_over_ranks_needs_gpus(tiny_config):
    synchronised = replace(tiny_config, model=replace(tiny_config.model, sync_batchnorm=True))
    with pytest.raises(ValueError, match=r"'model.sync_batchnorm' needs GPUs"):
        check_settings(synchronised, torch.device("cpu"))
    check_settings(synchronised, torch.device("cuda"))


def test_a_mode_that_replays_passes_is_refused_with_micro_batches(tiny_config, monkeypatch):
    monkeypatch.setattr(preflight, "check_compile", lambda device: None)
    run = replace(tiny_config.run, compile=True, compile_mode="reduce-overhead")
    for micro_batch in (2, "auto"):
        settings = replace(tiny_config, run=run, optim=replace(tiny_config.optim, micro_batch=micro_batch))
        with pytest.raises(ValueError, match=r"'run.compile_mode' reduce-overhead .*Set 'optim.micro_batch' to 0"):
            check_settings(settings, torch.device("cpu"))


def test_compiling_is_refused_on_old_gpus_and_without_a_compiler(tiny_config, monkeypatch):
    compiled = replace(tiny_config, run=replace(tiny_config.run, compile=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    with pytest.raises(ValueError, match=r"'run.compile' needs a V100.*sm_60"):
        check_settings(compiled, torch.device("cuda"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"'run.compile' needs a compiler \(g\+\+"):
        check_settings(compiled, torch.device("cpu"))


def test_batch_normalisation_over_ranks_keeps_the_names_of_the_weights():
    """So that a checkpoint is read with either setting, and by evaluation."""
    model = build_model("resnet18", 7)
    names = list(model.state_dict())
    assert list(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == names


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_says_so_with_advice(finished_run, tmp_path):
    run = tmp_path / "run"
    ranks = bare_ranks(finished_run.parent / "tiny.yaml", run, "", FITS="5:1")
    said = [rank.communicate(timeout=60) for rank in ranks]
    assert re.search(r"error: Rank 1 \(.*\) ran out of memory\. Lower optim\.micro_batch \(.*auto\)", said[1][1]), said[
        1
    ]
    assert (state(run)["status"], state(run)["rank"]) == ("failed", 1)


@pytest.mark.slow
def test_a_micro_batch_that_fits_on_every_rank_is_found_and_changes_nothing_else(finished_run, tmp_path):
    """Of 12 images over 2 ranks, rank 1 has room for 4 at a time; statistics of normalisation are of 3 images either way."""
    config, found = finished_run.parent / "tiny.yaml", {}
    for name, words, room in (("auto", ("auto",), "4:1"), ("given", ("3",), "")):
        run = tmp_path / name
        stop = bare_ranks(config, run, "stop@4", "--optim.micro_batch", *words, FITS=room)
        said = [rank.communicate(timeout=60) for rank in stop]
        assert stop[0].returncode == 75, said
        assert ("optim.micro_batch auto: 3 images" in said[0][0]) == (name == "auto")
        for rank in (on := bare_ranks(config, run, "", "--optim.micro_batch", *words)):  # kept: now there is more room
            assert rank.wait(timeout=90) == 0, rank.stderr.read()
        assert "of a process at a time fit" not in on[0].stdout.read()
        found[name] = weights(run)
    assert_equal_weights(found["auto"], found["given"])


@pytest.mark.slow
def test_fp16_that_skips_for_ever_fails_with_advice_and_a_few_skips_are_counted(finished_run, tmp_path):
    run, words = tmp_path / "few", ["--config", finished_run.parent / "tiny.yaml", "--optim.ema", "0.9"]
    scaled = Begun(command("driven", *words, "--run.folder", run), LOSS_SCALE="1024", DISTURB="overflow@2 overflow@7")
    said = scaled.communicate(timeout=90)
    assert scaled.returncode == 0, said
    assert said[0].count("  1 steps skipped (fp16)") == 2  # of two epochs of three
    log = deterministic_log(run)
    assert [entry["loss_scale"] for entry in log if entry["kind"] == "train"][::2] == [
        512.0,
        512.0,
        256.0,
        256.0,
        256.0,
    ]
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    run = tmp_path / "for ever"
    scaled = Begun(command("driven", *words, "--run.folder", run), LOSS_SCALE="1", DISTURB="overflow@2")
    said = scaled.communicate(timeout=90)
    assert scaled.returncode == 1
    assert re.search(r"error: Gradients overflow in fp16 at step \d+: .* Lower optim.lr", said[1]), said
    assert state(run)["status"] == "failed"


@pytest.mark.slow
def test_parameters_without_a_gradient_are_named_at_the_first_step_of_several_ranks(finished_run, tmp_path):
    words = ["--config", finished_run.parent / "tiny.yaml", "--model.name", "tiny_unused"]
    done = launch("driven", *words, "--run.folder", tmp_path / "two", ranks=2)
    assert done.returncode == 1
    assert "Parameters of ResNet get no gradient (1): spare. Several processes cannot train such a model" in done.stderr
    assert launch("driven", *words, "--run.folder", tmp_path / "one", "--run.epochs", "1").returncode == 0


@pytest.mark.slow
def test_every_rank_has_as_many_forward_passes_where_shares_are_uneven(finished_run, tmp_path):
    """11 images over 2 ranks, 5 at a time: 5 images are one micro-batch, 6 are two, and the model meets the others in each."""
    words = ["--data.global_batch_size", "11", "--optim.micro_batch", "5", "--model.name", "tiny_reducing"]
    config = finished_run.parent / "tiny.yaml"
    done = launch("driven", "--config", config, *words, "--run.folder", tmp_path / "run", "--run.epochs", "1", ranks=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_driver_of_these_tests_disturbs_nothing_by_itself(finished_run, tmp_path):
    done = launch("driven", "--config", finished_run.parent / "tiny.yaml", "--run.folder", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_equal_weights(weights(tmp_path / "run"), weights(finished_run))
