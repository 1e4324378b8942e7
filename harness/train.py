"""The story of a run, top to bottom.

In: a `Config` and a `World`. Out: a run folder. What stays true: the weights after step k depend on the settings, the
dataset and k, not on how often the run was interrupted; rank 0 decides when to stop and what is best.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint
from harness.augment import parse_views, stream_checksum, training_view
from harness.config import Config
from harness.evaluate import evaluate, summary, validate
from harness.hardware import decode_threads, own_cores
from harness.loader import Reading, training_batches
from harness.log import Log, verdict
from harness.metrics import HIGHER_IS_BETTER
from harness.model import build_model, check_model, load_weights
from harness.optim import build_optimizer, loss_sum, lr_at
from harness.progress import Progress, advance, should_stop, train_on
from harness.run_folder import failure_noted, find_start, finished_metrics, open_run, write_state
from harness.signals import StopRequest
from harness.world import World
from shards.index import load, load_groups, refuse_leak
from shards.plan import Plan, share
from shards.store import Store

SHOWN = ("loss", "accuracy", "balanced_accuracy", "macro_f1")


@dataclass(frozen=True)
class Session:
    """What stays the same while a run trains in this process."""

    config: Config
    world: World
    folder: Path
    plan: Plan
    training: Store
    validation: Store
    model: nn.Module  # as built
    wrapped: nn.Module  # the same weights, with gradients averaged over ranks
    optimizer: torch.optim.Optimizer
    origin: checkpoint.Origin
    stop: StopRequest
    log: Log


@dataclass(frozen=True)
class Pace:
    """How an epoch went: last learning rate, images/s, share of its seconds waiting for data, and whether to stop."""

    lr: float
    images_per_s: float
    waited: float
    seconds: float
    stop_asked: bool


def train(config: Config, world: World) -> str:
    """Collective: train, validate each epoch, stop, evaluate; or continue a run that is there.

    Returns:
        `finished`, or `stopped` when somebody asked for it: then the same call continues.

    Raises:
        ValueError, OSError: settings, data, weights or a run folder that do not fit; each says what to do.
        FloatingPointError: the loss is no number any more.
    """
    folder = Path(config.run.folder)
    world.on_main(_check, config, world.size)  # what is wrong is said once, not by each rank
    dataset = load(config.data.path)
    training, validation, final = (Store(dataset, name) for name in ("train", "val", config.eval.split))
    plan = _plan(config, training)
    world.on_main(open_run, folder, config, dataset)
    if metrics := world.on_main(finished_metrics, folder):
        world.print(f"{folder} is finished. Its results again; to train anew, name another --run.folder.")
        world.print("\n" + summary(metrics))
        return "finished"

    with StopRequest(folder) as stop, failure_noted(folder, world.rank):
        torch.manual_seed(config.run.seed)
        model = build_model(config.model.name, len(dataset.classes))
        start = world.on_main(find_start, folder, dataset)
        if start is None:
            # On rank 0 alone: wrapping the model sends its weights to the others.
            world.print(world.on_main(load_weights, model, config.model.name, config.model.weights))
        model.to(world.device, memory_format=torch.channels_last)
        wrapped, optimizer = world.prepare(model, build_optimizer(model, config.optim))
        progress = Progress()
        if start is not None:
            checkpoint.restore(start, model, optimizer, world.scaler)
            progress = start.progress
            world.print(f"continuing {folder} at epoch {progress.epoch + 1}, step {progress.step}")
        world.print(
            f"{sum(plan.shard_sizes)} training images, {plan.n_batches} batches of {plan.global_batch} an epoch "
            f"({plan.n_left_out} left for other epochs); {sum(validation.shard_sizes)} validation images; "
            f"dataset {dataset.fingerprint[:12]}"
        )
        for warning in dataset.description.warnings:
            world.print(f"warning: {warning}")
        origin = checkpoint.Origin(
            config.model.name, dataset.classes, dataset.fingerprint, load_groups(dataset, "train")
        )

        with Log(folder, progress.step, world.is_main) as log:
            session = Session(
                *(config, world, folder, plan, training, validation), *(model, wrapped, optimizer, origin, stop, log)
            )
            world.on_main(write_state, folder, "running", progress)
            paces = []
            while (over := should_stop(progress, config.run.epochs, config.run.patience)) is None:
                progress, pace = _train_epoch(session, progress)
                paces.append(pace)
                if progress.samples_seen == plan.n_batches * plan.global_batch:
                    progress = _end_epoch(session, progress, pace)
                if pace.stop_asked:
                    world.on_main(write_state, folder, "stopped", progress)
                    world.print(f"stopped as asked at step {progress.step}; the same command continues")
                    return "stopped"

            shown = f"best epoch {progress.best_epoch}, {config.run.monitor} {progress.best:.4f}"
            world.print(f"training ends: {over}; {shown}")
            if seconds := sum(pace.seconds for pace in paces):
                waited = sum(pace.waited * pace.seconds for pace in paces) / seconds
                world.print(verdict(waited, decode_threads(config.data.threads), own_cores()))
            best = checkpoint.best(folder, progress)
            checkpoint.load_model(best, model)
            metrics = evaluate(model, final, config.eval.split, config, world, folder, best)
            log.write(config.eval.split, progress.step, {name: metrics["tta"][name] for name in SHOWN})
            world.on_main(write_state, folder, "finished", progress)
            world.print("\n" + summary(metrics))
            world.print(f"run folder: {folder}")
    return "finished"


def _check(config: Config, n_ranks: int) -> None:
    """Refuse what cannot be trained, before anything is written."""
    dataset = load(config.data.path)
    for name in ("val", config.eval.split):
        dataset.split(name)
    parse_views(config.eval.views)
    share(_plan(config, Store(dataset, "train")).global_batch, 0, n_ranks)  # refuses more ranks than images
    if not config.data.allow_leak:
        refuse_leak(dataset)
    check_model(config.model.name, len(dataset.classes), config.data.image_size)


def _plan(config: Config, training: Store) -> Plan:
    data = config.data
    return Plan(training.shard_sizes, data.batch_size, config.run.seed, data.lanes, data.block_shards)


def _train_epoch(session: Session, progress: Progress) -> tuple[Progress, Pace]:
    """Train to the end of the epoch, or until somebody asks to stop."""
    config, world, plan, log = session.config, session.world, session.plan, session.log
    seed, size = config.run.seed, config.data.image_size
    began = saved = time.perf_counter()
    trained, waited, steps, stop_asked = 0.0, 0.0, 0, False
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, correct, images, samples since the last log
    first = progress.samples_seen // plan.global_batch
    skipped = [] if config.data.on_bad_sample == "skip" else None
    reading = Reading(decode_threads(config.data.threads), config.data.batches_ahead, world.device, skipped)
    batches = training_batches(session.training, plan, progress.epoch, first, world.rank, world.size, reading)
    log.begin_bar(f"epoch {progress.epoch + 1}", plan.n_batches * plan.global_batch, progress.samples_seen)
    session.model.train()
    for number, batch in enumerate(batches, start=first):
        step = progress.step + steps
        lr = lr_at(step, config.optim, plan.n_batches, config.run.epochs)
        torch.manual_seed(seed + step)  # dropout is a function of the step
        views = training_view(batch.images, batch.positions, progress.epoch, seed, config.augment, size)
        sums[:3] += optimizer_step(config, world, session.wrapped, session.optimizer, views, batch.labels, lr)
        sums[3] += stream_checksum(batch.keys, batch.positions)
        steps, waited = steps + 1, waited + batch.waited
        is_last = number + 1 == plan.n_batches
        if steps < config.run.log_every and not is_last:
            continue
        # Here the ranks meet: sums over the interval, and whether any of them was asked to stop. (Device sync.)
        due = world.is_main and time.perf_counter() - saved > 60 * config.run.save_every_minutes
        asked = torch.tensor([session.stop.requested, due], dtype=torch.float64, device=world.device)
        loss, correct, images, samples, stop_asked, save_asked = world.sum(torch.cat([sums, asked])).tolist()
        if not abs(loss) < float("inf"):  # also when it is no number
            raise FloatingPointError(f"The loss became {loss} by step {step + 1}. Lower optim.lr (now {lr:.1e}).")
        progress = train_on(progress, steps, steps * plan.global_batch, loss, correct, images)
        trained, steps = trained + images, 0
        sums.zero_()
        speed = trained / (time.perf_counter() - began)
        images = max(1.0, images)  # none, if each was skipped
        numbers = {"loss": loss / images, "accuracy": correct / images, "lr": lr, "images_per_s": speed}
        log.write("train", progress.step, numbers | {"samples": f"{int(samples):014x}"})
        log.move_bar(int(images), loss=f"{loss / images:.3f}", accuracy=f"{correct / images:.3f}")
        if (stop_asked or save_asked) and not is_last:
            _save(session, progress)
            saved = time.perf_counter()
        if stop_asked:
            break
    batches.close()
    log.end_bar()
    seconds = time.perf_counter() - began
    if skipped:
        keys = ", ".join(f"{key:08d}" for key in skipped[:10])
        print(
            f"warning: rank {world.rank} skipped {len(skipped)} samples that cannot be decoded, keys {keys}", flush=True
        )
    return progress, Pace(lr, trained / seconds, waited / seconds, seconds, bool(stop_asked))


def optimizer_step(
    config: Config, world: World, wrapped: nn.Module, optimizer, views: torch.Tensor, labels: torch.Tensor, lr: float
) -> torch.Tensor:
    """One optimizer step on this rank's share of a batch.

    Args:
        views: (b, 3, S, S) float32. labels: (b,) int64, -1 counts for nothing.

    Returns:
        this rank's (sum of losses, correct predictions, images), float64, on the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = -(-len(views) // (config.optim.micro_batch or len(views)))
    pieces = list(zip(views.tensor_split(parts), labels.tensor_split(parts), strict=True))
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for number, (pictures, truth) in enumerate(pieces, start=1):
        with nullcontext() if number == len(pieces) else world.without_sync(wrapped):
            logits = wrapped(pictures)
            loss = loss_sum(logits, truth, config.optim)
            # Gradients are averaged over ranks: times the world's size, over the global batch, makes that the true mean.
            world.backward(loss * world.size / config.data.batch_size)
        sums += torch.stack([loss.detach(), (logits.argmax(1) == truth).sum(), (truth >= 0).sum()])
    optimizer.step()
    optimizer.zero_grad()
    return sums


def _end_epoch(session: Session, progress: Progress, pace: Pace) -> Progress:
    """Validate, keep the best weights and a checkpoint, and tell."""
    config, world, log = session.config, session.world, session.log
    scores = validate(session.model, session.validation, config, world)
    monitor = config.run.monitor
    ended = world.on_main(advance, progress, scores[monitor], HIGHER_IS_BETTER[monitor])
    images = max(1.0, progress.images)  # none, if each was skipped
    loss, accuracy = progress.loss / images, progress.correct / images
    log.write("val", ended.step, {name: scores[name] for name in SHOWN})
    speed = {"lr": pace.lr, "images_per_s": pace.images_per_s, "waited": pace.waited}
    log.write("epoch", ended.step, {"epoch": ended.epoch, "loss": loss, "accuracy": accuracy} | speed)
    is_best = ended.best_step == ended.step
    world.print(
        f"epoch {ended.epoch:>3}/{config.run.epochs}  train loss {loss:.3f} acc {accuracy:.3f}  val loss "
        f"{scores['loss']:.3f} acc {scores['accuracy']:.3f} bal {scores['balanced_accuracy']:.3f} f1 "
        f"{scores['macro_f1']:.3f}  lr {pace.lr:.1e}  {pace.images_per_s:.0f} img/s  wait {pace.waited:.0%}"
        + ("  best" if is_best else "")
    )
    if is_best:
        world.on_main(checkpoint.save_best, session.folder, ended, session.origin, session.model)
    _save(session, ended)
    return ended


def _save(session: Session, progress: Progress) -> None:
    """Collective: a checkpoint of this moment, after the log of it."""
    world, log, optimizer = session.world, session.log, session.optimizer
    world.broadcast_buffers(session.model)

    def write() -> None:
        log.flush()
        keep, origin = session.config.run.keep, session.origin
        checkpoint.save_step(session.folder, progress, origin, session.model, optimizer, world.scaler, keep)
        write_state(session.folder, "running", progress)

    world.on_main(write)
