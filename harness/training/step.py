"""One optimizer step: views of a batch, forward, loss, backward, update.

In: a `Batch` on the device and a `TrainState`. Out: the weights changed in place, and this rank's sums. Invariants: the update
depends on the global batch, not on how it is shared out over ranks or cut into micro-batches (but for batch normalisation);
nothing here waits for the device.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from harness.config import Config
from harness.data.augment import mix, training_view
from harness.data.loader import Batch
from harness.data.random import noise_seed, seed_generators
from harness.distributed.world import World
from harness.model.loss import Loss, Targets, mixed_targets
from harness.model.optim import set_rate
from harness.run.console import LOGGER
from harness.training.frozen import average_gradients
from harness.training.state import TrainState
from shards.plan import largest_share, rank_slice

STRIDES = "Grad strides do not match bucket view strides"  # of torch's warning


def views_and_targets(config: Config, batch: Batch, epoch: int) -> tuple[torch.Tensor, Targets]:
    """Augment a batch of b images.

    Args:
        epoch: counted from 0; the augmentation follows from it, the seed and the batch's positions.

    Returns:
        (b, 3, S, S) float32, and the targets of b images.
    """
    seed = config.run.seed
    views = training_view(batch.images, batch.positions, epoch, seed, config.augment, config.data.image_size)
    if config.augment.group_size == 1:
        return views, Targets(batch.labels)
    views, shares = mix(views, batch.positions, epoch, seed, config.augment)
    return views, mixed_targets(batch.labels, shares)


def optimizer_step(
    config: Config,
    world: World,
    state: TrainState,
    views: torch.Tensor,
    targets: Targets,
    lr: float,
    step: int = 0,
    micro_batch: int | None = None,
    is_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on this rank's share of a global batch, in micro-batches where they are asked for.

    Args:
        views: (b, 3, S, S) float32. targets: of b images. step: counted from 0; dropout follows from it. micro_batch: most
            images of a forward pass, 0 for all; None as the settings say. is_first: look for what DDP cannot do with this model.

    Returns:
        this rank's (sum of losses, correct predictions, images, 1 if fp16 skipped the step), float64, and the loss of each
        image, (b,) float32; all on the device.

    Raises:
        ValueError: `is_first`, and a parameter has no gradient.
    """
    set_rate(state.optimizer, lr)
    if micro_batch is None:
        micro_batch = 0 if config.optim.micro_batch == "auto" else config.optim.micro_batch
    sums, losses = torch.zeros(4, dtype=torch.float64, device=world.device), []
    with layout_explained(is_first):
        for part, part_losses in backward_parts(config, world, state, views, targets, step, micro_batch):
            sums[:3] += part
            losses.append(part_losses)
    if state.is_frozen:
        average_gradients(world, state.model)
    if is_first and world.size > 1:
        refuse_unused(state.model)
    if config.optim.max_grad_norm:
        world.clip_gradients(state.ddp_model, config.optim.max_grad_norm)
    scale = world.scale_on_device()  # changes in place
    before = None if scale is None else scale.clone()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if scale is not None and before is not None:
        # Halved: gradients overflowed, and nothing changed. A fused optimizer skips inside its kernel, and tells nobody.
        sums[3] = scale < before
    if state.ema and not (scale is not None and bool(sums[3])):  # device sync, in fp16 with an EMA
        state.ema.update(step + 1)
    return sums, torch.cat(losses)


def backward_parts(
    config: Config, world: World, state: TrainState, views: torch.Tensor, targets: Targets, step: int, micro_batch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Forward and backward passes of a share in micro-batches; yields for each what `forward_backward` returns.

    Every rank has as many, also where shares are uneven: those of the largest share. Gradients are averaged over ranks in the last.
    """
    start, _ = rank_slice(config.data.global_batch_size, world.rank, world.size, config.augment.group_size)
    largest = largest_share(config.data.global_batch_size, world.size, config.augment.group_size)
    parts = -(-largest // (micro_batch or largest))
    # Gradients are averaged over ranks: times the world's size, over the global batch, makes that the true mean.
    scale = world.size / config.data.global_batch_size
    pairs = zip(views.tensor_split(parts), targets.split(parts), strict=True)
    for number, (images, labels) in enumerate(pairs, start=1):
        seed_generators(world.device, noise_seed(config.run.seed, step, start))  # for dropout
        start += len(images)
        world.passes("forward")
        with nullcontext() if number == parts else world.without_sync(state.ddp_model):
            laid_out = images.contiguous(memory_format=world.memory_format)
            yield forward_backward(state.ddp_model, state.loss_fn, laid_out, labels, scale, world.backward)


def refuse_unused(model: nn.Module) -> None:
    """Refuse a model with parameters that take no part in the loss, after its first backward pass.

    DDP waits for their gradients, and says so in the next step, by number.

    Raises:
        ValueError: naming them.
    """
    unused = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if unused:
        raise ValueError(
            f"Parameters of {type(model).__name__} get no gradient ({len(unused)}): {', '.join(unused[:5])}"
            + (", ..." if len(unused) > 5 else "")
            + ". Several processes cannot train such a model: name another 'model.name', or train on one process."
        )


@contextmanager
def layout_explained(is_first: bool) -> Iterator[None]:
    """Turn torch's warning of gradients in another memory format into advice; others are passed on."""
    if not is_first:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if STRIDES in str(warning.message):
            LOGGER.warning(
                "gradients have another memory format than the weights, so that each step copies them: try "
                "--run.channels_last off, or say which model and device this is, as it should not be"
            )
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def forward_backward(
    model: nn.Module,
    loss_fn: Loss,
    images: torch.Tensor,
    targets: Targets,
    scale: float,
    backward: Callable[[torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward pass, loss and backward pass of static shapes: the gradients are added to the weights' own.

    Args:
        images: (b, 3, S, S) float32. scale: factor of the sum of losses before the backward pass. backward: runs it.

    Returns:
        (sum of losses, correct predictions, images), (3,) float64, and the loss of each image, (b,) float32.
    """
    logits = model(images)  # (b, C)
    losses = loss_fn(logits, targets)
    total = losses.sum()
    backward(total * scale)
    labels = targets.dominant_label()
    sums = torch.stack([total.detach(), (logits.argmax(1) == labels).sum(), (labels >= 0).sum()])
    return sums, losses.detach()
