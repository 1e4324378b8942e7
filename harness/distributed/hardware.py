"""Device capabilities: precision, memory format, whether this torch has kernels for the GPU, cores.

In: a device, and what was asked for. Out: choices with their reasons. Invariants: nothing here starts a kernel; what was
asked for is taken or refused, never replaced.
"""

import ctypes
import math
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from shards.files import usable_cores

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt(3), from glibc's malloc.h
CUBLAS, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # values with which cuBLAS repeats itself


def choose_precision(asked: str, device: torch.device) -> tuple[str, str]:
    """Pick the arithmetic of the forward pass.

    Args:
        asked: auto, fp32, bf16 or fp16.
        device: where the model runs.

    Returns:
        fp32, bf16 or fp16, and the reason, human-readable.

    Raises:
        ValueError: asked for what the device does not have.
    """
    if device.type == "cuda":
        # Without the argument, cards that only emulate bf16 (a T4) say yes and are slow.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if asked == "bf16" and not has_bf16:
            raise ValueError("'run.precision' bf16 needs a GPU that has it (Ampere or newer). Use auto or fp16.")
        if asked != "auto":
            return asked, "as asked"
        return ("bf16", "the GPU has it") if has_bf16 else ("fp16", "the GPU has no bf16")
    if asked == "fp16":
        raise ValueError("'run.precision' fp16 needs a GPU. Use auto, bf16 or fp32 on a CPU.")
    if asked != "auto":
        return asked, "as asked"
    if cpu_has_bf16():
        return "bf16", "the CPU has bf16 instructions"  # ResNet50, 64 px, batch 64: 2.1 times fp32 (AVX512-BF16)
    return "fp32", "the CPU has no bf16 instructions"


def choose_memory_format(asked: str, device: torch.device) -> torch.memory_format:
    """Memory format of images and weights.

    Tensor cores, and CPUs (4.8 against 2.2 images/s in fp32), take channels last without a copy. A P100 has no tensor
    cores, and its kernels are written for the other order.

    Args:
        asked: auto, on or off. device: where the model runs.
    """
    if asked == "auto":
        last = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (7, 0)
    else:
        last = asked == "on"
    return torch.channels_last if last else torch.contiguous_format


def set_arithmetic(tf32: bool, deterministic: bool) -> None:
    """Choose the kernels of this process, before it computes anything.

    Ours all have a deterministic kernel: the warps of augmentation have none backward, and nothing goes backward through them.

    Args:
        tf32: fp32 matrix products and convolutions may use TF32 on a GPU that has it.
        deterministic: only kernels that give the same bits again; an operation without one is an error.

    Raises:
        ValueError: deterministic, and CUDA started before cuBLAS could be told.
    """
    # Not torch.set_float32_matmul_precision: that would also change the products of CPUs which have TF32 (AMX-FP16).
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)
    if not deterministic:
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] - set by its module; it only finds bugs
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if os.environ.get(CUBLAS) not in REPEATABLE:  # cuBLAS reads it when CUDA starts
        if torch.cuda.is_initialized():
            raise ValueError(
                f"'run.deterministic' needs {CUBLAS}={REPEATABLE[0]} before CUDA starts. Set it in the environment."
            )
        os.environ[CUBLAS] = REPEATABLE[0]


def describe_arithmetic(device: torch.device) -> str:
    """What `set_arithmetic` chose, as `, TF32, deterministic`, as far as it concerns this device."""
    tf32 = device.type == "cuda" and uses_tf32(torch.cuda.get_device_capability(device))
    return ", TF32" * tf32 + ", deterministic" * torch.are_deterministic_algorithms_enabled()


def uses_tf32(capability: tuple[int, int]) -> bool:
    """Whether fp32 products use TF32 on a GPU of this compute capability."""
    return capability >= (8, 0) and bool(torch.backends.cuda.matmul.allow_tf32)


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions; False where the system does not tell."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
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
    if not architectures:
        raise ValueError(
            f"This torch ({torch.__version__}) was built without CUDA, so it cannot use {name}. Install the one of PyPI: pip install torch"
        )
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
        + (
            'pip install -e ".[legacy-gpu]" takes the newest torch that has them.'
            if (5, 0) <= capability < (7, 5)
            else "Install a torch that was built for it."
        )
    )


def check_compile(device: torch.device) -> None:
    """Refuse `run.compile` where torch.compile cannot make kernels.

    On 2 CPU cores it did nothing for ResNet50 (64 px, batch 64, bf16: 110 and 117 images/s compiled, 115 and 101 not).

    Raises:
        ValueError: an older GPU, or no compiler.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (7, 0):
        raise ValueError(
            f"'run.compile' needs a V100 (sm_70) or newer: Triton makes no kernels for sm_{found[0]}{found[1]}. Set it to false."
        )
    names = ("cc", "gcc", "clang") if device.type == "cuda" else ("g++", "c++", "clang++")
    asked = os.environ.get("CC" if device.type == "cuda" else "CXX", "")
    if not any(shutil.which(name) for name in (*asked.split()[:1], *names)):
        raise ValueError(
            f"'run.compile' needs a compiler ({' or '.join(names)}), and none was found. Install one, or set it to false."
        )


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors free, for those of the next step; where it is not glibc, do nothing.

    What goes back to the system is cleared again, page by page, when it is taken again. Training EfficientNet-Lite0 at 128
    pixels in batches of 64 (2 cores, bf16): 105 images/s in place of 89, a tenth of the page faults, and a peak of 2.4 GB in
    place of 1.9.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)


def set_thread_device(device: torch.device) -> None:
    """For a new thread: without it, CUDA calls in it open a context on GPU 0, whichever GPU the process has.

    A device without a number is the thread's own one, and stays so: `set_device` refuses it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def available_cores() -> int:
    """Cores that this process may use: its share, beside the launcher's other processes, of the tightest of `core_limits`."""
    return max(1, min(core_limits().values()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def core_limits() -> dict[str, int]:
    """What limits the cores of this process and its neighbours, by name.

    Not every cluster binds a job to its cores, and `docker --cpus` and Kubernetes bind to none: they grant a share of the
    time of all. So the affinity alone may be that of a whole node.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux alone
    limits = {"its CPU affinity" if has_affinity else "this machine": usable_cores()}
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if os.environ.get(name, "").isdigit():
            limits[name] = int(os.environ[name])
            break
    if (quota := quota_cores()) is not None:
        limits["the CPU quota of its container"] = quota
    return limits


def quota_cores(root: Path = Path("/")) -> int | None:
    """Cores whose time the control groups of this process grant, rounded up; None without a quota.

    The tightest of its group and all above it, in version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`). A container may see its
    path on the host, where its own group is mounted as the topmost: groups that are not there are passed over.

    Args:
        root: where /proc and /sys are.
    """
    shares = [share for group in _control_groups("cpu", root) if (share := _quota_of_group(group)) is not None]
    return max(1, math.ceil(min(shares))) if shares else None


def _control_groups(controller: str, root: Path) -> list[Path]:
    """The control groups of this process for a controller, and all above them."""
    found = []
    with suppress(OSError, UnicodeDecodeError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            names = [] if ".." in path else path.strip("/").split("/")
            found += [mount.joinpath(*names[:depth]) for depth in range(len(names) + 1)]
    return found


def _quota_of_group(group: Path) -> float | None:
    """Cores that one control group may use, None where it has no quota or cannot be read."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
            if quota != "max" and int(quota) > 0:
                return int(quota) / int(period)
    return None


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may still take: of the machine, or of the tightest of its control groups.

    What a group holds of files counts as free, as it does for the machine.

    Args:
        root: where /proc and /sys are.
    """
    free = [psutil.virtual_memory().available]
    for group in _control_groups("memory", root):
        for limit, usage, files in (
            ("memory.max", "memory.current", "inactive_file "),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
        ):
            with suppress(OSError, ValueError):
                most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
                lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
                free.append(most - used + sum(int(line.split()[1]) for line in lines if line.startswith(files)))
    return max(0, min(free))


def decode_threads(asked: int) -> int:
    """Decoding threads for this process: what was asked, else one for each of its cores."""
    return asked or available_cores()
