"""Where a run keeps decoded images: chosen by all ranks together, and said.

In: `data.decoded_cache`, a split. Out: a `DecodedCache`, or none. Invariants: what does not fit with room to spare is not begun.
"""

from harness.config import Config
from harness.data.decoded import KINDS, DecodedCache, choose_cache, nbytes_of
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
    answers = world.all_gather_objects(choose_cache(asked, n_bytes, world.device))
    kind, reason = min(answers, key=lambda answer: KINDS.index(answer[0]))
    if reason and (asked != "auto" or kind == "none"):
        world.warn(f"data.decoded_cache {asked} is not possible ({reason}): it is {kind} instead")
    if kind == "none":
        return None
    if kind == "device":
        world.print(f"decoded images are kept on the GPU after their first use: {n_bytes / 1e9:.2f} GB")
        return DecodedCache(*shape, world.device)
    memory, n_sharing = shared_memory(world, n_bytes)
    shared = f", shared by {n_sharing} processes" if n_sharing > 1 else ""
    world.print(f"decoded images are kept in host memory after their first use: {n_bytes / 1e9:.2f} GB{shared}")
    return DecodedCache(*shape, memory)
