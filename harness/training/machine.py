"""Checks of a machine that only the doctor makes, or that need no run: a GPU by name, all-reduce, cores, every byte of the data."""

import os
import platform
import re
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import disk_usage

import torch

from harness.config import Config
from harness.distributed.hardware import available_cores, check_wheel, core_limits, decode_threads
from harness.distributed.launcher import uses_cuda
from harness.distributed.world import World
from harness.training.check import Check
from shards.index import load, verify
from shards.storage import is_url, without_secrets

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "simplejpeg", "safetensors", "numpy")
FEW_SHARED_BYTES = 2**29
GPUS = {
    **{"p100": (6, 0), "v100": (7, 0), "t4": (7, 5), "a100": (8, 0), "a10": (8, 6), "rtx3090": (8, 6), "l4": (8, 9)},
    **{"rtx4090": (8, 9), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "rtx5090": (12, 0)},
}


def check_gpu(name: str, capability: tuple[int, int], architectures: list[str]) -> list[Check]:
    """Whether this torch runs on a GPU, and what the GPU can do.

    Args:
        name: for people. capability: as (6, 0). architectures: that torch was compiled for.
    """
    try:
        check_wheel(capability, architectures, name)
    except ValueError as error:
        text, _, fix = str(error).partition(". ")
        return [Check("fail", "GPU", text, fix)]
    can = [
        "fp16 with a loss scaler" if capability < (8, 0) else "bf16",
        "tensor cores" if capability >= (7, 0) else "no tensor cores",
        "TF32" if capability >= (8, 0) else "no TF32",
        "torch.compile" if capability >= (7, 0) else "no torch.compile",
    ]
    return [Check("ok", "GPU", f"{name} (sm_{capability[0]}{capability[1]}): auto is {', '.join(can)}")]


def check_named_gpu(name: str) -> list[Check]:
    """The same for a GPU that is not here, by its name or as 6.0.

    Raises:
        ValueError: an unknown name.
    """
    capability = GPUS.get(name.lower().replace(" ", ""))
    if capability is None and re.fullmatch(r"\d+\.\d", name):
        major, minor = name.split(".")
        capability = int(major), int(minor)
    if capability is None:
        raise ValueError(f"Unknown GPU {name!r}. Give one of {', '.join(GPUS)}, or its compute capability, as 6.0.")
    return check_gpu(name, capability, (torch._C._cuda_getArchFlags() or "").split())


def check_device() -> list[Check]:
    """The device of this process, with one small kernel run on it."""
    if not uses_cuda():
        built = torch.version.cuda
        note = "torch sees no GPU" if built else "this torch was built without CUDA"
        note = "as the launcher was asked" if torch.cuda.is_available() else note
        return [Check("ok", "device", f"CPU ({note})")]
    number = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(number)
    found = check_gpu(properties.name, (properties.major, properties.minor), torch.cuda.get_arch_list())
    if found[0].level == "ok":
        try:
            torch.nn.functional.conv2d(
                torch.ones(1, 3, 8, 8, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda")
            ).cpu()
        except RuntimeError as error:
            found.append(Check("fail", "GPU", f"a small kernel fails: {str(error).splitlines()[0]}", "nvidia-smi"))
    return found


def check_allreduce(world: World) -> list[Check]:
    """Collective: how many processes, and how fast they sum (64 MiB of float32, as in a step of ResNet50)."""
    found = [Check("ok", "processes", world.describe())]
    idle = torch.cuda.device_count() - world.size if world.device.type == "cuda" else 0
    if idle > 0 and world.size == 1:
        fix = f"accelerate launch --multi_gpu --num_processes {torch.cuda.device_count()} launch/train.py ..."
        found.append(Check("warn", "processes", f"{idle} more GPU(s) of this machine are not used", fix))
    if world.size > 1:
        numbers = torch.ones(2**24, device=world.device)
        world.all_reduce_sum(numbers)
        world.synchronize()
        began = time.perf_counter()
        total = world.all_reduce_sum(numbers)
        world.synchronize()
        seconds = time.perf_counter() - began
        right = bool((total == world.size).all())
        rate = numbers.numel() * 4 / seconds / 1e9
        text = f"64 MiB over {world.size} processes in {1e3 * seconds:.0f} ms ({rate:.2f} GB/s)"
        found.append(Check("ok" if right else "fail", "all-reduce", text if right else "the sum is wrong"))
    return found


def check_consistency(world: World, dataset: str) -> list[Check]:
    """Collective: package versions and the dataset's fingerprint, which must be the same on every rank."""
    here = versions() | {"dataset": dataset}
    (_, first), *others = world.all_gather_objects((world.host_pid, here))
    differing = [
        f"{name} is {there[name]} on rank {rank} ({who}) and {first[name]} on rank 0"
        for rank, (who, there) in enumerate(others, start=1)
        for name in there
        if there[name] != first[name]
    ]
    if differing:
        fix = "install the same versions, and copy the same dataset, on every machine"
        return [Check("fail", "consistency", text, fix) for text in differing]
    shown = ", ".join(f"{name} {here[name]}" for name in ("torch", "torchvision", "accelerate", "dermharness"))
    return [Check("ok", "versions", f"{shown}, Python {here['python']}")]


def check_cores(config: Config) -> list[Check]:
    """Cores that this process may use, and the threads that decode on them."""
    cores, threads = available_cores(), decode_threads(config.data.threads)
    limit, granted = min(core_limits().items(), key=lambda item: item[1])
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = f", shared by {n_here} processes" if n_here > 1 else ""
    text = f"{cores} core(s) for this process ({granted} of {limit}{shared}), {threads} decoding thread(s)"
    if uses_cuda() and cores < 4:
        fix = "ask SLURM for --cpus-per-task=8, docker for --cpus=8, Kubernetes for a higher limit of cpu, or more"
        return [Check("warn", "cores", f"{text}; a GPU wants some", fix)]
    return [Check("ok", "cores", text)]


def shared_memory() -> int | None:
    """Bytes of /dev/shm, None where there is none."""
    with suppress(OSError):
        return disk_usage("/dev/shm").total
    return None


def check_shared_memory(n_gpus: int, size: int | None) -> list[Check]:
    """Room for what NCCL exchanges between the GPUs of a machine; containers have 64 MiB unless told otherwise.

    Args:
        n_gpus: used on this machine. size: of /dev/shm in bytes, None where there is none.
    """
    if n_gpus < 2 or size is None or size >= FEW_SHARED_BYTES:
        return []
    text = f"/dev/shm has {size / 2**20:.0f} MiB, and {n_gpus} GPUs exchange gradients through it: NCCL may fail"
    fix = "docker run --shm-size=1g (or --ipc=host); Kubernetes: mount an emptyDir with medium: Memory at /dev/shm"
    return [Check("warn", "shared memory", text, fix)]


def check_data_files(config: Config) -> list[Check]:
    """The packed dataset, every byte of it."""
    if config.data.demo_images and not (Path(config.data.path) / "dataset.json").is_file():
        return [Check("ok", "data files", f"{config.data.path} is not there yet: the demo draws it")]
    if is_url(config.data.path):
        text = "each file is compared with its SHA-256 when it is downloaded"
        return [Check("ok", "data files", f"{without_secrets(config.data.path)}: {text}")]
    began = time.perf_counter()
    if wrong := verify(config.data.path):
        fix = f"copy the dataset again, or pack it: python -m shards pack SOURCE {config.data.path}"
        more = f" ({len(wrong) - 3} more)" if len(wrong) > 3 else ""
        return [Check("fail", "data files", " ".join(wrong[:3]) + more, fix)]
    dataset = load(config.data.path)
    size = int(dataset.shards.bytes.sum()) / 1e6
    seconds = time.perf_counter() - began
    text = f"{config.data.path}: {len(dataset.shards)} shards, {size:.0f} MB, checksums right ({seconds:.1f} s)"
    return [Check("ok", "data files", f"{text}, dataset {dataset.fingerprint[:12]}")]


def versions() -> dict[str, str]:
    """Of what takes part in the arithmetic."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, "dermharness"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
