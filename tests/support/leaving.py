"""Two ranks that meet and leave again, many times: `RANK=0 MASTER_PORT=29500 python tests/support/leaving.py`.

At the end a thread of the process group is in Python, and asks for the interpreter again and again.
"""

import os
import threading
import time
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore

from harness.distributed.rendezvous import pin_process_group
from shards.terminal import run_and_exit

ENTERED = threading.Event()


def ask_for_the_interpreter(done) -> None:
    ENTERED.set()
    for _ in range(1000):
        time.sleep(0.001)


def main() -> int:
    rank = int(os.environ["RANK"])
    store = TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, rank == 0, timedelta(seconds=20))
    for turn in range(151):
        distributed.init_process_group("gloo", store=PrefixStore(str(turn), store), rank=rank, world_size=2)
        distributed.broadcast_object_list([rank], 0)
        distributed.barrier()
        if turn == 150:
            time.sleep(rank / 2)  # rank 0's part is not done yet when it asks to be told
            distributed.all_reduce(torch.zeros(1), async_op=True).get_future().then(ask_for_the_interpreter)
            assert ENTERED.wait(20)
        pin_process_group()
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_and_exit(main)
