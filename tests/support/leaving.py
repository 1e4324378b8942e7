"""Two ranks that meet and leave again, many times: `RANK=0 MASTER_PORT=29500 python tests/support/leaving.py`."""

import os
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, TCPStore

from harness.distributed.rendezvous import pin_process_group

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    store = TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, rank == 0, timedelta(seconds=20))
    for turn in range(150):
        distributed.init_process_group("gloo", store=PrefixStore(str(turn), store), rank=rank, world_size=2)
        distributed.broadcast_object_list([rank], 0)
        distributed.barrier()
        pin_process_group()
        distributed.destroy_process_group()
