"""The story of a run, top to bottom.

In: a `Config` and a `World`. Out: a run folder. What stays true: the weights after step k depend on the settings, the
dataset and k, not on how often the run was interrupted; rank 0 decides when to stop and what is best.
"""

from dataclasses import replace
from pathlib import Path

import torch

from harness.config import Config, flat
from harness.data.augment import parse_views
from harness.distributed.hardware import available_cores, check_compile, decode_threads
from harness.distributed.world import World, check_trackers
from harness.evaluation.calibration import class_priors
from harness.evaluation.evaluate import EvalContext, evaluate, save_evaluation
from harness.evaluation.metrics import HIGHER_IS_BETTER
from harness.evaluation.predict import validate
from harness.evaluation.results import read_results
from harness.limits import check_classes
from harness.model.build import build_model, check_model, load_weights
from harness.model.optim import EMA, Loss, build_optimizer
from harness.report.text import summary
from harness.run import checkpoint
from harness.run.folder import changes, failure_noted, find_start, finished_metrics, note_start, open_run, write_state
from harness.run.lock import RunLock
from harness.run.log import RESULT, Log, verdict
from harness.run.mirror import CheckpointMirror
from harness.run.progress import Progress, after_epoch, should_stop
from harness.run.stop import StopRequest
from harness.training.epoch import EpochStats, Session, assert_finite_weights, mix_group_size, save, train_epoch
from harness.training.preflight import check_consistency, check_device, check_disk, check_recipe, refuse, versions
from shards.index import Dataset, load
from shards.leaks import load_groups, refuse_leak
from shards.plan import BalancedPlan, Plan, rank_slice
from shards.reader import SplitReader

SHOWN = ("loss", "accuracy", "balanced_accuracy", "macro_f1")


def train(config: Config, world: World) -> str:
    """Collective: train, validate each epoch, stop, evaluate; or continue a run that is there.

    Returns:
        `finished`, or `stopped` when somebody asked for it: then the same call continues.

    Raises:
        ValueError, OSError: settings, data, weights or a run folder that do not fit, or a rank that is gone; each says
            what to do.
        FloatingPointError: the loss is no number any more.
    """
    folder = Path(config.run.folder)
    world.run_on_main(_check, config, world.size, world.device)  # what is wrong is said once, not by each rank
    dataset = load(config.data.path)
    refuse(check_device())
    world.run_on_main(refuse, check_consistency(world, dataset))
    counts = dataset.description.counts["train"]
    training, validation, final = (SplitReader(dataset, name) for name in ("train", "val", config.eval.split))
    plan = _plan(config, training)
    with (
        RunLock(folder) as lock,
        StopRequest(folder, config.run.time_limit_minutes) as stop,
        CheckpointMirror(folder, config.run.checkpoint_dir) as mirror,
    ):
        world.run_on_main(open_run, folder, config, dataset, lock)
        world.run_on_main(stop.forget_old_file)
        if world.run_on_main(finished_metrics, folder):
            world.print(f"{folder} is finished. Its results again; to train anew, name another --run.folder.")
            world.print("\n" + summary(world.run_on_main(read_results, folder)))
            return "finished"
        with failure_noted(folder, world):
            world.run_on_main(mirror.sync_on_start)
            torch.manual_seed(config.run.seed)
            model = build_model(config.model.name, len(dataset.classes))
            start = world.run_on_main(find_start, folder, dataset)
            if start is None:
                # On rank 0 alone: wrapping the model sends its weights to the others.
                world.print(world.run_on_main(load_weights, model, config.model.name, config.model.weights))
            if config.model.sync_batchnorm:
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            model.to(world.device, memory_format=world.memory_format)
            average = EMA(model, config.optim.ema) if config.optim.ema else None  # copied before it is wrapped
            ddp_model, optimizer = world.prepare(model, build_optimizer(model, config.optim), config.run.compile)
            provenance = _origin(config, dataset)
            progress = Progress()
            if start is not None:
                checkpoint.restore(start, model, optimizer, world.scaler, average and average.model)
                if average:
                    average.mark_restored()
                progress = _continue(start, provenance, world)
                world.print(f"continuing {folder} at epoch {progress.epoch + 1}, step {progress.step}")
            world.print(
                f"{sum(plan.shard_sizes)} training images, {plan.n_batches} batches of {plan.global_batch} an epoch "
                f"({plan.note}); {sum(validation.shard_sizes)} validation images; "
                f"dataset {dataset.fingerprint[:12]}"
            )
            for warning in dataset.description.warnings:
                world.print(f"warning: {warning}")
            for check in check_recipe(config, model, plan.n_batches, world.size, dataset.description.size):
                world.print(f"warning: {check.message}. To mend it: {check.fix}.")

            world.begin_trackers(config.run.trackers, folder, flat(config))
            board = "tensorboard" in config.run.trackers
            with Log(folder, progress.step, world.is_main, board, world.track) as log:
                session = Session(
                    *(config, world, folder, plan, training, validation, model, ddp_model, average),
                    *(Loss(config.optim, counts, world.device), optimizer, provenance, stop, lock, mirror, log),
                )
                world.run_on_main(write_state, folder, "running", progress)
                facts = {
                    "step": progress.step,
                    "world": world.describe(),
                    "who": world.host_pid,
                    "versions": versions(),
                }
                world.run_on_main(note_start, folder, facts)
                progress, over = _train(session, progress)
                if over is None:
                    return _stopped(session, progress)
                world.print(
                    f"training ends: {over}; best epoch {progress.best_epoch}, {config.run.monitor} {progress.best:.4f}"
                )
                best = checkpoint.find_best(folder, progress)
                checkpoint.load_model(best, model)
                context = EvalContext(best, changes(folder), class_priors(config.optim, counts), validation)
                evaluation = evaluate(model, final, config, world, context, stop.asked)
                if evaluation is None:
                    return _stopped(session, progress)
                world.run_on_main(save_evaluation, folder, evaluation)
                scores = {"split": config.eval.split} | {name: evaluation.results.tta[name] for name in SHOWN}
                log.write(RESULT, progress.step, scores)
                log.flush()
                world.run_on_main(write_state, folder, "finished", progress)
        world.print("\n" + summary(evaluation.results))
        world.print(f"run folder: {folder}")
    return "finished"


def _train(session: Session, progress: Progress) -> tuple[Progress, str | None]:
    """Epochs until training is over, and why it is; None if somebody asked to stop. All that counts is saved then."""
    config, world, plan = session.config, session.world, session.plan
    epochs = []
    while (over := should_stop(progress, config.run.epochs, config.run.patience)) is None:
        if world.any_rank(session.stop.asked()):  # also in the warm-up, before the first step
            break
        progress, stats = train_epoch(session, progress)
        epochs.append(stats)
        if progress.samples_seen == plan.n_batches * plan.global_batch:
            ended = _end_epoch(session, progress, stats)
            if ended is None:  # while it validated: nothing is lost of the epoch, and its validation comes again
                save(session, progress)
                break
            progress = ended
        elif stats.stop_asked:
            break
    world.run_on_main(session.mirror.wait)
    if seconds := sum(stats.seconds for stats in epochs):
        waited, first = sum(stats.waited_s for stats in epochs), sum(stats.waited_first_s for stats in epochs)
        world.print(verdict(waited / seconds, first / seconds, decode_threads(config.data.threads), available_cores()))
    return progress, over


def _stopped(session: Session, progress: Progress) -> str:
    def note() -> str:
        reason = session.stop.reason or "another process was asked"
        write_state(session.folder, "stopped", progress, reason)
        session.stop.file.unlink(missing_ok=True)  # the next start is not asked to stop
        return reason

    reason = session.world.run_on_main(note)
    session.world.print(f"stopped as asked ({reason}) at step {progress.step}; the same command continues")
    return "stopped"


def _origin(config: Config, dataset: Dataset) -> checkpoint.Provenance:
    data = config.data
    order = f"batches of {data.global_batch_size}, {data.lanes} lanes, blocks of {data.shuffle_block_shards}, seed {config.run.seed}"
    order += ", classes equally often" if config.optim.balance == "sampler" else ""
    return checkpoint.Provenance(
        config.model.name, dataset.classes, dataset.fingerprint, load_groups(dataset, "train"), order
    )


def _continue(start: checkpoint.Checkpoint, provenance: checkpoint.Provenance, world: World) -> Progress:
    """How far a run is, from its checkpoint; in another order of samples, the epoch that was begun starts over."""
    if start.provenance.order == provenance.order or not start.progress.samples_seen:
        return start.progress
    world.print(
        f"the order of samples changed ({start.provenance.order}; now {provenance.order}): epoch {start.progress.epoch + 1} starts over"
    )
    return replace(start.progress, samples_seen=0, loss=0.0, correct=0.0, images=0.0)


def _check(config: Config, n_ranks: int, device: torch.device) -> None:
    """Refuse what cannot be trained, before anything is written."""
    if config.model.sync_batchnorm and device.type != "cuda":
        raise ValueError("'model.sync_batchnorm' needs GPUs: torch has it for no other device. Set it to false.")
    if config.run.compile:
        check_compile(device)
    dataset = load(config.data.path)
    for name in ("val", config.eval.split):
        dataset.split(name)
    parse_views(config.eval.views)
    check_trackers(config.run.trackers)
    rank_slice(
        _plan(config, SplitReader(dataset, "train")).global_batch, 0, n_ranks, mix_group_size(config)
    )  # refuses too many ranks
    check_classes(flat(config), dataset.description.counts["train"])
    if not config.data.allow_leak:
        refuse_leak(dataset)
    check_model(config.model.name, len(dataset.classes), config.data.image_size)
    if config.eval.image_size:
        check_model(config.model.name, len(dataset.classes), config.eval.image_size, "eval.image_size")
    refuse(check_disk(config, len(dataset.classes)))


def _plan(config: Config, training: SplitReader) -> Plan:
    data = config.data
    numbers = (training.shard_sizes, data.global_batch_size, config.run.seed, data.lanes, data.shuffle_block_shards)
    if config.optim.balance == "sampler":
        return BalancedPlan(*numbers, lambda shard: training.table(shard).label)
    return Plan(*numbers)


def _end_epoch(session: Session, progress: Progress, stats: EpochStats) -> Progress | None:
    """Validate, keep the best weights and a checkpoint, and tell; None if somebody asked to stop meanwhile."""
    config, world, log = session.config, session.world, session.log
    world.run_on_main(assert_finite_weights, session.model, progress)
    scores = validate(session.eval_model, session.validation, config, world, session.stop.asked)
    if scores is None:
        return None
    monitor = config.run.monitor
    ended = world.run_on_main(after_epoch, progress, scores[monitor], HIGHER_IS_BETTER[monitor])
    images = max(1.0, progress.images)  # none, if each was skipped
    loss, accuracy = progress.loss / images, progress.correct / images
    log.write("val", ended.step, {name: scores[name] for name in SHOWN})
    speed = {"lr": stats.lr, "images_per_s": stats.images_per_s, "waited": stats.waited}
    log.write("epoch", ended.step, {"epoch": ended.epoch, "loss": loss, "accuracy": accuracy} | speed)
    world.print(
        f"epoch {ended.epoch:>3}/{config.run.epochs}  train loss {loss:.3f} acc {accuracy:.3f}  val loss "
        f"{scores['loss']:.3f} acc {scores['accuracy']:.3f} bal {scores['balanced_accuracy']:.3f} f1 "
        f"{scores['macro_f1']:.3f}  lr {stats.lr:.1e}  {stats.images_per_s:.0f} img/s  wait {stats.waited:.0%}"
        + ("  best" if ended.best_step == ended.step else "")
    )
    save(session, ended)
    return ended
