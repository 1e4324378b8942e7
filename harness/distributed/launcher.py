"""What the launcher's environment announced: a GPU for this rank, and the process group that Accelerate starts.

In: LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and the like. Out: an `Accelerator`, or an error that says how to start the processes.
"""

import os
import socket
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed import DistNetworkError, DistStoreError

from harness.distributed.hardware import check_wheel

COLLECTIVE_TIMEOUT_S = 600.0  # how long processes wait for each other


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
        return Accelerator(
            cpu=not cuda,  # without it, ranks on a machine without CUDA each believe to be alone
            mixed_precision={"fp32": "no"}.get(precision, precision),
            # The environment may say otherwise.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
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
