"""What the device can truly do: precision, memory layout, and whether this torch runs on it at all.

In: a device, and what was asked for. Out: names of choices with their reasons.
"""

import os
from pathlib import Path

import torch


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """Pick the arithmetic of the forward pass.

    Args:
        asked: auto, fp32, bf16 or fp16.
        device: where the model runs.

    Returns:
        fp32, bf16 or fp16, and why, for people.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if device.type == "cuda":
        if asked != "auto":
            return asked, "as asked"
        # Without the argument, cards that only emulate bf16 (a T4) say yes and are slow.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has it"
        return "fp16", "the GPU has no bf16"
    if asked == "fp16":
        raise ValueError("'run.precision' fp16 needs a GPU. Use auto, bf16 or fp32 on a CPU.")
    if asked != "auto":
        return asked, "as asked"
    if cpu_has_bf16():
        return "bf16", "the CPU has bf16 instructions"  # ResNet50, 64 px, batch 64: 2.1 times fp32 (AVX512-BF16)
    return "fp32", "the CPU has no bf16 instructions"


def cpu_has_bf16() -> bool:
    """Whether bf16 runs in hardware; False where the system does not tell."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def check_wheel(capability: tuple[int, int], architectures: list[str], name: str) -> None:
    """Refuse a GPU that this build of torch has no kernels for.

    A kernel compiled for sm_XY runs on devices of the same major version X with at least the minor version Y; one
    kept as compute_XY (PTX) also runs on anything newer.

    Args:
        capability: of the device, as (6, 0).
        architectures: of the wheel, as `torch.cuda.get_arch_list()` gives them.
        name: of the device.

    Raises:
        ValueError: saying which torch to install.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = "".join(letter for letter in number if letter.isdigit())
        if kind not in ("sm", "compute"):  # AMD's names: nothing to compare
            return
        has = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and has[0] == major and has[1] <= minor) or (kind == "compute" and has <= capability):
            return
    raise ValueError(
        f"This torch ({torch.__version__}) has no kernels for {name} (sm_{major}{minor}); it has {', '.join(architectures)}. "
        "For a P100 or V100 install: pip install 'torch==2.7.1' 'torchvision==0.22.1'"
    )


def use_device(device: torch.device) -> None:
    """For a new thread: without it, CUDA calls in it open a context on GPU 0, whichever GPU the process has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def own_cores() -> int:
    """Cores that this process may use: its affinity and SLURM's allocation, shared with the launcher's other processes.

    Not every cluster binds a job to its cores, so the affinity alone may tell of a whole node.
    """
    cores = len(os.sched_getaffinity(0))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            cores = min(cores, int(os.environ[name]))
            break
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def decode_threads(asked: int) -> int:
    """Decoding threads for this process: what was asked, else one for each of its cores."""
    return asked or own_cores()
