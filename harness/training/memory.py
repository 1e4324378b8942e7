"""Memory that does not suffice: who ran out of it and what to lower, or a micro-batch that fits, found by all ranks.

In: a `TrainState` and a batch. Out: the largest micro-batch that fits on every rank, or an error with figures. Invariants: the
global batch, its samples and their views stay what they are; weights, gradients and statistics are untouched by a trial.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.config import Config
from harness.distributed.world import World
from harness.model.loss import Targets
from harness.training.state import TrainState
from harness.training.step import backward_parts
from shards.plan import largest_share

TRIALS = 3  # first steps of each epoch: the optimizer's own memory comes with its first step, and caches grow a little


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def out_of_memory_explained(config: Config, world: World) -> Iterator[None]:
    """Inside, an error for want of memory says which rank ran out, how much there is, and what to lower.

    Raises:
        MemoryError: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        now = config.optim.micro_batch or f"all of a process's share of {config.data.global_batch_size} images"
        advice = "optim.micro_batch (or let it be found: --optim.micro_batch auto)"
        if config.optim.micro_batch == "auto":
            advice = "eval.batch_size or data.image_size, since optim.micro_batch is auto already"
        if config.data.decoded_cache in ("device", "auto") and world.device.type == "cuda":
            advice = f"data.decoded_cache to host, {advice}"
        raise MemoryError(
            f"Rank {world.rank} ({world.host_pid}) ran out of memory{_gpu_figures(world.device)}. Lower {advice}; it is "
            f"now {now}. Results stay the same but for batch normalisation; the same command continues, with "
            "--run.on_changed_settings accept."
        ) from error


def _gpu_figures(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return f" of its GPU: {peak / 1e9:.1f} GB at the peak, {free / 1e9:.1f} GB of {total / 1e9:.1f} GB free now"


def fit_micro_batch(
    config: Config, world: World, state: TrainState, views: torch.Tensor, targets: Targets, step: int, micro_batch: int
) -> int:
    """Collective: a micro-batch with which this step fits into the memory of every rank, halved until it does.

    The step is tried without an exchange between ranks: one that runs out in the middle leaves no other waiting in a
    collective. Then the step is taken as always.

    Args:
        views, targets: as for `optimizer_step`. micro_batch: to begin with; 0 for the whole share.

    Raises:
        MemoryError: not even one image fits.
    """
    images = micro_batch or largest_share(config.data.global_batch_size, world.size, config.augment.group_size)
    while world.any_rank(not _fits(config, world, state, views, targets, step, images)):
        if images == 1:
            raise MemoryError("not even one image fits into the memory of every rank")
        images = -(-images // 2)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return images


def _fits(
    config: Config, world: World, state: TrainState, views: torch.Tensor, targets: Targets, step: int, micro_batch: int
) -> bool:
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    try:
        with world.by_itself(state.ddp_model):
            for _ in backward_parts(config, world, state, views, targets, step, micro_batch):
                pass
            world.synchronize()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        state.optimizer.zero_grad()
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
