"""What the launcher's environment announced: a GPU for this rank, and the process group that Accelerate starts.

In: LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ACCELERATE_USE_CPU and the like. Out: an `Accelerator`, or an error that says how to
start the processes. Invariants: `accelerate launch` has a settings file, which may have been made for another job; what of it
would change the arithmetic is refused, or has no effect and is said.
"""

import logging
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
)
from torch.distributed import DistNetworkError, DistStoreError

from harness.distributed import rendezvous
from harness.distributed.hardware import check_wheel

LOGGER = logging.getLogger("dermharness")
PARALLELISM = {  # what a variable of Accelerate turns on
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own data parallelism",
}
OVERRIDDEN = {  # variables of Accelerate that have no effect here: their name for people, the values that ask for nothing
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo {} (the setting is run.compile)", ("NO",)),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "{} gradient accumulation steps (the setting is optim.micro_batch)",
        ("1", "AUTO"),
    ),
    "ACCELERATE_MIXED_PRECISION": ("precision {} (the setting is run.precision)", ("NO", "BF16", "FP16")),
    "ACCELERATE_TORCH_DEVICE": ("device {}", ()),
}


def asked_for_cpu(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu`, or its settings file, asked for the CPU."""
    return environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def tasks_apart(environment: Mapping[str, str]) -> int:
    """Tasks of a job step (srun) or of mpirun, which tell a program their number in ways that are not asked here; 1 without."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    return max((int(number) for name in names if (number := environment.get(name, "")).isdecimal()), default=1)


def uses_cuda() -> bool:
    """Whether this process computes on a GPU: there is one, and the launcher was not asked for the CPU."""
    return torch.cuda.is_available() and not asked_for_cpu(os.environ)


def launched_precision(precision: str, environment: Mapping[str, str]) -> str:
    """What `run.precision` says; where it is auto, what `accelerate launch --mixed_precision` was given."""
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    return launched if precision == "auto" and launched in ("bf16", "fp16") else precision


def refuse_other_parallelism(environment: Mapping[str, str], file: str) -> None:
    """Refuse what shards the model, or trains by other means than DistributedDataParallel.

    Args:
        file: of the launcher's settings, as `settings_file` names it.

    Raises:
        ValueError: what was asked for, where, and how to start without it.
    """
    for name, kind in PARALLELISM.items():
        is_plain = name.endswith("SAGEMAKER") and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO"
        if environment.get(name, "").lower() == "true" and not is_plain:
            raise ValueError(_not_data_parallel(kind, file))


def overridden(environment: Mapping[str, str]) -> list[str]:
    """What the launcher was asked for that has no effect, with the setting that stands for it."""
    return [
        text.format(environment[name])
        for name, (text, nothing) in OVERRIDDEN.items()
        if environment.get(name) and environment[name].upper() not in nothing
    ]


def settings_file(words: list[str], default: Path) -> str:
    """The settings file of the launcher with this command line; `the environment` where there is none.

    Args:
        default: the file that `accelerate launch` reads where none is named.
    """
    if any("accelerate" in word for word in words):
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, _, value = word.partition("=")
            if name in ("--config_file", "--config-file"):
                return value or following
        if default.is_file():
            return str(default)
    return "the environment"


def _file_of_launcher() -> str:
    words: list[str] = []
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    return settings_file(words, Path(default_config_file))


def _not_data_parallel(kind: str, file: str) -> str:
    return (
        f"`accelerate launch` asks for {kind} ({file}), and this harness trains data parallel alone. To override it, start "
        "with `accelerate launch --multi_gpu --num_processes N launch/train.py ...`, or one process with "
        "`python launch/train.py ...`."
    )


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
    """Accelerate, with what its environment and settings file may not change.

    Raises:
        ValueError: they ask for another parallelism than DistributedDataParallel's.
        ConnectionError: the processes did not find each other in time.
    """
    file = _file_of_launcher()
    refuse_other_parallelism(os.environ, file)
    os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    accelerator = _join(precision, cuda)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(_not_data_parallel(accelerator.distributed_type.value, file))
    return accelerator


def asked_in_vain(environment: Mapping[str, str], cuda: bool) -> list[str]:
    """What `accelerate launch` was asked for and that has no effect, in sentences. cuda: whether a GPU is used."""
    file, said = _file_of_launcher(), []
    if names := overridden(environment):
        said.append(f"without effect, though `accelerate launch` was asked for it ({file}): {', '.join(names)}")
    if torch.cuda.is_available() and not cuda:
        said.append(f"the GPU is not used, since `accelerate launch` was asked for the CPU ({file})")
    return said


def _join(precision: str, cuda: bool) -> Accelerator:
    wait = timedelta(seconds=rendezvous.COLLECTIVE_TIMEOUT_S)
    try:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            rendezvous.meet_again("nccl" if cuda else "gloo", wait)
        return Accelerator(
            cpu=not cuda,  # without it, ranks on a machine without CUDA each believe to be alone
            mixed_precision={"fp32": "no"}.get(precision, precision),
            # The environment may say otherwise.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),  # pyright: ignore[reportArgumentType] - it takes the name, too
            kwargs_handlers=[
                # Statistics of batch normalisation are averaged when the ranks synchronise, not sent in each forward pass.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=wait),
            ],
        )
    except (DistStoreError, DistNetworkError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"Process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} on {socket.gethostname()} did "
            f"not meet the others at {place} ({str(error).splitlines()[0]}). Start all of them within "
            f"{wait.total_seconds() / 60:.0f} minutes, with the address of the first one's machine and an open port."
        ) from error
