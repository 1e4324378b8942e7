"""What could spoil a run, found before it starts: device, processes, cores, disk, data, weights.

In: settings, a `World`, or only the name of a GPU. Out: `Finding`s, each with what mends it. What stays true: a check
looks and changes nothing; what differs between ranks is told by the rank that differs.
"""

import math
import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import disk_usage
from typing import Literal

import torch
import torchvision

from harness.config import Config
from harness.distributed.hardware import available_cores, check_wheel, decode_threads
from harness.distributed.world import World
from harness.model.build import TIMM, outline
from harness.run.checkpoint import required_bytes
from shards.index import Dataset, load, verify

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "simplejpeg", "safetensors", "numpy")
FEW_IMAGES, FEW_STEPS = 16, 10  # below which batch statistics are noise, and a schedule is coarse
GPUS = {
    **{"p100": (6, 0), "v100": (7, 0), "t4": (7, 5), "a100": (8, 0), "a10": (8, 6), "rtx3090": (8, 6), "l4": (8, 9)},
    **{"rtx4090": (8, 9), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0), "rtx5090": (12, 0)},
}


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what mends it (a command, where there is one)."""

    level: Literal["ok", "warn", "fail"]
    name: str
    message: str
    fix: str = ""


def check_gpu(name: str, capability: tuple[int, int], architectures: list[str]) -> list[Check]:
    """Whether this torch runs on a GPU, and what the GPU can do.

    Args:
        name: for people. capability: as (6, 0). architectures: that torch was compiled for.
    """
    try:
        check_wheel(capability, architectures, name)
    except ValueError as error:
        text, _, cure = str(error).partition(". ")
        return [Check("fail", "GPU", text, cure)]
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
        capability = tuple(map(int, name.split(".")))
    if capability is None:
        raise ValueError(f"Unknown GPU {name!r}. Give one of {', '.join(GPUS)}, or its compute capability, as 6.0.")
    return check_gpu(name, capability, (torch._C._cuda_getArchFlags() or "").split())


def check_device() -> list[Check]:
    """The device of this process, with one small kernel run on it."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = "torch sees no GPU" if built else "this torch was built without CUDA"
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
        cure = f"accelerate launch --multi_gpu --num_processes {torch.cuda.device_count()} launch/train.py ..."
        found.append(Check("warn", "processes", f"{idle} more GPU(s) of this machine are not used", cure))
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


def check_consistency(world: World, dataset: Dataset | None) -> list[Check]:
    """Collective: package versions and the dataset, which must be the same on every rank."""
    here = versions() | {"dataset": dataset.fingerprint[:12] if dataset else "none"}
    (_, first), *others = world.all_gather_objects((world.host_pid, here))
    differing = [
        f"{name} is {there[name]} on rank {rank} ({who}) and {first[name]} on rank 0"
        for rank, (who, there) in enumerate(others, start=1)
        for name in there
        if there[name] != first[name]
    ]
    if differing:
        cure = "install the same versions, and copy the same dataset, on every machine"
        return [Check("fail", "sameness", text, cure) for text in differing]
    shown = ", ".join(f"{name} {here[name]}" for name in ("torch", "torchvision", "accelerate", "dermharness"))
    return [Check("ok", "versions", f"{shown}, Python {here['python']}")]


def check_cores(config: Config) -> list[Check]:
    """Cores that this process may use, and the threads that decode on them."""
    cores, threads = available_cores(), decode_threads(config.data.threads)
    text = f"{cores} core(s) for this process, {threads} decoding thread(s)"
    if torch.cuda.is_available() and cores < 4:
        return [Check("warn", "cores", f"{text}; a GPU wants some", "ask SLURM for --cpus-per-task=8, or more")]
    return [Check("ok", "cores", text)]


def check_disk(config: Config, n_classes: int) -> list[Check]:
    """Room for the checkpoints of a run."""
    model = outline(config.model.name, n_classes)
    found = []
    for place in dict.fromkeys(filter(None, (config.run.folder, config.run.checkpoint_dir))):
        there = next(path for path in (Path(place).absolute(), *Path(place).absolute().parents) if path.is_dir())
        free, needed = disk_usage(there).free, _room(place, model, config)
        text = f"{place}: {free / 1e6:.0f} MB free, and checkpoints of {config.model.name} need up to {needed / 1e6:.0f} MB"
        if free < needed:
            cure = f"make room, name another --run.folder, or lower --run.keep_checkpoints (now {config.run.keep_checkpoints})"
            found.append(Check("fail", "disk", text, cure))
        else:
            found.append(Check("ok", "disk", text))
    return found


def _room(place: str, model: torch.nn.Module, config: Config) -> int:
    return required_bytes(Path(place), model, config.optim.name, config.run.keep_checkpoints, config.optim.ema > 0)


def check_recipe(
    config: Config, model: torch.nn.Module, n_batches: int, n_ranks: int, stored: list[int]
) -> list[Check]:
    """What the number of processes and the images, stored at (width, height), make of the settings."""
    found, images = [], config.data.global_batch_size // n_ranks
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    synced = all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    piece = min(images, config.optim.micro_batch or images)
    if norms and not synced and piece < FEW_IMAGES:
        text = f"batch normalisation sees {piece} images at a time ({config.data.global_batch_size} over {n_ranks} processes)"
        cure = (
            "raise --data.global_batch_size (and the learning rate with it), or set --model.sync_batchnorm true on GPUs"
        )
        found.append(Check("warn", "recipe", text, cure))
    if n_batches < FEW_STEPS:
        text = f"an epoch has {n_batches} steps, each of {config.data.global_batch_size} images"
        found.append(Check("warn", "recipe", text, "lower --data.global_batch_size, or train for more epochs"))
    if (size := max(config.data.image_size, config.eval.image_size)) > min(stored):
        text = f"pictures are stored at {stored[0]}x{stored[1]} and enlarged to {size} pixels"
        cure = f"pack them larger: python -m shards pack SOURCE OUT --size {math.ceil(size * 4 / 3)}x{size}"
        found.append(Check("warn", "recipe", text, cure))
    return found


def check_data(config: Config) -> list[Check]:
    """The packed dataset, every byte of it."""
    if config.data.demo_images and not (Path(config.data.path) / "dataset.json").is_file():
        return [Check("ok", "data", f"{config.data.path} is not there yet: the demo draws it")]
    began = time.perf_counter()
    if wrong := verify(config.data.path):
        cure = f"copy the dataset again, or pack it: python -m shards pack PATH/TO/HAM10000 {config.data.path}"
        more = f" ({len(wrong) - 3} more)" if len(wrong) > 3 else ""
        return [Check("fail", "data", " ".join(wrong[:3]) + more, cure)]
    dataset = load(config.data.path)
    size = sum(shard.bytes for shard in dataset.shards) / 1e6
    seconds = time.perf_counter() - began
    text = f"{config.data.path}: {len(dataset.shards)} shards, {size:.0f} MB, checksums right ({seconds:.1f} s)"
    return [Check("ok", "data", f"{text}, dataset {dataset.fingerprint[:12]}")]


def check_weights(config: Config) -> list[Check]:
    """The weights that training starts from."""
    name, weights = config.model.name, config.model.weights
    if weights == "none":
        return [Check("ok", "weights", "none: training from scratch")]
    if not weights.startswith("imagenet1k_"):
        there = Path(weights).is_file()
        return [Check("ok" if there else "fail", "weights", f"{weights} is {'there' if there else 'not there'}")]
    if name.startswith(TIMM):
        return [Check("fail", "weights", f"{weights} are torchvision's, and the model is {name}", "a file, or none")]
    entries = {entry.name.lower(): entry for entry in torchvision.models.get_model_weights(name)}
    if weights not in entries:
        return [Check("fail", "weights", f"torchvision has no {weights} for {name}", f"one of {', '.join(entries)}")]
    path = Path(torch.hub.get_dir()) / "checkpoints" / entries[weights].url.rpartition("/")[2]
    if path.is_file():
        return [Check("ok", "weights", f"{path} is there")]
    cure = f"where there is no network, place the file at {path}, or set --model.weights none"
    return [Check("warn", "weights", f"{path.name} will be downloaded at the start", cure)]


def versions() -> dict[str, str]:
    """Of what takes part in the arithmetic."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, "dermharness"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def refuse(checks: list[Check]) -> None:
    """Raise if any of the findings is a problem.

    Raises:
        ValueError: the first of them, and what mends it.
    """
    for check in checks:
        if check.level == "fail":
            raise ValueError(f"{check.message}. To mend it: {check.fix}." if check.fix else check.message)
