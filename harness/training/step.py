"""One optimizer step: views of a batch, forward, loss, backward, update.

In: a `Batch` on the device and a `TrainState`. Out: the weights changed in place, and this rank's sums. Invariants: the update
depends on the global batch, not on how it is shared out over ranks or cut into micro-batches (but for batch normalisation);
nothing here waits for the device.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from harness.config import Config
from harness.data.augment import mix, training_view
from harness.data.loader import Batch
from harness.distributed.world import World
from harness.model.loss import Loss, Targets, mixed_targets
from harness.training.state import TrainState


def train_step(
    config: Config, world: World, state: TrainState, batch: Batch, *, epoch: int, step: int, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch and take an optimizer step on it.

    Args:
        epoch, step: counted from 0; the augmentation follows from the epoch, dropout from the step.

    Returns:
        as `optimizer_step`.
    """
    seed = config.run.seed
    torch.manual_seed(seed + step)
    views = training_view(batch.images, batch.positions, epoch, seed, config.augment, config.data.image_size)
    targets = Targets(batch.labels)
    if config.augment.group_size > 1:
        views, shares = mix(views, batch.positions, epoch, seed, config.augment)
        targets = mixed_targets(batch.labels, shares)
    sums, losses = optimizer_step(config, world, state, views, targets, lr)
    if state.ema:
        state.ema.update(state.model, step + 1)
    return sums, losses


def optimizer_step(
    config: Config, world: World, state: TrainState, views: torch.Tensor, targets: Targets, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on this rank's share of a global batch, in micro-batches where the settings say so.

    Args:
        views: (b, 3, S, S) float32. targets: of b images.

    Returns:
        this rank's (sum of losses, correct predictions, images), float64, and the loss of each image, (b,) float32; all on
        the device.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    parts = -(-len(views) // (config.optim.micro_batch or len(views)))
    # Gradients are averaged over ranks: times the world's size, over the global batch, makes that the true mean.
    scale = world.size / config.data.global_batch_size
    sums, losses = torch.zeros(3, dtype=torch.float64, device=world.device), []
    for number, (images, labels) in enumerate(
        zip(views.tensor_split(parts), targets.split(parts), strict=True), start=1
    ):
        world.passes("forward")
        with nullcontext() if number == parts else world.without_sync(state.ddp_model):
            laid_out = images.contiguous(memory_format=world.memory_format)
            part, part_losses = forward_backward(
                state.ddp_model, state.loss_fn, laid_out, labels, scale, world.backward
            )
        sums += part
        losses.append(part_losses)
    if config.optim.max_grad_norm:
        world.clip_gradients(state.ddp_model, config.optim.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    return sums, torch.cat(losses)


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
