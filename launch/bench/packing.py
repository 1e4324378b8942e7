"""Packing: images/s and memory of a whole source, and of a plain Pillow loop over some of its images.

In: parsed options with the source's folder. Out: numbers by name. Invariants: the packer has a process of its own, so
that its peak memory is its own.
"""

import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from launch.bench import baselines
from shards.ham10000 import read_ham10000


def bench_pack(options: Namespace) -> dict:
    """Pack every image of a source in a process of its own, and some of them with a plain Pillow loop."""
    images = read_ham10000(options.source).images
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        words = ["pack", str(options.source), f"{scratch}/packed"]
        words += ["--protocol", "image", "--threads", str(options.threads)]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "shards", *words], capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise ValueError(f"packing failed: {done.stderr}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # KiB on Linux
        some = images["path"].iloc[:: max(1, len(images) // options.plain)]
        began = time.perf_counter()
        baselines.pack_plainly(list(some), Path(scratch) / "plain.tar")
        plain = len(some) / (time.perf_counter() - began)
    return {
        "images": len(images),
        "seconds": seconds,
        "images_per_s": len(images) / seconds,
        "peak_memory_mib": peak,
        "plain_pillow_images_per_s": plain,
        "ratio_to_plain_pillow": len(images) / seconds / plain,
    }
