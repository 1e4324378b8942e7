"""Measure, on this machine: `python -m launch.bench loader --data.path data/ham10000`.

Each subcommand prints a short table and, with --json FILE, writes its numbers. Those that train or load take the
settings of `launch/train.py`. Machines differ and are shared: compare the ratios of one run.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from harness.config import read_config
from harness.data.augment import training_view
from harness.data.loader import training_batches
from harness.distributed.hardware import available_cores
from harness.evaluation.predict import predict
from harness.run.checkpoint import Provenance, save_step
from harness.run.progress import Progress
from launch.bench import baselines as peers
from launch.bench.setup import Trial, rate, seconds_of, training_input
from launch.train import DEMO
from shards.catalogue import read_ham10000
from shards.index import load
from shards.reader import SplitReader


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark."""
    options, settings = _parser().parse_known_args(arguments)
    if settings and options.run is bench_pack:
        _parser().error(f"unknown words: {' '.join(settings)}")
    try:
        options.config = read_config(settings, DEMO)
        numbers = options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers["machine"] = {
        "cores": available_cores(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name, value in numbers.items():
        print(f"{name:<40} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def bench_loader(options) -> dict:
    """Images/s of the loader alone, and of threads that decode the same pictures from memory and do nothing else."""
    reader, plan, loader_options = training_input(options.config)
    blobs = peers.all_pictures(reader)
    ours, ceiling = [], []
    for epoch in range(options.rounds):
        ours.append(
            rate(
                lambda epoch=epoch: (
                    len(b.keys) for b in training_batches(reader, plan, epoch, 0, 0, 1, loader_options)
                )
            )
        )
        ceiling.append(peers.decode_from_memory(blobs, reader, loader_options.threads, plan.global_batch))
    return {
        "images_per_s": max(ours),
        "images_per_s_and_thread": max(ours) / loader_options.threads,
        "decode_ceiling_images_per_s": max(ceiling),
        "share_of_the_ceiling": max(ours) / max(ceiling),
        "threads": loader_options.threads,
    }


def bench_step(options) -> dict:
    """Milliseconds of an optimizer step on a batch that is there, and of its augmentation."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    views = trial.view(batch)
    step = min(seconds_of(lambda: trial.step(views, batch.labels), trial.world) for _ in range(options.rounds * 3))
    augment = min(seconds_of(lambda: trial.view(batch), trial.world) for _ in range(options.rounds * 3))
    n = len(batch.keys)
    return {
        "step_ms": 1e3 * step,
        "step_images_per_s": n / step,
        "augment_ms": 1e3 * augment,
        "augment_share_of_step": augment / step,
        "setting": trial.describe(),
    }


def bench_augment(options) -> dict:
    """Milliseconds of augmentation for a batch that is there, and images/s."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    seconds = min(seconds_of(lambda: trial.view(batch), trial.world) for _ in range(options.rounds * 3))
    return {"augment_ms": 1e3 * seconds, "images_per_s": len(batch.keys) / seconds, "setting": trial.describe()}


def bench_train(options) -> dict:
    """The real loop (read, decode, augment, step) and its ratio to steps on a batch that is there, in turns.

    Between the two: the same steps beside the decoding threads, which tells what these cost them.
    """
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    views = trial.view(batch)
    n = min(options.batches, trial.plan.n_batches)
    waited = []

    def synthetic(epoch: int) -> None:
        for _ in range(n):
            trial.step(views, batch.labels)

    def beside_decoding(epoch: int) -> None:
        for _ in islice(trial.batches(epoch), n):
            trial.step(views, batch.labels)

    def real(epoch: int) -> None:
        for loaded in islice(trial.batches(epoch), n):
            waited.append(loaded.waited)
            trial.step(trial.view(loaded), loaded.labels)

    loops = {"step": synthetic, "step_beside_decoding": beside_decoding, "train": real}
    found = {name: [] for name in loops}
    for epoch in range(options.rounds):
        for name, loop in loops.items():
            found[name].append(seconds_of(lambda loop=loop, epoch=epoch: loop(epoch), trial.world))
    best = {name: n * len(batch.keys) / min(seconds) for name, seconds in found.items()}

    def ratio(name: str) -> float:
        # Within each round: on a shared machine, the best of each are from different minutes.
        return float(np.median(np.divide(found["step"], found[name])))

    return {f"{name}_images_per_s": rate for name, rate in best.items()} | {
        "step_beside_decoding_ratio": ratio("step_beside_decoding"),
        "ratio": ratio("train"),
        "waiting_for_data": sum(waited) / sum(found["train"]),
        "setting": trial.describe(),
    }


def bench_resume(options) -> dict:
    """Milliseconds to the first batch, at the start of an epoch and when resuming in its middle; in turns."""
    found = {"start": [], "middle": []}
    for turn in range(2 * options.rounds):
        reader, plan, loader_options = training_input(
            options.config
        )  # nothing remembered: each turn has its own epoch, too
        first = 0 if turn % 2 == 0 else plan.n_batches // 2
        batches = training_batches(reader, plan, turn, first, 0, 1, loader_options)
        began = time.perf_counter()
        next(batches)
        found["middle" if first else "start"].append(time.perf_counter() - began)
        batches.close()
    start, middle = (sorted(times)[len(times) // 2] for times in found.values())
    return {"start_ms": 1e3 * start, "middle_ms": 1e3 * middle, "ratio": middle / start, "batches": plan.n_batches}


def bench_save(options) -> dict:
    """Seconds of a checkpoint, which all ranks wait for, and its share of the time between two."""
    trial = Trial(options.config)
    batch = next(iter(trial.batches(0)))
    trial.step(trial.view(batch), batch.labels)  # the optimizer has its state from here on
    provenance = Provenance(options.config.model.name, ("a",), "", np.zeros(0, np.uint64), "")
    found = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for step in range(1, options.rounds + 1):
            save = partial(
                save_step, Path(scratch), Progress(step=step), provenance, trial.model, trial.optimizer, None, 2
            )
            found.append(seconds_of(save, trial.world))
        size = sum(path.stat().st_size for path in Path(scratch).rglob(f"step-{step:08d}/*"))
    between = 60 * options.config.run.save_every_minutes
    return {
        "checkpoint_mb": size / 1e6,
        "save_s": min(found),
        "slowest_save_s": max(found),
        "share_of_the_time": min(found) / (between + min(found)),
        "setting": f"{trial.describe()}, saved every {options.config.run.save_every_minutes} minutes",
    }


def bench_evaluate(options) -> dict:
    """Seconds to evaluate the validation split with one view and with eight."""
    trial = Trial(options.config)
    reader = SplitReader(load(options.config.data.path), "val")
    seconds = {"none": [], "dihedral8": []}
    for _ in range(options.rounds):
        for views, found in seconds.items():
            config = replace(options.config, eval=replace(options.config.eval, views=views))
            once = partial(predict, trial.model, reader, reader.dataset.classes, config, trial.world)
            found.append(seconds_of(once, trial.world))
    n, one, eight = sum(reader.shard_sizes), min(seconds["none"]), min(seconds["dihedral8"])
    return {
        "images": n,
        "one_view_s": one,
        "eight_views_s": eight,
        "ratio": eight / one,
        "one_view_images_per_s": n / one,
        "setting": trial.describe(),
    }


def bench_compare(options) -> dict:
    """Images/s of the notebook's pipeline, of a DataLoader over WebDataset, of others that are installed, and of ours."""
    config = options.config
    reader, plan, loader_options = training_input(config)

    def ours(augment: bool) -> Iterator[int]:
        for batch in training_batches(reader, plan, 0, 0, 0, 1, loader_options):
            if augment:
                training_view(batch.images, batch.positions, 0, 0, config.augment, config.data.image_size)
            yield len(batch.keys)

    with tempfile.TemporaryDirectory() as scratch:
        pipelines = {"ours": lambda: ours(False), "ours, augmented on the CPU": lambda: ours(True)}
        pipelines |= peers.pipelines(reader, options.source, Path(scratch))
        rates: dict[str, list[float]] = {name: [] for name in pipelines}
        for _ in range(options.rounds):  # in turns, so that a slow minute of the machine hits all
            for name, pipeline in pipelines.items():
                rates[name].append(rate(pipeline))
    best = {name: max(found) for name, found in rates.items()}
    ratios = {f"ours / {name}": best["ours"] / rate for name, rate in best.items() if rate and name[:4] != "ours"}
    return best | ratios


def bench_pack(options) -> dict:
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
        peers.pack_plainly(list(some), Path(scratch) / "plain.tar")
        plain = len(some) / (time.perf_counter() - began)
    return {
        "images": len(images),
        "seconds": seconds,
        "images_per_s": len(images) / seconds,
        "peak_memory_mib": peak,
        "plain_pillow_images_per_s": plain,
        "ratio_to_plain_pillow": len(images) / seconds / plain,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.bench", description="Measure on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("pack", help="images/s and memory of packing, beside a plain Pillow loop")
    command.add_argument("--source", type=Path, required=True, help="HAM10000 folder")
    command.add_argument("--threads", type=int, default=0, help="decoding threads (default: one a core)")
    command.add_argument("--plain", type=int, default=1000, help="images of the plain loop (default 1000)")
    command.add_argument("--scratch", type=Path, help="folder for what is written meanwhile (default: the system's)")
    command.set_defaults(run=bench_pack)
    for name, run, text in (
        ("loader", bench_loader, "images/s of reading and decoding, and its share of the decode ceiling"),
        ("step", bench_step, "an optimizer step on a batch that is there, and its augmentation"),
        ("augment", bench_augment, "augmentation of a batch that is there"),
        ("train", bench_train, "the real loop, and its ratio to `step`"),
        ("evaluate", bench_evaluate, "one view and eight"),
        ("resume", bench_resume, "time to the first batch, at the start of an epoch and in its middle"),
        ("save", bench_save, "seconds of a checkpoint"),
        ("compare", bench_compare, "other input pipelines on the same images, in turns"),
    ):
        command = commands.add_parser(
            name, help=text, description=f"{text}. Takes the settings of launch/train.py, too."
        )
        command.add_argument("--rounds", type=int, default=3, help="repetitions; the best counts (default 3)")
        command.set_defaults(run=run)
    commands.choices["train"].add_argument(
        "--batches", type=int, default=40, help="most batches of a round (default 40)"
    )
    commands.choices["save"].add_argument(
        "--scratch", type=Path, help="folder for the checkpoints meanwhile (default: the system's)"
    )
    commands.choices["compare"].add_argument(
        "--source", type=Path, required=True, help="HAM10000 folder, for the notebook's"
    )
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="write the numbers here, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
