"""Epochs in which the head alone is trained (`optim.freeze_epochs`).

In: a `TrainState`, whether it is frozen. Out: the state to step with. Invariants: while it is frozen, no weight and no buffer outside the
head changes by a bit, at any number of ranks; which epochs are frozen follows from the settings, so that a resume needs nothing more.

DDP waits for the gradients of all parameters that it was made with. So the frozen epochs go around it: the passes run on the model itself,
without a backward pass through the frozen part, and the gradients of the head (a few thousand numbers) are averaged here. DDP, which was
made with every weight, is used from the first epoch that trains them all: nothing is wrapped twice.
"""

from dataclasses import replace

import torch

from harness.distributed.world import World
from harness.model.build import find_head
from harness.model.layers import head_weights
from harness.training.state import TrainState


def set_frozen(state: TrainState, frozen: bool) -> TrainState:
    """Put a model into training, or, frozen, its head alone: the rest is as in evaluation (batch statistics, dropout, drop path).

    Args:
        state: of the whole model, as built; its model is changed in place.

    Returns:
        the state to step with in this epoch.
    """
    head = {id(weight) for weight in head_weights(state.model)} if frozen else set()
    for group in state.optimizer.param_groups:  # those that are trained at all: timm's fixed embeddings are not
        for weight in group["params"]:
            weight.requires_grad_(not frozen or id(weight) in head)
    state.model.train(not frozen)
    if not frozen:
        return state
    state.model.get_submodule(find_head(state.model)).train()
    return replace(state, ddp_model=state.model, is_frozen=True)


def average_gradients(world: World, model: torch.nn.Module) -> None:
    """Collective: the gradients of a model that DDP does not see become their mean over ranks."""
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad and weight.grad is not None]
    if world.size == 1:
        return
    sums = world.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world.size
    for gradient, mean in zip(gradients, sums.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
