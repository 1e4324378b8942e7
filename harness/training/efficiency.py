"""What training took of the machine: memory, and the share of the GPU's arithmetic.

In: a `World`, the model's name, images/s. Out: numbers for the log. Invariants: what is not known (a GPU whose peak is not
listed, a model whose operations cannot be counted) is left out.
"""

from functools import lru_cache

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.config import Config
from harness.distributed.hardware import uses_tf32
from harness.distributed.world import World
from harness.model.build import outline

# Peak TFLOP/s of NVIDIA's data sheets, dense: fp16 and bf16 (by tensor cores where there are any), TF32, fp32. GeForce cards are
# left out: their peak depends on what sums are kept in.
PEAKS = {
    "P100-PCIE": (18.7, None, 9.3),
    "P100-SXM2": (21.2, None, 10.6),
    "V100-PCIE": (112.0, None, 14.0),
    "V100-SXM2": (125.0, None, 15.7),
    "Tesla T4": (65.0, None, 8.1),
    "A100-PCIE": (312.0, 156.0, 19.5),
    "A100-SXM4": (312.0, 156.0, 19.5),
    "A100 80GB PCIe": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100 80GB HBM3": (989.4, 494.7, 66.9),
    "NVIDIA H200": (989.4, 494.7, 66.9),
    "NVIDIA B200": (2250.0, 1120.0, 75.0),
}
BACKWARD = 2  # a backward pass costs two forward passes: one for the weights, one for the inputs


def efficiency(config: Config, world: World, n_classes: int, images_per_s: float) -> dict[str, float]:
    """Collective: what an epoch took, of the rank that took most.

    Returns:
        `rss_bytes` (resident memory of the process, now), and on a GPU `peak_gpu_bytes` (largest allocation since the last
        call) and, where it is known, `mfu` (model FLOP utilisation, 0 to 1).
    """
    here = {"rss_bytes": psutil.Process().memory_info().rss}
    if world.device.type == "cuda":
        here["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
    ranks = world.all_gather_objects(here)
    found: dict[str, float] = {name: max(rank[name] for rank in ranks) for name in here}
    share = mfu(config, world, n_classes, images_per_s)
    return found if share is None else found | {"mfu": share}


def mfu(config: Config, world: World, n_classes: int, images_per_s: float) -> float | None:
    """Model FLOP utilisation (Chowdhery et al., 2022): arithmetic of the model over what the GPUs could do, 0 to 1; None if unknown."""
    if world.device.type != "cuda":
        return None
    device = torch.cuda.get_device_properties(world.device)
    peak = peak_flops(device.name, world.precision, uses_tf32((device.major, device.minor)))
    flops = peak and training_flops(config.model.name, n_classes, config.data.image_size)
    return images_per_s * flops / (peak * world.size) if peak and flops else None


def describe_mfu(config: Config, world: World, n_classes: int, images_per_s: float) -> str:
    """The same as the end of a sentence; empty where it is not known."""
    share = mfu(config, world, n_classes, images_per_s)
    return (
        "" if share is None else f"; {share:.0%} of the peak arithmetic of {torch.cuda.get_device_name(world.device)}"
    )


def peak_flops(gpu: str, precision: str, tf32: bool) -> float | None:
    """Peak FLOP/s of a GPU, by the name that torch gives it; None if it is not listed, is a part of one (MIG), or a slower kind (NVL)."""
    for name, (half, with_tf32, single) in PEAKS.items():
        if name in gpu and "MIG" not in gpu and "NVL" not in gpu:
            return 1e12 * (half if precision != "fp32" else with_tf32 if tf32 and with_tf32 else single)
    return None


@lru_cache
def training_flops(name: str, n_classes: int, size: int) -> float | None:
    """FLOPs of one training image, forward and backward: two for each multiplication of the matrix products and convolutions.

    Args:
        name: of the model. size: of its square input, in pixels.
    """
    model = outline(name, n_classes).eval()
    device = next(model.parameters()).device
    try:
        with FlopCounterMode(display=False) as counter, torch.device(device), torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except RuntimeError:  # an operation that the meta device does not have
        return None
    return (1 + BACKWARD) * counter.get_total_flops() or None
