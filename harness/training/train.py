"""The story of a run, top to bottom.

In: a `Config` and a `World`. Out: a run folder. Invariants: the weights after step k depend on the settings, the dataset and k,
not on how often the run was interrupted; rank 0 decides when to stop and what is best.
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from harness.config import Config, flat
from harness.distributed.hardware import available_cores, decode_threads
from harness.distributed.world import World
from harness.evaluation.calibration import class_priors
from harness.evaluation.ensemble import Member
from harness.evaluation.evaluate import EvalContext, evaluate
from harness.evaluation.metrics import HIGHER_IS_BETTER
from harness.evaluation.predict import validate
from harness.evaluation.results import read_results
from harness.report.text import summary
from harness.run import checkpoint, recovery
from harness.run.folder import PROBE_FILE, Run, open_run
from harness.run.log import RESULT, verdict
from harness.run.progress import Progress, after_epoch, should_stop
from harness.run.state import changes, note_start
from harness.training.cache import open_cache
from harness.training.check import Check, refuse_failures
from harness.training.efficiency import describe_mfu, efficiency
from harness.training.epoch import EpochStats, train_epoch
from harness.training.machine import versions
from harness.training.memory import out_of_memory_explained
from harness.training.preflight import preflight
from harness.training.state import Data, TrainState, assert_finite_weights, build_or_resume, save_checkpoint

SHOWN = ("loss", "accuracy", "balanced_accuracy", "macro_f1")


def train(config: Config, world: World) -> str:
    """Collective: train, validate each epoch, stop, evaluate; or continue a run that is there.

    Returns:
        `finished`, or `stopped` when somebody asked for it: then the same call continues.

    Raises:
        ValueError, OSError: settings, data, weights or a run folder that do not fit, or a rank that is gone; each says
            what to do.
        FloatingPointError: the loss became NaN or Inf, or fp16 skips too many steps.
        MemoryError: a rank ran out of memory.
    """
    checks, data = preflight(config, world)
    world.run_on_main(refuse_failures, checks)  # once, not by each rank
    assert data is not None
    with open_run(config, world, data.dataset) as run, out_of_memory_explained(config, world):
        world.run_on_main(refuse_probe, run.folder)
        if run.is_finished():
            return report_again(world, run)
        state, progress = build_or_resume(config, world, data, run)
        announce(config, world, data, run, progress, checks)
        data = replace(data, decoded=open_cache(config, world, data.train))
        epochs: list[EpochStats] = []
        while (stop_reason := should_stop(progress, config.run.epochs, config.run.patience)) is None:
            if world.any_rank(run.stop.asked()):  # also in the warm-up, before the first step
                return stopped(config, world, data, run, progress, epochs)
            progress, stats = train_epoch(config, world, data, state, run, progress)
            epochs.append(stats)
            if progress.samples_seen == data.plan.n_batches * data.plan.global_batch:
                ended = validate_and_save(config, world, data, state, run, progress, stats)
                if ended is None:  # asked to stop while it validated: the validation comes again
                    save_checkpoint(config, world, state, run, progress)
                    return stopped(config, world, data, run, progress, epochs)
                progress = ended
            elif stats.stop_requested:
                return stopped(config, world, data, run, progress, epochs)
        end_training(config, world, data, run, progress, epochs, stop_reason)
        return evaluate_best(config, world, data, state.model, run, progress)


def refuse_probe(folder: Path) -> None:
    """Refuse a folder with the results of a linear probe, whose settings are those of a training.

    Raises:
        ValueError: naming it.
    """
    if (folder / PROBE_FILE).is_file():
        raise ValueError(f"{folder} holds a linear probe. Name another --run.folder for the training.")


def report_again(world: World, run: Run) -> str:
    """Collective: the results of a run that was finished before."""
    world.print(f"{run.folder} is finished. Its results again; to train anew, name another --run.folder.")
    world.print("\n" + summary(world.run_on_main(read_results, run.folder)))
    return "finished"


def announce(config: Config, world: World, data: Data, run: Run, progress: Progress, checks: list[Check]) -> None:
    """Collective: say what is about to be trained on what, and open the log."""
    dataset, plan = data.dataset, data.plan
    world.print(
        f"{sum(plan.shard_sizes)} training images, {plan.n_batches} batches of {plan.global_batch} an epoch "
        f"({plan.describe()}); {sum(data.val.shard_sizes)} validation images; dataset {dataset.fingerprint[:12]}"
    )
    if config.augment.mean != "auto" or config.augment.std != "auto":
        mean, std = (", ".join(f"{value:g}" for value in values) for values in config.augment.normalization)
        world.print(f"images are normalised by mean {mean} and standard deviation {std}")
    for warning in dataset.description.warnings:
        world.warn(warning)
    for check in checks:
        if check.level == "warn":
            world.warn(f"{check.message}. To fix it: {check.fix}.")
    world.start_trackers(config.run.trackers, run.folder, flat(config))
    board, in_epoch = "tensorboard" in config.run.trackers, progress.samples_seen > 0
    run.log.start(run.folder, progress.step, world.is_main, board, world.track, in_epoch)
    run.write_state("running", progress)
    facts = {"step": progress.step, "world": world.describe(), "who": world.host_pid, "versions": versions()}
    world.run_on_main(note_start, run.folder, facts)


def validate_and_save(
    config: Config, world: World, data: Data, state: TrainState, run: Run, progress: Progress, stats: EpochStats
) -> Progress | None:
    """Collective: validate, keep the best weights and a checkpoint, and log; None if somebody asked to stop meanwhile."""
    world.run_on_main(assert_finite_weights, state.model, progress)
    scores = validate(state.eval_model, data.val, config, world, run.stop.asked)
    if scores is None:
        return None
    monitor = config.run.monitor
    score = progress.epoch + 1.0 if monitor == "last" else scores[monitor]
    ended = world.run_on_main(after_epoch, progress, score, HIGHER_IS_BETTER[monitor])
    images = max(1.0, progress.images)  # none, if each was skipped
    loss, accuracy = progress.loss / images, progress.correct / images
    run.log.write("val", ended.step, {name: scores[name] for name in SHOWN})
    speed = {"lr": stats.lr, "images_per_s": stats.images_per_s, "waited": stats.waited}
    used = efficiency(config, world, len(data.dataset.classes), stats.images_per_s)
    speed |= {name: value for name, value in used.items() if name != "mfu" or not stats.is_frozen}  # of whole passes
    run.log.write("epoch", ended.step, {"epoch": ended.epoch, "loss": loss, "accuracy": accuracy} | speed)
    world.print(
        f"epoch {ended.epoch:>3}/{config.run.epochs}  train loss {loss:.3f} acc {accuracy:.3f}  val loss "
        f"{scores['loss']:.3f} acc {scores['accuracy']:.3f} bal {scores['balanced_accuracy']:.3f} f1 "
        f"{scores['macro_f1']:.3f}  lr {stats.lr:.1e}  {stats.speed}"
        + (f"  {progress.skipped_steps} steps skipped (fp16)" if progress.skipped_steps else "")
        + ("  best" if ended.best_step == ended.step and monitor != "last" else "")
    )
    save_checkpoint(config, world, state, run, ended)
    return ended


def end_training(
    config: Config, world: World, data: Data, run: Run, progress: Progress, epochs: list[EpochStats], reason: str
) -> None:
    """Collective: wait for checkpoints, and say why training ended and what limited it."""
    world.run_on_main(run.writer.wait)
    say_verdict(config, world, data, epochs)
    kept = f"the weights of epoch {progress.best_epoch} are kept"
    if config.run.monitor != "last" and progress.best is not None:
        kept = f"best epoch {progress.best_epoch}, {config.run.monitor} {progress.best:.4f}"
    world.print(f"training ends: {reason}; {kept}")


def stopped(config: Config, world: World, data: Data, run: Run, progress: Progress, epochs: list[EpochStats]) -> str:
    """Collective: leave a run that was asked to stop; all that counts is saved."""
    world.run_on_main(run.writer.wait)
    say_verdict(config, world, data, epochs)
    return run.stopped(progress)


def say_verdict(config: Config, world: World, data: Data, epochs: list[EpochStats]) -> None:
    """Say what limited the epochs of this process."""
    if seconds := sum(stats.seconds for stats in epochs):
        waited, first = sum(stats.waited_s for stats in epochs), sum(stats.waited_first_s for stats in epochs)
        threads = decode_threads(config.data.threads)
        images_per_s = sum(stats.images_per_s * stats.seconds for stats in epochs) / seconds
        whole = not any(stats.is_frozen for stats in epochs)
        used = describe_mfu(config, world, len(data.dataset.classes), images_per_s) if whole else ""
        world.print(verdict(waited / seconds, first / seconds, threads, available_cores()) + used)


def evaluate_best(config: Config, world: World, data: Data, model: nn.Module, run: Run, progress: Progress) -> str:
    """Collective: evaluate the best weights of a run; `finished`, or `stopped` if somebody asked meanwhile."""
    best = world.run_on_main(recovery.find_best, run.folder, progress)
    recovery.refuse_other_copies(best.folder, world)
    checkpoint.load_model(best, model)
    prior = class_priors(config.optim, data.dataset.description.counts["train"])
    context = EvalContext(best, changes(run.folder), prior, data.val, (run.provenance.train_groups,))
    member = Member(str(run.folder), model, config, data.dataset.classes)
    results = evaluate([member], data.test, world, run.folder, context, run.stop.asked)
    if results is None:
        return run.stopped(progress)
    scores = {"split": config.eval.split} | {name: results.tta[name] for name in SHOWN}
    run.log.write(RESULT, progress.step, scores)
    run.log.flush()
    run.write_state("finished", progress)
    world.print("\n" + summary(results))
    world.print(f"run folder: {run.folder}")
    return "finished"
