"""Evaluate a run's best weights again: `python launch/evaluate.py runs/ham10000 --split test --views dihedral8`.

Works on any number of processes (`torchrun --nproc-per-node N launch/evaluate.py ...`); the results are the same.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from harness.config import Config, load_config
from harness.data.augment import parse_views
from harness.distributed.world import World
from harness.evaluation.calibration import Prior, class_priors
from harness.evaluation.evaluate import EvalContext, evaluate
from harness.evaluation.results import summary
from harness.model.build import build_model
from harness.report.page import draw_results
from harness.run import checkpoint
from harness.run.state import changes
from shards.index import Dataset, load
from shards.leaks import refuse_trained_groups
from shards.reader import SplitReader


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, or 1 after an error."""
    options = _parser().parse_args(arguments)
    try:
        config = _settings(options)
        parse_views(config.eval.views)
        dataset, best = load(config.data.path), checkpoint.find_best(options.run)
        reader = SplitReader(dataset, config.eval.split)
        check_classes(best, dataset)
        if not options.allow_leak:
            refuse_trained_groups(dataset, config.eval.split, best.provenance.train_groups)
        out = options.out or options.run / _folder_name(config, best, dataset)
        if out.resolve() == options.run.resolve():
            raise ValueError(f"--out {out} is the run's folder, whose results are those of its training. Name another.")
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        model = build_model(config.model.name, len(best.provenance.classes))
        checkpoint.load_model(best, model)
        model.to(world.device, memory_format=world.memory_format)
        trained = EvalContext(best, changes(options.run), own_prior(options.run), own_validation(options.run, best))
        metrics = evaluate(model, reader, config.eval.split, config, world, out, trained)
        world.run_on_main(draw_results, out)
        world.print("\n" + summary(metrics))
        world.print(f"results: {out}")
        world.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def own_validation(run: Path, best: checkpoint.Checkpoint) -> SplitReader | None:
    """The validation split that the run was trained with, None if it is not here any more."""
    try:
        dataset = load(load_config(run / "config.yaml").data.path)
    except (OSError, ValueError):
        return None
    return SplitReader(dataset, "val") if dataset.fingerprint == best.provenance.dataset else None


def own_prior(run: Path) -> Prior:
    """Class frequencies that a run's probabilities take for granted, and those of its second reading."""
    counts = json.loads((run / "dataset.json").read_text())["counts"]["train"]
    return class_priors(load_config(run / "config.yaml").optim, counts)


def check_classes(best: checkpoint.Checkpoint, dataset: Dataset) -> None:
    """Refuse a dataset with classes that the model does not know; classes are told apart by their names.

    Raises:
        ValueError: naming them.
    """
    unknown = [name for name in dataset.classes if name not in best.provenance.classes]
    if unknown:
        raise ValueError(
            f"{dataset.folder} has classes that the model does not know: {', '.join(unknown)}. It knows "
            f"{', '.join(best.provenance.classes)}. Rename or leave out the others in the source, and pack it again."
        )


def _settings(options: argparse.Namespace) -> Config:
    saved = options.run / "config.yaml"
    if not saved.is_file():
        raise FileNotFoundError(f"{options.run} holds no run (no config.yaml). Give the --run.folder of a training.")
    config = load_config(saved)
    asked = {name: getattr(options, name) for name in ("split", "views", "image_size", "prior_correction")}
    config = replace(
        config,
        eval=replace(config.eval, **{name: value for name, value in asked.items() if value is not None}),
        run=replace(config.run, precision=options.precision or config.run.precision),
        data=replace(config.data, path=str(options.data or config.data.path)),
    )
    return config


def _folder_name(config: Config, best: checkpoint.Checkpoint, dataset: Dataset) -> str:
    """Another name for each dataset, split, views and size, so that no result replaces another."""
    words = ["evaluation", config.eval.split, config.eval.views.replace(":", "")]
    if config.eval.image_size:
        words.append(f"{config.eval.image_size}px")
    if dataset.fingerprint != best.provenance.dataset:
        words += [dataset.folder.resolve().name, dataset.fingerprint[:6]]
    return "-".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Evaluate the best weights of a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--split", help="split to evaluate (default: the run's eval.split)")
    parser.add_argument("--views", help="none, flips, dihedral8 or spins:N (default: the run's eval.views)")
    parser.add_argument("--data", type=Path, help="packed folder (default: the run's data.path)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the model's input (default: the run's eval.image_size)",
    )
    parser.add_argument(
        "--prior-correction",
        type=float,
        metavar="STRENGTH",
        help="of the second reading (default: the run's eval.prior_correction)",
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the run's)")
    parser.add_argument(
        "--allow-leak", action="store_true", help="evaluate on training lesions too; the results say so"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: RUN/evaluation-SPLIT-VIEWS[-SIZEpx][-DATASET])"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
