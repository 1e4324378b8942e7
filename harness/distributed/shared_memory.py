"""Memory that the processes of one machine share.

In: a number of bytes. Out: the same memory in each of them. Invariants: nothing has a name in any file system, so nothing is left
behind by a process that is killed; a process that cannot reach the others has memory of its own.
"""

import mmap
import os
import platform
import uuid
from contextlib import suppress

from harness.distributed.world import World


def shared_memory(world: World, n_bytes: int) -> tuple[memoryview, int]:
    """Collective: memory, all 0, and how many processes have the same. A page is taken when it is first written.

    The first process of each machine makes it (memfd_create, on Linux), and the others open it as /proc/PID/fd/N. On x86 alone: there,
    what a process writes first is seen first, also without a lock.
    """
    name, own = f"dermharness-{uuid.uuid4().hex}", -1
    if world.size > 1 and hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64"):
        own = os.memfd_create(name)
        os.ftruncate(own, n_bytes)
    everyone = world.all_gather_objects((os.getpid(), own, name))
    of_rank, opened = world.rank, None
    for rank, made in enumerate(everyone):
        if (opened := _open(*made)) is not None:
            of_rank = rank
            break
    memory = mmap.mmap(-1 if opened is None else opened, n_bytes)
    n_sharing = world.all_gather_objects(of_rank).count(of_rank)  # from here on, all have opened what they can
    for number in (own, opened):
        if number is not None and number >= 0:
            os.close(number)  # what is mapped stays
    return memoryview(memory), n_sharing


def _open(pid: int, number: int, name: str) -> int | None:
    """A process's memory by the number of its file, if the process is on this machine and it is the very one."""
    with suppress(OSError):
        opened = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        if os.readlink(f"/proc/self/fd/{opened}").startswith(f"/memfd:{name}"):
            return opened
        os.close(opened)
    return None
