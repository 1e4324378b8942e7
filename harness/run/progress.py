"""How far a run is, and whether it is done: pure.

In: a `Progress` and a validation score. Out: the next `Progress`. Invariants: this and the weights are all that a
run needs to continue.
"""

from dataclasses import dataclass, replace
from math import isfinite

WAY_DOWN = 16  # steps that the scale of fp16 may skip


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    epoch: epochs done. samples_seen: samples of the current epoch that are in the weights, over all ranks.
    step: optimizer steps done. best: best validation score, None before the first. best_step: step of the best
    weights. best_epoch: its number, counted from 1. epochs_without_improvement: since then.
    loss, correct, images: sums over the current epoch's training images. skipped_steps: steps of the current epoch that changed
    nothing, as gradients overflowed in fp16. micro_batch: images of a forward pass that fit into memory, where they are to be
    found (optim.micro_batch auto); 0 before that. monitor: which score `best` is; empty before the first, and of older checkpoints.
    """

    epoch: int = 0
    samples_seen: int = 0
    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_epoch: int = 0
    epochs_without_improvement: int = 0
    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0
    skipped_steps: int = 0
    micro_batch: int = 0
    monitor: str = ""


def after_steps(
    progress: Progress, steps: int, samples: int, loss: float, correct: float, images: float, skipped: int = 0
) -> Progress:
    """Progress after some steps inside an epoch."""
    return replace(
        progress,
        step=progress.step + steps,
        samples_seen=progress.samples_seen + samples,
        loss=progress.loss + loss,
        correct=progress.correct + correct,
        images=progress.images + images,
        skipped_steps=progress.skipped_steps + skipped,
    )


def monitored_by(progress: Progress, monitor: str) -> Progress:
    """Progress under a `run.monitor`: scores of another one are not compared with its own, so the next epoch is the best."""
    if progress.monitor in ("", monitor):
        return replace(progress, monitor=monitor)
    return replace(progress, monitor=monitor, best=None, epochs_without_improvement=0)


def after_epoch(progress: Progress, score: float | None, higher_is_better: bool) -> Progress:
    """Progress after an epoch and its validation; a NaN score is never the best."""
    ended = replace(
        progress, epoch=progress.epoch + 1, samples_seen=0, loss=0.0, correct=0.0, images=0.0, skipped_steps=0
    )
    if score is not None and isfinite(score):
        better = progress.best is None or (score > progress.best if higher_is_better else score < progress.best)
        if better:
            return replace(
                ended, best=score, best_step=ended.step, best_epoch=ended.epoch, epochs_without_improvement=0
            )
    return replace(ended, epochs_without_improvement=progress.epochs_without_improvement + 1)


def should_stop(progress: Progress, epochs: int, patience: int) -> str | None:
    """Why training is over, or None."""
    if progress.samples_seen:
        return None
    if progress.epoch >= epochs:
        return f"all {epochs} epochs done"
    if progress.epochs_without_improvement >= patience:
        return f"no improvement for {patience} epochs"
    return None


def find_skipping(progress: Progress, n_steps: int, loss_scale: float | None) -> str | None:
    """What is wrong with a run in fp16 that skips steps for want of a scale at which gradients are finite; None if nothing is.

    A scale starts at 2^16 and is halved by each step that is skipped: 16 of them are its way down to where it must hold.

    Args:
        n_steps: of an epoch. loss_scale: now; None where there is none.
    """
    skipped = progress.skipped_steps
    if loss_scale is None or (loss_scale >= 1 and skipped <= max(WAY_DOWN, 0.1 * n_steps)):
        return None
    return (
        f"Gradients overflow in fp16 at step {progress.step}: {skipped} of the epoch's {n_steps} steps were skipped, and the loss "
        f"scale is {loss_scale:g}. Lower optim.lr, or set run.precision to fp32 (or bf16, where the GPU has it); "
        "--run.on_changed_settings accept continues from the latest checkpoint with it."
    )
