"""Measure, on this machine: `python launch/bench.py pack --source PATH/TO/HAM10000`.

Each subcommand prints a short table and, with --json FILE, writes its numbers. Machines differ and are shared: compare
the ratios of one run.
"""

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageOps

from shards.catalogue import read_ham10000


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark."""
    options = _parser().parse_args(arguments)
    try:
        numbers = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers["machine"] = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for name, value in numbers.items():
        print(f"{name:<24} {value if not isinstance(value, float) else round(value, 2)}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def bench_pack(options) -> dict:
    """Pack every image of a source in a process of its own, and some of them with a plain Pillow loop."""
    images = read_ham10000(options.source).images
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        words = [
            "pack",
            str(options.source),
            f"{scratch}/packed",
            "--protocol",
            "image",
            "--threads",
            str(options.threads),
        ]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "shards", *words], capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise ValueError(f"packing failed: {done.stderr}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # KiB on Linux
        some = images["path"].iloc[:: max(1, len(images) // options.plain)]
        began = time.perf_counter()
        pack_plainly(list(some), Path(scratch) / "plain.tar")
        plain = len(some) / (time.perf_counter() - began)
    return {
        "images": len(images),
        "seconds": seconds,
        "images_per_s": len(images) / seconds,
        "peak_memory_mib": peak,
        "plain_pillow_images_per_s": plain,
        "ratio_to_plain_pillow": len(images) / seconds / plain,
    }


def pack_plainly(paths: list[str], out: Path) -> None:
    """What one writes first: open, resize to 341x256, save as JPEG, add to a tar, one image after the other."""
    with tarfile.open(out, "w") as tar:
        for number, path in enumerate(paths):
            picture = ImageOps.fit(Image.open(path).convert("RGB"), (341, 256), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            picture.save(data, "JPEG", quality=90)
            entry = tarfile.TarInfo(f"{number:08d}.jpg")
            entry.size = data.tell()
            data.seek(0)
            tar.addfile(entry, data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/bench.py", description="Measure on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("pack", help="images/s and memory of packing, beside a plain Pillow loop")
    command.add_argument("--source", type=Path, required=True, help="HAM10000 folder")
    command.add_argument("--threads", type=int, default=0, help="decoding threads (default: one a core)")
    command.add_argument("--plain", type=int, default=1000, help="images of the plain loop (default 1000)")
    command.add_argument("--scratch", type=Path, help="folder for what is written meanwhile (default: the system's)")
    command.set_defaults(run=bench_pack)
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="write the numbers here, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
