"""One epoch of training: batches in, steps of the optimizer, meetings of the ranks.

In: a `Session` and how far it is. Out: how far it is then, and how the epoch went. What stays true: the ranks meet at the
same steps, and between the meetings nothing waits for the device; nothing is saved that is not finite.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harness.config import Config
from harness.data.augment import mix, stream_checksum, training_view
from harness.data.loader import LoaderOptions, training_batches
from harness.distributed.hardware import decode_threads
from harness.distributed.world import World
from harness.model.optim import EMA, Loss, Targets, lr_at, mixed_targets
from harness.run import checkpoint
from harness.run.folder import write_state
from harness.run.lock import RunLock
from harness.run.log import Log
from harness.run.mirror import CheckpointMirror
from harness.run.progress import Progress, after_steps
from harness.run.stop import StopRequest
from shards.plan import Plan
from shards.reader import SplitReader


@dataclass(frozen=True)
class Session:
    """What stays the same while a run trains in this process."""

    config: Config
    world: World
    folder: Path
    plan: Plan
    training: SplitReader
    validation: SplitReader
    model: nn.Module  # as built
    ddp_model: nn.Module  # the same weights, with gradients averaged over ranks
    average: EMA | None  # of the weights over steps
    loss: Loss
    optimizer: torch.optim.Optimizer
    provenance: checkpoint.Provenance
    stop: StopRequest
    lock: RunLock
    mirror: CheckpointMirror
    log: Log

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated, and whose best weights are kept."""
        if self.average is None:
            return self.model
        self.average.copy_buffers(self.model)
        return self.average.model


@dataclass(frozen=True)
class EpochStats:
    """How an epoch went: last learning rate, images/s, its seconds, those waiting for data, and whether to stop.

    waited_first_s: the part of `waited_s` for the first batch, which nothing was done for before the epoch began.
    """

    lr: float
    images_per_s: float
    seconds: float
    waited_s: float
    waited_first_s: float
    stop_asked: bool

    @property
    def waited(self) -> float:
        """Share of the seconds that the loop stood still for data."""
        return self.waited_s / self.seconds


def train_epoch(session: Session, progress: Progress) -> tuple[Progress, EpochStats]:
    """Collective: train to the end of the epoch, or until somebody asks to stop.

    Raises:
        FloatingPointError: the loss is no number any more.
        ValueError, OSError: a sample that cannot be read, a checkpoint that cannot be saved.
    """
    config, world, plan, log = session.config, session.world, session.plan, session.log
    seed, size = config.run.seed, config.data.image_size
    began = saved = met = time.perf_counter()
    trained, waited, waited_first, steps, stop_asked, interval = 0.0, 0.0, 0.0, 0, False, []
    lr = lr_at(max(0, progress.step - 1), config.optim, plan.n_batches, config.run.epochs)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, correct, images, samples since the last log
    first = progress.samples_seen // plan.global_batch
    skipped = [] if config.data.on_bad_sample == "skip" else None
    options = LoaderOptions(decode_threads(config.data.threads), config.data.prefetch_batches, world.device, skipped)
    group_size = mix_group_size(config)
    batches = training_batches(
        session.training, plan, progress.epoch, first, world.rank, world.size, options, group_size
    )
    log.begin_bar(f"epoch {progress.epoch + 1}", plan.n_batches * plan.global_batch, progress.samples_seen)
    session.model.train()
    for number, batch in enumerate(batches, start=first):
        step = progress.step + steps
        lr = lr_at(step, config.optim, plan.n_batches, config.run.epochs)
        torch.manual_seed(seed + step)  # dropout is a function of the step
        views = training_view(batch.images, batch.positions, progress.epoch, seed, config.augment, size)
        truth = Targets(batch.labels)
        if group_size > 1:
            views, shares = mix(views, batch.positions, progress.epoch, seed, config.augment)
            truth = mixed_targets(batch.labels, shares)
        counts, of_images = optimizer_step(
            config, world, session.ddp_model, session.optimizer, views, truth, session.loss, lr
        )
        if session.average:
            session.average.update(session.model, step + 1)
        sums[:3] += counts
        sums[3] += stream_checksum(batch.keys, batch.positions)
        interval.append((batch.keys, of_images))
        steps, waited = steps + 1, waited + batch.waited
        waited_first = waited if number == first else waited_first
        is_last = number + 1 == plan.n_batches
        if steps < config.run.sync_every and not is_last:
            continue
        # Here the ranks meet: sums over the interval, and whether any of them was asked to stop. (Device sync.)
        due = world.is_main and time.perf_counter() - saved > 60 * config.run.save_every_minutes
        asked = torch.tensor([session.stop.asked(), due], dtype=torch.float64, device=world.device)
        loss, correct, images, samples, stop_asked, save_asked = world.all_reduce_sum(torch.cat([sums, asked])).tolist()
        if not abs(loss) < float("inf"):  # also when it is no number
            raise FloatingPointError(_describe_nan_loss(session, progress, interval, lr))
        if progress.step == 0 and time.perf_counter() - met > 20 and not config.run.compile:  # compiling is slow, once
            world.print(
                f"note: {steps} steps take {time.perf_counter() - met:.0f} s, and requests to stop are noticed as rarely: "
                "lower run.sync_every"
            )
        progress = after_steps(progress, steps, steps * plan.global_batch, loss, correct, images)
        trained, steps, interval = trained + images, 0, []
        sums.zero_()
        speed = trained / (time.perf_counter() - began)
        images = max(1.0, images)  # none, if each was skipped
        numbers = {"loss": loss / images, "accuracy": correct / images, "lr": lr, "images_per_s": speed}
        log.write("train", progress.step, numbers | {"samples": f"{int(samples):014x}"})
        log.move_bar(int(images), loss=f"{loss / images:.3f}", accuracy=f"{correct / images:.3f}")
        if (stop_asked or save_asked) and not is_last:
            save(session, progress)
            saved = time.perf_counter()
        if stop_asked:
            break
    batches.close()
    log.end_bar()
    seconds = max(1e-9, time.perf_counter() - began)
    if skipped:
        keys = ", ".join(f"{key:08d}" for key in skipped[:10])
        print(
            f"warning: rank {world.rank} skipped {len(skipped)} samples that cannot be decoded, keys {keys}", flush=True
        )
    return progress, EpochStats(lr, trained / seconds, seconds, waited, waited_first, bool(stop_asked))


def mix_group_size(config: Config) -> int:
    """How many neighbours of the stream are mixed, and so must be on one rank: 2, or 1 for none."""
    return 2 if config.augment.mixup_prob or config.augment.cutmix_prob else 1


def optimizer_step(
    config: Config,
    world: World,
    ddp_model: nn.Module,
    optimizer,
    views: torch.Tensor,
    truth: Targets,
    loss: Loss,
    lr: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on this rank's share of a batch.

    Args:
        views: (b, 3, S, S) float32. truth: of b pictures.

    Returns:
        this rank's (sum of losses, correct predictions, images), float64, and the loss of each image, (b,) float32; all on
        the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    parts = -(-len(views) // (config.optim.micro_batch or len(views)))
    pieces = list(zip(views.tensor_split(parts), truth.split(parts), strict=True))
    sums, of_images = torch.zeros(3, dtype=torch.float64, device=world.device), []
    for number, (pictures, shown) in enumerate(pieces, start=1):
        with nullcontext() if number == len(pieces) else world.without_sync(ddp_model):
            logits = ddp_model(pictures.contiguous(memory_format=world.memory_format))
            of_images.append(loss(logits, shown))
            total = of_images[-1].sum()
            # Gradients are averaged over ranks: times the world's size, over the global batch, makes that the true mean.
            world.backward(total * world.size / config.data.global_batch_size)
        labels = shown.dominant_label()
        sums += torch.stack([total.detach(), (logits.argmax(1) == labels).sum(), (labels >= 0).sum()])
    if config.optim.max_grad_norm:
        world.clip_gradients(ddp_model, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return sums, torch.cat(of_images).detach()


def save(session: Session, progress: Progress) -> None:
    """Collective: a checkpoint of this moment, after the log of it.

    Raises:
        FloatingPointError: the weights are no numbers any more; the checkpoint before stays the newest.
        OSError: it cannot be saved, or copied, or another job has taken over the run folder.
    """
    world, log, optimizer = session.world, session.log, session.optimizer
    world.broadcast_buffers(session.model)

    def write() -> None:
        session.lock.check()
        assert_finite_weights(session.model, progress)
        eval_model = session.eval_model
        log.flush()
        session.mirror.wait()
        keep, provenance, place = session.config.run.keep_checkpoints, session.provenance, session.mirror.directory()
        if progress.best_step == progress.step and not progress.samples_seen:
            checkpoint.save_best(place, progress, provenance, eval_model)
        average = eval_model if session.average else None
        checkpoint.save_step(place, progress, provenance, session.model, optimizer, world.scaler, keep, average)
        session.mirror.start()
        write_state(session.folder, "running", progress)

    world.run_on_main(write)


def assert_finite_weights(model: nn.Module, progress: Progress) -> None:
    """Raise before weights are kept that cannot be continued from.

    Raises:
        FloatingPointError: naming a tensor that is not finite.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):  # device sync, at a checkpoint
            raise FloatingPointError(
                f"The weights are no numbers any more by step {progress.step} (first: {name}). The checkpoint before is "
                "kept. Lower optim.lr; --run.on_changed_settings accept continues from it with the new rate."
            )


def _describe_nan_loss(session: Session, progress: Progress, interval: list, lr: float) -> str:
    """Collective: which step of an interval had the first loss that is no number, and whose; each rank looks at its images."""
    world = session.world
    bad = [(keys[~found.isfinite()], number) for number, (keys, found) in enumerate(interval, start=progress.step + 1)]
    keys = torch.cat([keys for keys, _ in bad])
    steps = torch.cat([torch.full((len(keys),), float(step), device=keys.device) for keys, step in bad])
    keys, columns = world.all_gather_rows(keys, {"step": steps})
    steps = columns["step"]
    step = int(steps.min()) if len(steps) else progress.step + len(interval)
    here = keys[steps == step].tolist()
    shown = ", ".join(f"{key:08d}" for key in here[:5]) + (f" and {len(here) - 5} more" if len(here) > 5 else "")
    return (
        f"The loss of step {step} is no number; samples {shown} of {session.plan.global_batch}. No checkpoint was saved "
        f"since. Lower optim.lr (now {lr:.1e}); --run.on_changed_settings accept continues from the newest checkpoint with the new rate."
    )
