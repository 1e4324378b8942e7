"""How the processes of a run find each other: waiting for all to start, again after a restart, and a store to watch each other by.

In: RANK, WORLD_SIZE, MASTER_ADDR and the like. Out: a process group, a key-value store. Invariants: a wait says what it is for, and
Ctrl-C ends it; nothing listens where ranks do not need it.
"""

import ctypes
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] - its documented place
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] - its documented place
)

LOGGER = logging.getLogger("dermharness")
COLLECTIVE_TIMEOUT_S = 600.0  # how long processes wait for each other
SAID_AFTER_S = 10.0  # what a process waits for at its start


def meet_again(backend: str, wait: timedelta) -> None:
    """Make the process group after the launcher has restarted the processes of this machine.

    torchrun lets them meet in its own store, where the addresses of the processes before still stand: gloo connects to those
    ("Connection refused"). Under another prefix there are none. The restarts of several machines may be numbered differently.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return
    # torch's stubs do not export what its documentation does
    store, rank, size = next(distributed.rendezvous("env://", timeout=wait))  # pyright: ignore[reportPrivateImportUsage]
    store = PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)


@contextmanager
def meet() -> Iterator[None]:
    """Inside, this process waits for the others to start: after ten seconds the first one of a machine says so; Ctrl-C ends it.

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
    if os.environ.get("LOCAL_RANK", "0") == "0":
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
    options = {"is_master": True, "wait_for_workers": False, "timeout": wait, "master_listen_fd": listener.detach()}
    try:
        return TCPStore(host, port, **options)
    except NotImplementedError:  # torch 2.7: its libuv takes no socket that is open already
        return TCPStore(host, port, **options, use_libuv=False)


def open_store(serves: bool) -> PrefixStore:
    """Collective: the key-value store by which ranks watch each other; the rank that `serves` it is rank 0.

    Its names begin with a number that nobody can guess, sent through the process group: no stray process ends a run.
    """
    host, wait = os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=60)
    store = serve_store(host, wait) if serves else None
    port, secret = broadcast_object_list([store.port, secrets.token_hex(16)] if store else [0, ""])
    named = PrefixStore(secret, store or TCPStore(host, port, is_master=False, timeout=wait))
    if serves:
        named.set("turn", "0")
    return named


def pin_process_group() -> None:
    """Keep the process group's memory until this process ends; call it before the group is destroyed.

    Up to torch 2.7 its threads are waited for while Python's lock is held. One of them may still need that lock, to let go of the
    last collective's tensors: a finished run would never end (on two busy cores one in 40 did so).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(distributed.group.WORLD))
