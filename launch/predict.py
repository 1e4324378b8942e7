"""Predict images: `python launch/predict.py runs/ham10000 photos/ --out predictions.csv`.

Images are prepared as packing prepares them, and predicted as an evaluation predicts them. Works on any number of processes
(`torchrun --nproc-per-node N launch/predict.py ...`); the output is the same.
"""

import argparse
import time
from pathlib import Path, PurePosixPath

import pandas as pd
import torch

from harness.distributed.hardware import set_arithmetic
from harness.distributed.world import World
from harness.evaluation.calibration import Prior
from harness.evaluation.ensemble import Member, average, predict_each
from harness.evaluation.evaluate import priors_of_runs, refuse_unknown_classes
from harness.evaluation.nearest import training_split
from harness.evaluation.output import check_output, output_rows, write_rows
from harness.evaluation.results import Predictions, Results, read_results
from harness.evaluation.trained import Choices, TrainedRun, load_model, open_together
from harness.report.heat_maps import check_heat_maps
from harness.report.prediction_page import draw_maps, draw_nearest, write_prediction_page
from harness.run.console import LOGGER, start_console
from launch.options import add_run_options
from shards.image import image_suffixes
from shards.index import load, load_table
from shards.inputs import Inputs, find_inputs
from shards.raw import RawReader
from shards.reader import SplitReader
from shards.storage import is_url, without_secrets
from shards.terminal import run_and_exit, user_path, user_place

MOST_NEAREST = 20  # training images that a page shows of each image
SOME_UNREADABLE = 3  # the exit code where images could not be read, and all others were predicted


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, 3 if images could not be read (the others are predicted), or 1 after an error."""
    options = _parser().parse_args(arguments)
    start_console()
    try:
        check_output(options.out, options.overwrite)
        _check_page(options)
        _check_inputs(options.inputs)
        runs = open_together([options.run, *options.others], _choices(options))
        results = _results_of_one(runs)
        config = runs[0].config
        size = config.eval.image_size or config.data.image_size
        is_as_evaluated = results is not None and (results.views, results.image_size) == (config.eval.views, size)
        temperature = _temperature(results, options, is_as_evaluated, f"{config.eval.views} at {size}")
        set_arithmetic(config.run.tf32, config.run.deterministic)
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        inputs = (
            None
            if _is_packed(options.inputs)
            else find_inputs(options.inputs, options.image_column, options.image_root)
        )
        _keep_inputs(options, inputs)
        members = [Member(str(run.folder), load_model(run, world), run.config, run.classes) for run in runs]
        if options.explain:
            check_heat_maps(members[0].model, config.model.name, size)
        if options.nearest:
            training_split(config.data, runs[0].weights.provenance.dataset)  # refused before anything is computed
        began = time.perf_counter()
        names, predictions, problems = _predict(members, runs, inputs, options, world)
        seconds = time.perf_counter() - began
        points = results.operating_points if results else []
        if results and points and not is_as_evaluated:
            world.warn(
                f"the thresholds (is_...) were chosen for the views {results.views} at {results.image_size} pixels, and these are "
                f"{config.eval.views} at {size}"
            )
        prior = _prior(runs, options)

        def write() -> None:
            rows = output_rows(names, predictions, runs[0].classes, problems, points, temperature, prior)
            write_rows(rows, options.out)
            if options.page and inputs is not None:
                _write_page(rows, inputs, runs[0], members[0].model, options, world)

        world.run_on_main(write)  # which has the predictions
        world.print(f"{len(names)} images in {seconds:.1f} s, {len(names) / seconds:.0f} images/s: {options.out}")
        for problem in problems.values():
            world.warn(problem)
        if problems:
            world.print(f"{len(problems)} of {len(names)} images could not be read: the column `error` says why")
        world.close()
    except (ValueError, OSError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return SOME_UNREADABLE if problems else 0


def _results_of_one(runs: list[TrainedRun]) -> Results | None:
    """What a run's own evaluation chose; None where it has none, or where several runs are averaged."""
    if len(runs) > 1 or not (runs[0].folder / "metrics.json").is_file():
        return None
    return read_results(runs[0].folder)


def _temperature(
    results: Results | None, options: argparse.Namespace, is_as_evaluated: bool, asked: str
) -> float | None:
    if not options.temperature:
        return None
    if results is None or not results.calibration:
        raise ValueError(
            f"{options.run} has no temperature of its own (or several runs are averaged). Leave out --temperature."
        )
    if not is_as_evaluated:
        raise ValueError(
            f"The temperature of {options.run} was fitted for the views {results.views} at {results.image_size} pixels, and these are "
            f"{asked}. Leave out --temperature, or --views and --image-size."
        )
    return results.calibration["temperature"]


def _prior(runs: list[TrainedRun], options: argparse.Namespace) -> Prior | None:
    prior = priors_of_runs(runs) if options.prior_correction else None
    if options.prior_correction and prior is None:
        raise ValueError(
            "Classes were balanced in the training of some of these runs and not of others, so their average is of no one class prior. "
            "Leave out --prior-correction."
        )
    return prior


def _write_page(
    rows: pd.DataFrame,
    inputs: Inputs,
    run: TrainedRun,
    model: torch.nn.Module,
    options: argparse.Namespace,
    world: World,
) -> None:
    maps = draw_maps(rows, inputs, run, model) if options.explain else {}
    nearest = draw_nearest(rows, inputs, run, model, world, options.nearest) if options.nearest else {}
    write_prediction_page(rows, inputs, run, options.page, maps, nearest)


def _predict(
    members: list[Member], runs: list[TrainedRun], inputs: Inputs | None, options: argparse.Namespace, world: World
) -> tuple[list[str], Predictions, dict[int, str]]:
    """Collective: names of the images, what is predicted of them (on rank 0), and why some could not be read, by place."""
    if inputs is None:
        dataset = load(user_place(options.inputs[0]), runs[0].config.data.access)
        refuse_unknown_classes(dataset, runs[0].weights.provenance)
        reader = SplitReader(dataset, options.split or runs[0].config.eval.split)
        parts = predict_each(members, reader, world)
        assert parts is not None  # nobody asks this to stop
        samples = pd.concat([load_table(dataset, shard) for shard in reader.shards]).sort_values("key")
        return samples["image_id"].tolist(), average(parts), {}
    raw = RawReader(inputs.paths, inputs.names, runs[0].trained_on, runs[0].classes)
    parts = predict_each(members, raw, world, bad_keys=[])
    assert parts is not None
    found: dict[int, str] = {}
    for problems in world.all_gather_objects(raw.problems):
        found |= problems
    return inputs.names, average(parts), dict(sorted((found | inputs.missing).items()))


def _check_page(options: argparse.Namespace) -> None:
    """Refuse a page that cannot be drawn, before anything is computed."""
    page = options.page
    if (options.explain or options.nearest) and page is None:
        raise ValueError("--explain and --nearest draw on a page. Give --page FILE.html, too.")
    if page is None:
        return
    if _is_packed(options.inputs):
        raise ValueError(
            "--page shows images as people have them. For packed shards, launch/evaluate.py draws a report."
        )
    if page.is_dir():
        raise IsADirectoryError(f"{page} is a folder. Give --page the name of a file.")
    if page.resolve() == options.out.resolve():
        raise ValueError("--page and --out are one file. Give --page FILE.html.")
    if page.exists() and not options.overwrite:
        raise FileExistsError(f"{page} exists. Give --overwrite to replace it, or another --page.")
    if not page.parent.is_dir():
        raise FileNotFoundError(f"The folder {page.parent} of --page does not exist. Make it, or name another.")


def _check_inputs(words: list[str]) -> None:
    """Refuse what is neither images nor packed shards, before a server is asked for it."""
    for word in words:
        if is_url(word) and PurePosixPath(word.partition("?")[0]).suffix.lower() in image_suffixes():
            raise ValueError(f"{without_secrets(word)} is an image behind a URL. Download it, and give the file.")
        if not is_url(word) and (Path(word).expanduser() / "config.yaml").is_file():
            raise ValueError(f"{word} is a run's folder. To average several runs, give the others after --with.")


def _keep_inputs(options: argparse.Namespace, inputs: Inputs | None) -> None:
    """Refuse to write over what is predicted, or over the table that names it."""
    given = [Path(word).expanduser() for word in options.inputs if not is_url(word)]
    for name in ("out", "page"):
        path = getattr(options, name)
        same_name = [read for read in (*given, *(inputs.paths if inputs else ())) if path and read.name == path.name]
        if any(read.resolve() == path.resolve() for read in same_name):
            raise ValueError(f"--{name} {path} is one of the inputs, and would be lost. Give another file.")


def _is_packed(words: list[str]) -> bool:
    """Whether packed shards are meant.

    Raises:
        ValueError: beside other inputs.
    """
    packed = [word for word in words if is_url(word) or (Path(word).expanduser() / "dataset.json").is_file()]
    if packed and len(words) > 1:
        raise ValueError(
            f"{without_secrets(packed[0])} is a packed dataset. Give it alone, and other inputs in another call."
        )
    return bool(packed)


def _choices(options: argparse.Namespace) -> Choices:
    return Choices(
        views=options.views,
        image_size=options.image_size,
        precision=options.precision,
        data=options.data,
        cache_dir=options.cache_dir,
        cache_gb=options.cache_gb,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/predict.py", description="Predict images with the best weights of a run."
    )
    add_run_options(parser)
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        help="images, folders, patterns in quotes, a table, or a folder of packed shards or its URL",
    )
    add("--out", type=user_path, required=True, help="file to write: .csv, .jsonl or .parquet")
    add("--overwrite", action="store_true", help="replace --out and --page where they exist")
    add(
        "--temperature",
        action="store_true",
        help="calibrate probabilities by the temperature that the run fitted on validation",
    )
    add(
        "--prior-correction",
        action="store_true",
        help="give probabilities at the other class frequencies, as eval.prior_correction",
    )
    add("--split", help="of packed shards (default: the run's eval.split)")
    add("--image-column", default="", help="of a table: paths or names of images")
    add("--image-root", type=user_path, help="of a table: the folder of its images (default: the table's)")
    add("--page", type=user_path, help="HTML page to draw, with the images")
    add(
        "--explain",
        action="store_true",
        help="show on the page where the model looks (Grad-CAM; of several runs, the first)",
    )
    add(
        "--nearest",
        type=int,
        default=0,
        choices=range(MOST_NEAREST + 1),
        metavar="N",
        help=f"show on the page the N (at most {MOST_NEAREST}) training images most like each (of several runs, by the first); their features are kept in RUN",
    )
    add("--data", type=user_place, help="packed training data, for --nearest (default: the run's data.path)")
    return parser


if __name__ == "__main__":
    run_and_exit(main)
