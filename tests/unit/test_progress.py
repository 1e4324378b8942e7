"""Stopping and best weights follow the scores and nothing else."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from harness.run.progress import Progress, after_epoch, after_steps, monitored_by, should_stop


def run(scores, patience, epochs, higher=True):
    progress = Progress()
    for score in scores:
        if should_stop(progress, epochs, patience):
            break
        progress = after_epoch(after_steps(progress, 10, 320, 1.0, 2.0, 3.0), score, higher)
    return progress


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 30), st.booleans())
def test_training_stops_after_patience_epochs_without_a_better_score(scores, patience, epochs, higher):
    progress = run(scores, patience, epochs, higher)
    seen = scores[: progress.epoch]
    assert progress.best == (max(seen) if higher else min(seen))
    assert progress.best_epoch == seen.index(progress.best) + 1  # the first of equals
    assert progress.best_step == 10 * progress.best_epoch
    assert progress.epochs_without_improvement == progress.epoch - progress.best_epoch <= patience
    if progress.epoch < min(epochs, len(scores)):
        assert progress.epochs_without_improvement == patience


def test_a_score_that_is_no_number_is_never_the_best():
    for score in (float("nan"), float("inf"), None):
        assert after_epoch(Progress(), score, True).best is None
        assert after_epoch(Progress(best=0.5), score, False).epochs_without_improvement == 1


def test_a_score_of_another_monitor_is_forgotten():
    progress = after_epoch(monitored_by(Progress(), "last"), 1.0, True)
    assert monitored_by(progress, "last") == progress
    other = monitored_by(replace(progress, epochs_without_improvement=4), "macro_f1")
    assert (other.best, other.best_step, other.epochs_without_improvement) == (None, progress.best_step, 0)
    assert after_epoch(other, 0.1, True).best == 0.1
    of_before = Progress(best=0.5)  # a checkpoint that does not say which
    assert monitored_by(of_before, "macro_f1").best == 0.5


def test_an_epoch_in_progress_does_not_stop():
    done = Progress(epoch=5, epochs_without_improvement=5)
    assert should_stop(done, 5, 3) == "all 5 epochs done"
    assert should_stop(done, 9, 3) == "no improvement for 3 epochs"
    assert should_stop(replace(done, samples_seen=32), 5, 3) is None


def test_an_ended_epoch_starts_the_next_with_empty_sums():
    ended = after_epoch(after_steps(Progress(), 2, 64, 5.0, 6.0, 64.0), 0.5, True)
    assert (ended.epoch, ended.samples_seen, ended.step, ended.loss, ended.correct, ended.images) == (1, 0, 2, 0, 0, 0)
