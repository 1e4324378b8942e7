"""What the launcher's environment announced: a GPU for this rank, and the process group that Accelerate starts.

In: LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and the like. Out: an `Accelerator`, or an error that says how to start the processes.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import distributed
from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] - its documented place
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] - its documented place
)

from harness.distributed.hardware import check_wheel

LOGGER = logging.getLogger("dermharness")
COLLECTIVE_TIMEOUT_S = 600.0  # how long processes wait for each other
SAID_AFTER_S = 10.0  # what a process waits for at its start


def check_gpu_of_rank() -> None:
    """Refuse a rank without a GPU of its own, or a GPU that this torch has no kernels for.

    Raises:
        ValueError: saying how many processes to start, or which torch to install.
    """
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPU(s), and the launcher started a process for GPU "
            f"number {number + 1}. Start as many processes as there are GPUs."
        )
    device = torch.cuda.get_device_properties(number)
    check_wheel((device.major, device.minor), torch.cuda.get_arch_list(), device.name)


def start_accelerator(precision: str, cuda: bool) -> Accelerator:
    """Accelerate, with what its environment and configuration file may not change.

    Raises:
        ConnectionError: the processes did not find each other in time.
    """
    try:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            _meet_again(cuda)
        return Accelerator(
            cpu=not cuda,  # without it, ranks on a machine without CUDA each believe to be alone
            mixed_precision={"fp32": "no"}.get(precision, precision),
            # The environment may say otherwise.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                # Statistics of batch normalisation are averaged when the ranks synchronise, not sent in each forward pass.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)),
            ],
        )
    except (DistStoreError, DistNetworkError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"Process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} on {socket.gethostname()} did "
            f"not meet the others at {place} ({str(error).splitlines()[0]}). Start all of them within "
            f"{COLLECTIVE_TIMEOUT_S / 60:.0f} minutes, with the address of the first one's machine and an open port."
        ) from error


def _meet_again(cuda: bool) -> None:
    """Make the process group after the launcher has restarted the processes of this machine.

    torchrun lets them meet in its own store, where the addresses of the processes before still stand: gloo connects to those
    ("Connection refused"). Under another prefix there are none. The restarts of several machines may be numbered differently.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return
    wait = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store, rank, size = next(distributed.rendezvous("env://", timeout=wait))
    store = PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if cuda else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


@contextmanager
def meet() -> Iterator[None]:
    """Inside, this process waits for the others to start: what it waits for is said after ten seconds, and Ctrl-C ends it.

    Otherwise neither works: the waiting is done in C++, which gives Python no turn.
    """
    size, rank, place = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR"))

    def say() -> None:
        LOGGER.warning(
            f"rank {rank or '?'} of {size} has waited {SAID_AFTER_S:.0f} s for the other processes, at "
            f"{place or '?'}:{os.environ.get('MASTER_PORT', '?')}. Where nobody starts them, WORLD_SIZE={size} is left over "
            "from another launch: unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT"
        )

    if size in ("", "0", "1"):
        yield
        return
    timer = threading.Timer(SAID_AFTER_S, say)
    timer.daemon = True
    is_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if is_main_thread else None
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if before is not None:
            signal.signal(signal.SIGINT, before)


def serve_store(host: str, wait: timedelta) -> TCPStore:
    """A key-value store that listens on the address by which the ranks know this machine, and on no other.

    Where that name is not one of this machine's own addresses (behind a translation of addresses), it listens on all.
    It trusts whoever can connect, as torch's own store does: let only the ranks reach these ports.
    """
    listener = None
    with suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError):
                listener = socket.create_server(address[:2], family=family)
                break
    listener = listener or socket.create_server(("", 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=wait, master_listen_fd=listener.detach()
    )
