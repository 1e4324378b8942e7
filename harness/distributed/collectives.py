"""Collectives made of a `World`'s own: rows of uneven number, and statistics of batch normalisation.

In: a `World`, tensors of this rank. Out: tensors of all ranks. Invariants: every function here is called by all ranks at the same
point; statistics are the same on every rank, and rows, which may be many, come to rank 0 alone.
"""

import math

import torch

from harness.distributed.world import World

GATHERED_BYTES = 2**26  # on a device at a time, of all ranks together
BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def gather_rows(
    world: World, keys: torch.Tensor, columns: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Collective: the rows of all ranks on rank 0, sorted by key, whatever number each rank has; no row on the others.

    They are sent in pieces, so that a device holds GATHERED_BYTES of them at most.

    Args:
        keys: (n,) int64; n differs from rank to rank.
        columns: (n, ...) each, of any type; every rank has the same names, in the same order.

    Returns:
        (N,) keys and (N, ...) columns of the same names and types, on the CPU; N is 0 on all ranks but the first.
    """
    columns = {name: column.cpu() for name, column in {"": keys, **columns}.items()}
    if world.size > 1:
        packed = torch.cat([_as_bytes(column) for column in columns.values()], 1)  # (n, bytes of a row)
        world.passes("gather_rows")
        counts = world.all_gather(torch.tensor([len(keys)], device=world.device)).tolist()
        most = max(1, GATHERED_BYTES // (world.size * packed.shape[1]))
        found = [packed[:0]]
        for first in range(0, max(counts), most):
            world.passes("gather_rows")
            piece = packed.new_zeros(min(most, max(counts) - first), packed.shape[1])
            mine = packed[first : first + len(piece)]
            piece[: len(mine)] = mine
            parts = world.gather_on_main(piece.to(world.device))
            found += [part[: max(0, n - first)].cpu() for part, n in zip(parts, counts, strict=False)]
        columns = _unpacked(torch.cat(found), columns)
    order = torch.argsort(columns[""], stable=True)
    columns = {name: column[order] for name, column in columns.items()}
    return columns.pop(""), columns


def _as_bytes(column: torch.Tensor) -> torch.Tensor:
    """(n, ...) of any type to (n, bytes of a row) uint8."""
    return column.reshape(len(column), math.prod(column.shape[1:])).contiguous().view(torch.uint8)


def _unpacked(packed: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of bytes (N, bytes of a row) to columns with the names, types and shapes of others."""
    columns, start = {}, 0
    for name, column in like.items():
        stop = start + math.prod(column.shape[1:]) * column.element_size()
        part = packed[:, start:stop].clone(memory_format=torch.contiguous_format)
        columns[name], start = part.view(column.dtype).reshape(len(packed), *column.shape[1:]), stop
    return columns


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


def copy_from_main(world: World, model: torch.nn.Module) -> None:
    """Collective: the weights and buffers of rank 0, on every rank. The model is on the world's device."""
    if world.size == 1:
        return
    for tensor in model.state_dict().values():
        if not world.is_main:
            tensor.zero_()
        tensor.copy_(world.all_reduce_sum(tensor))
