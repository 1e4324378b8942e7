"""One training epoch. Ranks synchronise every `run.sync_every` steps; in between nothing blocks on the device.

In: data, a `TrainState`, how far the run is. Out: how far it is then, and how the epoch went. Invariants: the ranks synchronise
at the same steps; nothing is saved that is not finite.
"""

import time
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from harness.config import Config
from harness.data.loader import Batch, LoaderOptions, training_batches
from harness.data.random import stream_checksum
from harness.distributed.collectives import average_batch_statistics, gather_rows
from harness.distributed.hardware import decode_threads
from harness.distributed.world import World
from harness.model.optim import lr_at
from harness.run.console import LOGGER
from harness.run.folder import Run
from harness.run.progress import Progress, after_steps, find_skipping
from harness.training.frozen import set_frozen
from harness.training.memory import TRIALS, fit_micro_batch
from harness.training.state import Data, TrainState, save_checkpoint
from harness.training.step import optimizer_step, views_and_targets

SLOW_S = 20.0  # between two synchronisations: then a request to stop is noticed late


@dataclass(frozen=True)
class EpochStats:
    """How an epoch went since this start of the run: learning rate of its last step, images/s, seconds, those that waited, and whether to stop.

    batches: of this rank; 0 where only the validation was left. waited_first_s: the part of `waited_s` for the first batch, which
    nothing was decoded for before the epoch began. is_frozen: the head alone was trained, so that an image took less arithmetic.
    """

    lr: float
    images_per_s: float
    seconds: float
    waited_s: float
    waited_first_s: float
    stop_requested: bool
    batches: int
    is_frozen: bool = False

    @property
    def speed(self) -> str:
        """Its speed as the line of the epoch says it."""
        if self.batches == 0:
            return "trained before this start"
        return f"{self.images_per_s:.0f} img/s  wait {self.waited:.0%}"

    @property
    def waited(self) -> float:
        """Share of the seconds that the loop waited for data."""
        return self.waited_s / self.seconds


class Meter:
    """Sums of the steps since the ranks last synchronised, on the device but for the checksum, and the clocks of an epoch."""

    def __init__(self, device: torch.device):
        self.began = self.synced = self.saved = time.perf_counter()
        self.waited_s, self.waited_first_s, self.images, self.batches = 0.0, 0.0, 0.0, 0
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, images, steps that fp16 skipped
        self.samples = 0.0  # their checksum
        self.losses: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys (b,) and losses (b,) of each step

    @property
    def steps(self) -> int:
        """Steps since the ranks last synchronised."""
        return len(self.losses)

    def add(self, batch: Batch, sums: torch.Tensor, losses: torch.Tensor) -> None:
        """Take in a step: what `optimizer_step` returned for it."""
        self.sums += sums
        self.samples += stream_checksum(batch.keys, batch.positions).item()  # on the host
        self.losses.append((batch.keys, losses))
        self.waited_s += batch.waited
        if self.batches == 0:
            self.waited_first_s = batch.waited
        self.batches += 1

    def flush(self, images: float) -> None:
        """Start anew after a synchronisation, which counted so many images over all ranks."""
        self.images += images
        self.sums.zero_()
        self.samples, self.losses = 0.0, []
        self.synced = time.perf_counter()

    def images_per_s(self) -> float:
        """Training speed since the epoch began."""
        return self.images / self.seconds()

    def seconds(self) -> float:
        """Since the epoch began; never 0."""
        return max(1e-9, time.perf_counter() - self.began)

    def stats(self, lr: float, stop_requested: bool) -> EpochStats:
        """The epoch so far."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        return EpochStats(
            lr, self.images / seconds, seconds, self.waited_s, self.waited_first_s, stop_requested, self.batches
        )


def train_epoch(
    config: Config, world: World, data: Data, state: TrainState, run: Run, progress: Progress
) -> tuple[Progress, EpochStats]:
    """Collective: train to the end of the epoch, or until somebody asks to stop.

    Raises:
        FloatingPointError: the loss became NaN or Inf.
        ValueError, OSError: a sample that cannot be read, a checkpoint that cannot be saved.
    """
    plan, epoch, stop = data.plan, progress.epoch, False
    first = progress.samples_seen // plan.global_batch
    done = epoch * plan.n_batches  # by the schedule: progress.step counts those of other batch sizes, too
    lr = lr_at(max(0, done + first - 1), config.optim, plan.n_batches, config.run.epochs)
    skipped: list[int] | None = [] if config.data.on_bad_sample == "skip" else None
    micro_batch = progress.micro_batch if config.optim.micro_batch == "auto" else config.optim.micro_batch
    meter = Meter(world.device)
    run.log.begin_bar(f"epoch {epoch + 1}", plan.n_batches * plan.global_batch, progress.samples_seen)
    state = set_frozen(state, epoch < config.optim.freeze_epochs)
    batches = _batches(config, world, data, epoch, first, skipped)
    with closing(batches):  # ends its threads, also on an error
        for number, batch in enumerate(batches, start=first):
            step = progress.step + meter.steps
            lr = lr_at(done + number, config.optim, plan.n_batches, config.run.epochs)
            views, targets = views_and_targets(config, batch, epoch)
            if config.optim.micro_batch == "auto" and number < first + TRIALS:
                micro_batch = fit_micro_batch(config, world, state, views, targets, step, micro_batch)
            is_first = number == first
            sums, losses = optimizer_step(config, world, state, views, targets, lr, step, micro_batch, is_first)
            meter.add(batch, sums, losses)
            run.profiler.step()
            is_last = number + 1 == plan.n_batches
            if meter.steps < config.run.sync_every and not is_last:
                continue
            if micro_batch != progress.micro_batch and config.optim.micro_batch == "auto":
                progress = replace(progress, micro_batch=micro_batch)
                world.print(f"optim.micro_batch auto: {micro_batch} images of a process at a time fit into memory")
            progress, stop, save = synchronise(config, world, data, run, progress, meter, lr)
            if not state.is_frozen:  # else they are the same on each rank, and stay so
                average_batch_statistics(
                    world, state.model
                )  # at these steps alone, so that a resume changes no rounding
            if (stop or save) and not is_last:
                save_checkpoint(config, world, state, run, progress)
                meter.saved = time.perf_counter()
            if stop:
                break
    run.log.end_bar()
    if skipped:
        keys = ", ".join(f"{key:08d}" for key in skipped[:10])
        LOGGER.warning(f"rank {world.rank} skipped {len(skipped)} samples that cannot be decoded, keys {keys}")
    return progress, replace(meter.stats(lr, stop), is_frozen=state.is_frozen)


def synchronise(
    config: Config, world: World, data: Data, run: Run, progress: Progress, meter: Meter, lr: float
) -> tuple[Progress, bool, bool]:
    """Collective: sum over ranks what happened since the last time, and log it. (Device sync.)

    Returns:
        how far the run is, whether any rank was asked to stop, and whether a checkpoint is due.

    Raises:
        FloatingPointError: the loss became NaN or Inf, or fp16 skips too many steps.
    """
    due = time.perf_counter() - meter.saved > 60 * config.run.save_every_minutes
    of_host = torch.tensor([meter.samples, run.stop.asked(), due], dtype=torch.float64, device=world.device)
    sums = world.all_reduce_sum(torch.cat([meter.sums, of_host])).tolist()
    loss, correct, images, skipped, samples, stop, save = sums
    if not abs(loss) < float("inf"):  # also NaN
        raise FloatingPointError(_describe_nan_loss(world, data, progress, meter, lr))
    seconds = time.perf_counter() - meter.synced
    if progress.step == 0 and seconds > SLOW_S and not config.run.compile:  # compiling is slow, once
        world.print(
            f"note: {meter.steps} steps take {seconds:.0f} s, and requests to stop are noticed as rarely: lower run.sync_every"
        )
    n_samples = meter.steps * data.plan.global_batch
    progress = after_steps(progress, meter.steps, n_samples, loss, correct, images, round(skipped / world.size))
    scale = None if (on_device := world.scale_on_device()) is None else float(on_device)
    if problem := find_skipping(progress, data.plan.n_batches, scale):
        raise FloatingPointError(problem)
    meter.flush(images)
    seen = max(1.0, images)  # none, if each was skipped
    numbers = {"loss": loss / seen, "accuracy": correct / seen, "lr": lr, "images_per_s": meter.images_per_s()}
    numbers |= {} if scale is None else {"loss_scale": scale, "skipped_steps": progress.skipped_steps}
    run.log.write("train", progress.step, numbers | {"samples": f"{int(samples):014x}"})
    run.log.move_bar(int(images), loss=f"{loss / seen:.3f}", accuracy=f"{correct / seen:.3f}")
    return progress, bool(stop), bool(save)


def _batches(config: Config, world: World, data: Data, epoch: int, first: int, skipped: list[int] | None):
    """This rank's batches of an epoch, from number `first` on."""
    threads, prefetch = decode_threads(config.data.threads), config.data.prefetch_batches
    options = LoaderOptions(threads, prefetch, world.device, skipped, data.decoded, world.works)
    shares = world.rank, world.size
    return training_batches(data.train, data.plan, epoch, first, *shares, options, config.augment.group_size)


def _describe_nan_loss(world: World, data: Data, progress: Progress, meter: Meter, lr: float) -> str:
    """Collective: the first step with a NaN or Inf loss, and its samples; each rank looks at its own images."""
    bad = [
        (keys[~losses.isfinite().cpu()], step)
        for step, (keys, losses) in enumerate(meter.losses, start=progress.step + 1)
    ]
    keys = torch.cat([keys for keys, _ in bad])
    steps = torch.cat([torch.full((len(keys),), float(step)) for keys, step in bad])
    keys, columns = gather_rows(world, keys, {"step": steps})
    return world.run_on_main(_nan_loss, keys, columns["step"], progress.step + meter.steps, data.plan.global_batch, lr)


def _nan_loss(keys: torch.Tensor, steps: torch.Tensor, last_step: int, batch: int, lr: float) -> str:
    """What to say of a loss that is NaN or Inf; keys, steps: (n,), of the samples with such a loss."""
    step = int(steps.min()) if len(steps) else last_step
    here = keys[steps == step].tolist()
    shown = ", ".join(f"{key:08d}" for key in here[:5]) + (f" and {len(here) - 5} more" if len(here) > 5 else "")
    return (
        f"Loss became NaN or Inf at step {step}; samples {shown} of the batch of {batch}. No checkpoint was "
        f"saved since. Lower optim.lr (now {lr:.1e}); --run.on_changed_settings accept continues from the latest checkpoint "
        "with the new rate."
    )
