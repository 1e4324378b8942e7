"""Where a run keeps decoded images: chosen by all ranks together, and said.

In: `data.decoded_cache`, a split. Out: a `DecodedCache`, or none. Invariants: what does not fit with room to spare is not begun.
"""

import os

from harness.config import Config
from harness.data.decoded import DecodedCache, choose_kind, lacking_room, nbytes_of
from harness.distributed.shared_memory import shared_memory
from harness.distributed.world import World
from shards.reader import SplitReader


def open_cache(config: Config, world: World, reader: SplitReader) -> DecodedCache | None:
    """Collective: the cache that `data.decoded_cache` asks for, or the next that every rank has room for; None without one."""
    asked = config.data.decoded_cache
    if asked == "none":
        return None
    shape = reader.shard_sizes, reader.height, reader.width
    n_bytes = nbytes_of(*shape)
    size = f"{n_bytes / 1e9:.2f} GB"
    mine = {kind: lacking_room(kind, n_bytes, world.device) for kind in ("device", "host")}
    if config.optim.micro_batch == "auto":  # it would find another one, and batch normalisation see other batches
        mine["device"] = mine["device"] or "optim.micro_batch auto takes what is free on the GPU"
    kind, reason = choose_kind(asked, world.all_gather_objects(mine))
    memory = None
    if kind == "host":
        memory, n_sharing = shared_memory(world, n_bytes)
        alone = n_sharing < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if any(world.all_gather_objects(alone)):
            kind, reason = "none", "the processes of a machine cannot share memory"
    if reason and (asked != "auto" or kind == "none"):
        world.warn(f"data.decoded_cache {asked} is not possible ({reason}): it is {kind} instead")
    if kind == "device":
        world.print(f"decoded images are kept on the GPU after their first use: {size}")
        return DecodedCache(*shape, world.device)
    if kind == "none" or memory is None:
        return None
    shared = f", shared by {n_sharing} processes" if n_sharing > 1 else ""
    world.print(f"decoded images are kept in host memory after their first use: {size}{shared}")
    return DecodedCache(*shape, memory)
