"""The order of very many samples, on one rank of very many: memory, seconds to the first batch, milliseconds to look one up.

In: parsed options. Out: numbers by name. Invariants: `shards.csv` and `dataset.json` are real files of the size asked for; each number of
lanes has a process of its own, which keeps what a training keeps, and its memory is what that process has, or had at most, beyond one that only imports the same modules.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np

from shards.description import FORMAT, Description
from shards.files import sha256
from shards.index import load
from shards.plan import Plan, rank_slice
from shards.reader import SplitReader
from shards.shard_list import SHARD_COLUMNS, TAR_BLOCK

NODE_RANKS, NODE_STEPS, LOOK_UPS = 8, 1000, 50


def bench_plan(options: Namespace) -> dict:
    """One rank of `--ranks`, with one lane and with `--lanes`, over `--shards` shards of `--shard-samples` samples."""
    found = {"samples": options.shards * options.shard_samples, "shards": options.shards, "ranks": options.ranks}
    if (n_batches := found["samples"] // (options.batch * options.ranks)) < 4:
        raise ValueError(
            f"An epoch of {n_batches} batches is too short to measure. Lower --batch or --ranks, or raise --shards."
        )
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        write_index(Path(scratch), options.shards, options.shard_samples)
        imports = _in_a_process(scratch, options, 0)
        for lanes in dict.fromkeys((1, options.lanes)):
            measured = _in_a_process(scratch, options, lanes)
            measured |= {name: measured[name] - imports[name] for name in imports}
            found |= {f"{name}, {lanes} lane(s)": value for name, value in measured.items()}
    return found


def write_index(folder: Path, n_shards: int, samples: int) -> None:
    """The index files of a dataset with one split, as packing writes them, without tars and tables."""
    rows = (
        f"train-{n:06d}.tar,train,{samples},{samples * 20 * TAR_BLOCK},{n:064x},{n + n_shards:064x}\n"
        for n in range(n_shards)
    )
    with open(folder / "shards.csv", "w", encoding="utf-8", newline="") as file:
        file.write(",".join(SHARD_COLUMNS) + "\n")
        file.writelines(rows)
    description = Description(
        format=FORMAT,
        classes=["a", "b"],
        size=[64, 64],
        fit="cover",
        quality=90,
        protocol={"name": "none"},
        aliases={},
        counts={"train": {"a": n_shards * samples, "b": 0}},
        left_out=0,
        warnings=[],
        source={"name": "none"},
        files={"shards.csv": sha256(folder / "shards.csv")},
    )
    (folder / "dataset.json").write_bytes(description.to_bytes())


def measure_rank(folder: str, lanes: int, batch: int, ranks: int, block_shards: int) -> dict[str, float]:
    """What one rank, that of half the number, needs to look up its batches; lanes 0: its imports alone.

    Args:
        batch: images of this rank. ranks: of the run. block_shards: `data.shuffle_block_shards`.
    """
    if lanes == 0:
        return memory_mb()
    wall, began = time.perf_counter(), time.process_time()
    reader = SplitReader(load(folder), "train")
    plan = Plan(reader.shard_sizes, batch * ranks, 0, lanes, block_shards)
    start, stop = rank_slice(plan.global_batch, ranks // 2, ranks)

    def look_up(number: int) -> np.ndarray:
        return plan.locate(0, np.arange(start, stop) + number * plan.global_batch)[0]

    look_up(0)
    found = {"first_batch_s": time.perf_counter() - wall, "first_batch_cpu_s": time.process_time() - began}
    middle, began = plan.n_batches // 2, time.process_time()
    look_up(middle)
    found["resume_after_load_cpu_s"] = time.process_time() - began
    began = time.process_time()
    numbers = range(middle + 1, min(middle + 1 + LOOK_UPS, plan.n_batches))
    for number in numbers:
        look_up(number)
    found["look_up_cpu_ms"] = 1e3 * (time.process_time() - began) / len(numbers)
    found |= memory_mb()
    return found | {"shards_of_a_node": _shards_of_a_node(plan, ranks)}


def memory_mb() -> dict[str, float]:
    """Memory of this process, now and at most so far, in MB."""
    status = Path("/proc/self/status").read_text()
    names = {"rss_mb": "VmRSS:", "peak_mb": "VmHWM:"}
    return {name: int(status.split(word)[1].split()[0]) / 1024 for name, word in names.items()}


def _shards_of_a_node(plan: Plan, ranks: int) -> int:
    """Distinct shards that the first 8 ranks read in the first 1,000 batches."""
    stop = rank_slice(plan.global_batch, min(NODE_RANKS, ranks) - 1, ranks)[1]
    seen = np.zeros(len(plan.shard_sizes), bool)
    for number in range(min(NODE_STEPS, plan.n_batches)):
        seen[plan.locate(0, np.arange(stop) + number * plan.global_batch)[0]] = True
    return int(seen.sum())


def _in_a_process(folder: str, options: Namespace, lanes: int) -> dict[str, float]:
    code = "import json, sys, harness.data.loader; from launch.bench.plan import measure_rank; "
    code += "print(json.dumps(measure_rank(sys.argv[1], *map(int, sys.argv[2:]))))"
    words = [folder, *map(str, (lanes, options.batch, options.ranks, options.block_shards))]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"a rank failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout)
