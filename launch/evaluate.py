"""Evaluate a run's best weights again: `python launch/evaluate.py runs/ham10000 --split test --views dihedral8`.

Works on any number of processes (`torchrun --nproc-per-node N launch/evaluate.py ...`); the results are the same.
"""

import argparse
from dataclasses import replace

from harness.config import Config, load_config
from harness.data.augment import parse_views
from harness.distributed.hardware import set_arithmetic
from harness.distributed.world import World
from harness.evaluation.evaluate import context_of_run, evaluate, refuse_unknown_classes
from harness.model.build import build_model
from harness.report.page import draw_report
from harness.report.text import summary
from harness.run import checkpoint
from harness.run.console import LOGGER, start_console
from harness.run.recovery import find_best, refuse_other_copies
from shards.index import Dataset, load
from shards.leaks import refuse_trained_groups
from shards.reader import SplitReader
from shards.terminal import run_and_exit, user_path

ON_OFF = {"true": True, "false": False}


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    start_console()
    try:
        config = _settings(options)
        parse_views(config.eval.views)
        dataset, weights = load(config.data.path), find_best(options.run)
        mean, std = weights.provenance.mean, weights.provenance.std
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
        reader = SplitReader(dataset, config.eval.split)
        refuse_unknown_classes(dataset, weights.provenance)
        if not options.allow_leak:
            refuse_trained_groups(dataset, config.eval.split, weights.provenance.train_groups)
        folder = options.out or options.run / _folder_name(config, weights, dataset)
        if folder.resolve() == options.run.resolve():
            raise ValueError(
                f"--out {folder} is the run's folder, whose results are those of its training. Name another."
            )
        set_arithmetic(config.run.tf32, config.run.deterministic)
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        refuse_other_copies(weights.folder, world)
        model = build_model(config.model.name, len(weights.provenance.classes))
        checkpoint.load_model(weights, model)
        # torch's stubs know no memory_format beside a device, which its documentation has
        model.to(world.device, memory_format=world.memory_format)  # pyright: ignore[reportCallIssue]
        results = evaluate(model, reader, config, world, folder, context_of_run(options.run, weights))
        assert results is not None  # nobody asks this to stop
        world.run_on_main(draw_report, folder, dataset)
        world.print("\n" + summary(results))
        world.print(f"results: {folder}")
        world.close()
    except (ValueError, OSError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return 0


def _settings(options: argparse.Namespace) -> Config:
    """The run's settings, with those of the command line in their place."""
    saved = options.run / "config.yaml"
    if not saved.is_file():
        raise FileNotFoundError(f"{options.run} holds no run (no config.yaml). Give the --run.folder of a training.")
    config = load_config(saved)
    given = {name: getattr(options, name) for name in ("split", "views", "image_size")}
    given["prior_correction"] = ON_OFF.get(options.prior_correction)
    return replace(
        config,
        eval=replace(config.eval, **{name: value for name, value in given.items() if value is not None}),
        run=replace(config.run, precision=options.precision or config.run.precision),
        data=replace(config.data, path=str(options.data or config.data.path)),
    )


def _folder_name(config: Config, weights: checkpoint.Checkpoint, dataset: Dataset) -> str:
    """Another name for each dataset, split, views and size, so that no result replaces another."""
    words = ["evaluation", config.eval.split, config.eval.views.replace(":", "")]
    if config.eval.image_size:
        words.append(f"{config.eval.image_size}px")
    if dataset.fingerprint != weights.provenance.dataset:
        words += [dataset.folder.resolve().name, dataset.fingerprint[:6]]
    return "-".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Evaluate the best weights of a run.")
    parser.add_argument("run", type=user_path, help="the run's folder")
    parser.add_argument("--split", help="split to evaluate (default: the run's eval.split)")
    parser.add_argument("--views", help="none, flips, dihedral8 or spins:N (default: the run's eval.views)")
    parser.add_argument("--data", type=user_path, help="packed folder (default: the run's data.path)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the model's input (default: the run's eval.image_size)",
    )
    parser.add_argument(
        "--prior-correction",
        choices=tuple(ON_OFF),
        help="also report metrics at other class frequencies (default: the run's eval.prior_correction)",
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the run's)")
    parser.add_argument("--allow-leak", action="store_true", help="evaluate on training groups too; the results say so")
    parser.add_argument(
        "--out", type=user_path, help="folder for the results (default: RUN/evaluation-SPLIT-VIEWS[-SIZEpx][-DATASET])"
    )
    return parser


if __name__ == "__main__":
    run_and_exit(main)
