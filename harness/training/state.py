"""What is read and what is trained: the two nouns that every stage of a run shares with its folder.

In: settings and a `World`. Out: `Data` and `TrainState`. Invariants: the dataset is opened once; the weights after a start are
those of the checkpoint, or follow from the settings; they are the same on every rank.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from harness.config import Config
from harness.data.decoded import DecodedCache
from harness.distributed.world import World
from harness.model.build import build_model
from harness.model.loss import Loss
from harness.model.optim import EMA, build_optimizer
from harness.model.weights import load_weights
from harness.run import checkpoint, recovery
from harness.run.checkpoint import Snapshot
from harness.run.folder import Run
from harness.run.progress import Progress, monitored_by
from harness.run.provenance import Checkpoint, Provenance
from harness.run.state import note_saved
from shards.index import Dataset, load
from shards.plan import Plan
from shards.reader import SplitReader


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read: the dataset, its splits (test is `eval.split`), the order of training samples, and where they are kept decoded."""

    dataset: Dataset
    train: SplitReader
    val: SplitReader
    test: SplitReader
    plan: Plan
    decoded: DecodedCache | None = None


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What is trained: the model as built, the same weights wrapped for DDP, and all that changes them.

    is_frozen: the head alone is trained, and `ddp_model` is the model itself (`frozen.set_frozen`).
    """

    model: nn.Module
    ddp_model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: Loss
    ema: EMA | None = None
    is_frozen: bool = False

    @property
    def eval_model(self) -> nn.Module:
        """The model that is validated, and whose best weights are kept: the EMA's where there is one."""
        if self.ema is None:
            return self.model
        self.ema.copy_buffers(self.model)
        return self.ema.model


def open_data(config: Config) -> Data:
    """Open the dataset and plan the order of its samples.

    Raises:
        FileNotFoundError, ValueError: no packed dataset there, a split that is missing, or too few images for a batch.
    """
    dataset = load(config.data.path, config.data.access)
    train, val, test = (SplitReader(dataset, name) for name in ("train", "val", config.eval.split))
    data = config.data
    numbers = (train.shard_sizes, data.global_batch_size, config.run.seed, data.lanes, data.shuffle_block_shards)
    labels = (lambda shard: train.table(shard).label) if config.optim.balance == "sampler" else None
    plan = Plan(*numbers, labels)
    return Data(dataset=dataset, train=train, val=val, test=test, plan=plan)


def build_or_resume(config: Config, world: World, data: Data, run: Run) -> tuple[TrainState, Progress]:
    """Collective: the model and its optimizer, from the latest checkpoint or as the settings say, and how far it is.

    Raises:
        ValueError, OSError: weights or a checkpoint that do not fit.
    """
    torch.manual_seed(config.run.seed)
    model = build_model(config.model.name, len(data.dataset.classes), config.model.drop_path)
    start = run.find_start(data.dataset)
    if start is not None:
        if start.provenance.model != config.model.name:
            raise ValueError(
                f"{start.folder} is of {start.provenance.model}, and 'model.name' is {config.model.name}. Name another --run.folder "
                "for it, or go on with the model of before."
            )
        recovery.refuse_other_copies(start.folder, world)
    else:
        # On rank 0 alone: wrapping the model sends its weights to the others.
        source = config.model.name, config.model.weights, data.dataset.classes, config.model.head
        world.print(world.run_on_main(load_weights, model, *source))
    if config.model.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device=world.device, memory_format=world.memory_format)  # pyright: ignore[reportCallIssue] - torch's own stub
    ema = EMA(model, config.optim.ema) if config.optim.ema else None  # copied before it is wrapped
    mode = config.run.compile_mode if config.run.compile else None
    ddp_model, optimizer = world.prepare(model, build_optimizer(model, config.optim), mode)
    loss_fn = Loss(config.optim, data.dataset.description.counts["train"], world.device)
    state = TrainState(model=model, ddp_model=ddp_model, optimizer=optimizer, loss_fn=loss_fn, ema=ema)
    if start is None:
        world.run_on_main(run.accept_settings)
        return state, Progress(monitor=config.run.monitor)
    checkpoint.restore(start, model, optimizer, world.scaler, ema and ema.model)
    if ema:
        ema.mark_restored()
    world.run_on_main(run.accept_settings)
    progress = monitored_by(_continued(start, run.provenance, world), config.run.monitor)
    if start.progress.best is not None and progress.best is None:
        world.print(
            f"'run.monitor' was {start.progress.monitor}: the next epoch is the best so far by {config.run.monitor}"
        )
    world.print(f"continuing {run.folder} at epoch {progress.epoch + 1}, step {progress.step}")
    return state, progress


def save_checkpoint(config: Config, world: World, state: TrainState, run: Run, progress: Progress) -> None:
    """Collective: a checkpoint of this moment, after the log of it, is copied to the host and written while training goes on.

    Until `run.writer.wait`, the one before is the latest.

    Raises:
        FloatingPointError: the weights contain NaN or Inf; the checkpoint before stays the latest.
        OSError: the one before could not be saved or copied, or another job has taken over the run folder.
    """

    def write(model: Snapshot, optimizer: Snapshot, scaler: Snapshot | None, ema: Snapshot | None) -> None:
        run.lock.check()
        folder = run.writer.directory()
        if progress.best_step == progress.step and not progress.samples_seen:
            checkpoint.save_best(folder, progress, run.provenance, ema or model)
        keep = config.run.keep_checkpoints
        checkpoint.save_step(folder, progress, run.provenance, model, optimizer, scaler, keep, ema)
        note_saved(run.folder, progress)

    def save() -> None:
        assert_finite_weights(state.model, progress)
        run.lock.check()
        run.writer.wait()  # from here on, nobody reads the snapshots of before
        run.log.flush()
        ema = state.eval_model if state.ema else None
        sources = (state.model, state.optimizer, world.scaler, ema)
        run.writer.snapshots = checkpoint.snapshots(sources, run.writer.snapshots)
        run.writer.start(partial(write, *run.writer.snapshots))

    world.run_on_main(save)


def assert_finite_weights(model: nn.Module, progress: Progress) -> None:
    """Raise before weights are kept that cannot be continued from.

    Raises:
        FloatingPointError: naming the first tensor with NaN or Inf.
    """
    named = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    # A sum is finite if all its terms are: float64 holds that of any float32 tensor. (One device sync.)
    are_finite = torch.stack([tensor.sum(dtype=torch.float64) for tensor in named.values()]).isfinite().tolist()
    for name, is_finite in zip(named, are_finite, strict=True):
        if not is_finite:
            raise FloatingPointError(
                f"Weights contain NaN or Inf at step {progress.step} (first: {name}). The checkpoint before is kept. Lower "
                "optim.lr; --run.on_changed_settings accept continues from it with the new rate."
            )


def _continued(start: Checkpoint, now: Provenance, world: World) -> Progress:
    """How far a run is, from its checkpoint; in another order of samples, the epoch that was begun starts over."""
    if start.provenance.order == now.order or not start.progress.samples_seen:
        return start.progress
    world.print(
        f"the order of samples changed ({start.provenance.order}; now {now.order}): epoch {start.progress.epoch + 1} starts over"
    )
    return replace(start.progress, samples_seen=0, loss=0.0, correct=0.0, images=0.0, skipped_steps=0)
