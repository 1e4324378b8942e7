"""Evaluate a run's best weights again, or several runs as one: `python launch/evaluate.py runs/ham10000 --split test --views dihedral8`.

Works on any number of processes (`torchrun --nproc-per-node N launch/evaluate.py ...`); the results are the same.
"""

import argparse
from hashlib import sha256

from harness.distributed.hardware import set_arithmetic
from harness.distributed.world import World
from harness.evaluation.ensemble import Member
from harness.evaluation.evaluate import context_of_runs, evaluate, refuse_unknown_classes
from harness.evaluation.trained import Choices, TrainedRun, load_model, open_together
from harness.report.heat_maps import check_heat_maps
from harness.report.page import draw_report
from harness.report.text import summary
from harness.run.console import LOGGER, start_console
from launch.options import add_run_options
from shards.index import Dataset, load
from shards.leaks import refuse_trained_groups
from shards.reader import SplitReader
from shards.terminal import run_and_exit, user_path, user_place

ON_OFF = {"true": True, "false": False}


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    start_console()
    try:
        runs = open_together([options.run, *options.others], _choices(options))
        config, context = runs[0].config, context_of_runs(runs)
        dataset = load(config.data.path, config.data.access)
        reader = SplitReader(dataset, config.eval.split)
        provenance = context.weights.provenance
        refuse_unknown_classes(dataset, provenance)
        folder = options.out or options.run / _folder_name(runs, dataset, options.precision, options.prior_correction)
        if (folder / "config.yaml").exists():
            raise ValueError(
                f"--out {folder} is a run's folder, whose results are those of its training. Name another."
            )
        set_arithmetic(config.run.tf32, config.run.deterministic)
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        if not options.allow_leak:
            world.run_on_main(refuse_trained_groups, dataset, config.eval.split, context.train_groups)
        members = [Member(str(run.folder), load_model(run, world), run.config, run.classes) for run in runs]
        if options.explain:
            check_heat_maps(members[0].model, config.model.name, config.eval.image_size or config.data.image_size)
        results = evaluate(members, reader, world, folder, context)
        assert results is not None  # nobody asks this to stop
        world.run_on_main(draw_report, folder, dataset, members[0] if options.explain else None)
        world.print("\n" + summary(results))
        world.print(f"results: {folder}")
        world.close()
    except (ValueError, OSError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return 0


def _choices(options: argparse.Namespace) -> Choices:
    prior_correction = ON_OFF.get(options.prior_correction)
    eval_choices = options.split, options.views, options.image_size, prior_correction, options.precision
    return Choices(*eval_choices, options.data, options.cache_dir, options.cache_gb)


def _folder_name(
    runs: list[TrainedRun], dataset: Dataset, precision: str | None = None, prior_correction: str | None = None
) -> str:
    """Another name for each dataset, split, set of runs and choice, so that no result replaces another."""
    config, weights = runs[0].config, runs[0].weights
    words = ["evaluation", config.eval.split, config.eval.views.replace(":", "")]
    if len(runs) > 1:
        members = "\n".join(str(run.folder.resolve()) for run in runs)
        words.append(f"ensemble{len(runs)}-{sha256(members.encode()).hexdigest()[:6]}")
    if config.eval.image_size:
        words.append(f"{config.eval.image_size}px")
    words += [precision] if precision else []
    words += [f"prior-{prior_correction}"] if prior_correction else []
    if dataset.fingerprint != weights.provenance.dataset:
        words += [dataset.name, dataset.fingerprint[:6]]
    return "-".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Evaluate the best weights of a run.")
    add_run_options(parser)
    parser.add_argument("--split", help="split to evaluate (default: the run's eval.split)")
    parser.add_argument("--data", type=user_place, help="packed folder, or its URL (default: the run's data.path)")
    parser.add_argument(
        "--prior-correction",
        choices=tuple(ON_OFF),
        help="also report metrics at other class frequencies (default: the run's eval.prior_correction)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show in the report where the model looks in its worst mistakes (Grad-CAM; of several runs, the first)",
    )
    parser.add_argument("--allow-leak", action="store_true", help="evaluate on training groups too; the results say so")
    parser.add_argument(
        "--out",
        type=user_path,
        help="folder for the results (default: RUN/evaluation-SPLIT-VIEWS[-CHOICES])",
    )
    return parser


if __name__ == "__main__":
    run_and_exit(main)
