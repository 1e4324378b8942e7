"""Collectives made of a `World`'s own: rows of uneven number, and statistics of batch normalisation.

In: a `World`, tensors of this rank. Out: tensors of all ranks. Invariants: every function here is called by all ranks at the same
point; what comes out is the same on every rank.
"""

import torch

from harness.distributed.world import World

BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def all_gather_rows(
    world: World, keys: torch.Tensor, columns: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Collective: the rows of all ranks, sorted by key, whatever number each rank has.

    Args:
        keys: (n,) int64, not negative; n differs from rank to rank.
        columns: (n, ...) each, of any type; every rank has the same names, in the same order.

    Returns:
        (N,) keys and (N, ...) columns of the same names and types, on every rank, on the CPU.
    """
    if world.size > 1:
        world.passes("all_gather_rows")
        counts = world.all_gather(torch.tensor([len(keys)], device=world.device))
        n_missing = int(counts.max()) - len(keys)
        keys = world.all_gather(torch.cat([keys.to(world.device), keys.new_full((n_missing,), -1).to(world.device)]))
        is_row = keys >= 0
        keys = keys[is_row]
        padded = {
            name: torch.cat([column, column.new_zeros((n_missing, *column.shape[1:]))]).to(world.device)
            for name, column in columns.items()
        }
        columns = {name: world.all_gather(column)[is_row] for name, column in padded.items()}
    order = torch.argsort(keys, stable=True)
    return keys[order].cpu(), {name: column[order].cpu() for name, column in columns.items()}


def average_batch_statistics(world: World, model: torch.nn.Module) -> None:
    """Collective: running means and variances of batch normalisation become the mean over ranks, on every rank.

    Each rank keeps its own of the images that it sees, so that what is validated would else be one rank's share of the data.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORM)]
    of_norms = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    statistics = [tensor for tensor in of_norms if tensor is not None]
    if world.size == 1 or not statistics:
        return
    sums = world.all_reduce_sum(torch.cat(statistics)) / world.size
    torch._foreach_copy_(statistics, list(sums.split([len(tensor) for tensor in statistics])))  # pyright: ignore[reportPrivateImportUsage] - one kernel
