"""While the head alone is trained, nothing else changes by a bit; a resume and the number of processes change nothing."""

import pytest
import torch

from harness.model.build import build_model
from support.processes import assert_equal_weights, launch, state, weights

SMALL, FROZEN = "shufflenet_v2_x0_5", ("--optim.freeze_epochs", "1", "--run.seed", "5")


def run_of(config, folder, *words, ranks: int = 1, disturb: str = ""):
    done = launch("driven", "--config", config, "--run.folder", folder, *FROZEN, *words, ranks=ranks, disturb=disturb)
    assert done.returncode == 0 or disturb, done.stderr
    return done


def assert_only_the_head_moved(run, first: dict) -> None:
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, first[name]) != name.startswith("fc."), name


def first_weights() -> dict:
    torch.manual_seed(5)
    return build_model(SMALL, 7).state_dict()


@pytest.mark.parametrize("words", [(), ("--optim.ema", "0.9", "--optim.name", "sgd", "--optim.max_grad_norm", "1")])
def test_frozen_weights_and_buffers_are_equal_to_the_bit_after_an_epoch(finished_run, tmp_path, words):
    run_of(finished_run.parent / "tiny.yaml", tmp_path / "run", "--run.epochs", "1", *words)
    assert_only_the_head_moved(tmp_path / "run", first_weights())


@pytest.mark.slow
def test_nothing_frozen_moves_on_three_processes_of_uneven_shares(finished_run, tmp_path):
    words = ("--run.epochs", "1", "--data.global_batch_size", "11", "--optim.micro_batch", "2")
    run_of(finished_run.parent / "tiny.yaml", tmp_path / "run", *words, ranks=3)
    assert_only_the_head_moved(tmp_path / "run", first_weights())


def test_a_run_that_stops_at_and_around_the_boundary_of_freezing_ends_with_the_same_bits(finished_run, tmp_path):
    config, whole, run = finished_run.parent / "tiny.yaml", tmp_path / "whole", tmp_path / "run"
    run_of(config, whole)
    body = [name for name in weights(whole) if not name.startswith("fc.")]
    assert any(
        not torch.equal(weights(whole)[name], first_weights()[name]) for name in body
    )  # from the second epoch on
    epochs, steps = [], state(whole)["step"] // 3
    for disturb in ("stop@2", f"stop@{steps - 2}", "stop@2"):  # in the frozen epoch, at its end, and after it
        run_of(config, run, disturb=disturb)
        assert state(run)["status"] == "stopped"
        epochs.append((state(run)["epoch"], state(run)["step"]))
    assert epochs == [(0, 2), (0, steps), (1, steps + 2)]  # the second before the epoch was validated
    run_of(config, run)
    assert_equal_weights(weights(run), weights(whole))
    assert (run / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


@pytest.mark.slow
def test_a_micro_batch_that_is_found_is_found_again_when_everything_is_trained(finished_run, tmp_path):
    run_of(finished_run.parent / "tiny.yaml", tmp_path / "run", "--optim.micro_batch", "auto", ranks=2)
    assert state(tmp_path / "run")["status"] == "finished"
