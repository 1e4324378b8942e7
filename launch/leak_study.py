"""What leaks between splits are worth on your data: `python launch/leak_study.py PATH/TO/HAM10000 --merge-duplicates AUDIT.CSV`.

A common test set of groups is cut first. What is left is split by several protocols, from the widest leak to none; the same recipe is
trained on each, and scored on the protocol's own validation split (what it claims) and on the common test set (what it is worth).
The same command continues what was interrupted. Settings of the recipe follow as in training: `--run.epochs 30`.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.config import RUNTIME_KEYS, Config, differences, flat, read_config
from harness.evaluation.results import METRICS_FILE, read_predictions, read_results
from harness.report.study import StudyRun, draw_study, to_markdown, to_rows
from harness.run.console import LOGGER, start_console
from harness.run.stop import SIGNALS, STOPPED
from shards.arms import ARMS, split_arm
from shards.catalogue import Catalogue
from shards.column_options import add_column_options, columns_of, parse_names, parse_size
from shards.description import read_description
from shards.duplicates import merge_duplicates
from shards.files import sha256, write_atomically
from shards.pack import Packing, pack
from shards.sources import read_source
from shards.terminal import run_and_exit, user_path

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "leak_study.yaml"
OWN = {"data.path", "run.folder", "run.seed", "eval.split"}  # settings of each run
ON_TRAIN, ON_UNSEEN = "evaluation-train", "evaluation-unseen"  # folders of results in a run's


@dataclass(frozen=True)
class Study:
    """A study's parameters: they are the same for all that is in its folder `out`.

    settings: of training, as on its command line.
    """

    source: Path
    out: Path
    duplicates: Path | None
    holdout: float
    stored: tuple[int, int]
    settings: list[str]
    launcher: list[str]

    def data(self, arm: str, seed: int) -> Path:
        """Folder of an arm's packed data."""
        return self.out / "data" / f"{arm}-{seed}"

    def run(self, arm: str, seed: int) -> Path:
        """Folder of an arm's run."""
        return self.out / "runs" / f"{arm}-{seed}"


class StoppedError(Exception):
    """Somebody asked; what is done is kept."""


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0, 75 when stopped as asked, 1 after an error."""
    options, settings = _parser().parse_known_args(arguments)
    start_console()
    try:
        if unknown := [word for word in settings if word.startswith("-") and "." not in word]:
            raise ValueError(
                f"Unknown option {unknown[0]}. --help lists them; settings of training have a dot: --run.epochs 30."
            )
        settings = ["--config", str(options.config), *settings]
        config = read_config(settings)
        side = config.data.image_size
        study = Study(
            options.source,
            options.out,
            options.merge_duplicates,
            options.holdout,
            options.size or (side, side),
            settings,
            shlex.split(options.launcher) or [sys.executable],
        )
        arms = options.arms or [name for name, arm in ARMS.items() if options.merge_duplicates or not arm.unites]
        tasks = [(arm, seed) for seed in range(options.seeds) for arm in arms]
        if options.task is not None and not 0 <= options.task < len(tasks):
            raise ValueError(
                f"'--task' must be 0 to {len(tasks) - 1}: {len(arms)} arms with {options.seeds} seed(s) each. Got {options.task}."
            )
        source, united = read(study, options)
        note_parameters(study, {"columns": repr(columns_of(options)), "recipe": recipe_of(config)})
        for arm, seed in tasks if options.task is None else [tasks[options.task]]:
            LOGGER.info(f"--- {arm}, seed {seed} ({tasks.index((arm, seed)) + 1} of {len(tasks)})")
            do(study, source, united, arm, seed)
        report(study, tasks, options.level)
    except StoppedError:
        LOGGER.info("stopped as asked; the same command continues")
        return STOPPED
    except (ValueError, OSError) as error:
        LOGGER.error(str(error))
        return 1
    return 0


def read(study: Study, options: argparse.Namespace) -> tuple[Catalogue, Catalogue]:
    """The source, and the same with the groups of duplicates united."""
    source = read_source(study.source, columns_of(options))
    if study.duplicates is None:
        if any(ARMS[arm].unites for arm in options.arms if arm in ARMS):
            raise ValueError(
                f"The arm lesion-united needs the duplicates: python -m shards audit {study.source}, then --merge-duplicates AUDIT.CSV."
            )
        LOGGER.warning(
            "without --merge-duplicates the common test set may hold other photos of lesions that were trained on"
        )
        return source, source
    united, pairs = merge_duplicates(source, study.duplicates)
    groups, left = source.images["group"].nunique(), united.images["group"].nunique()
    LOGGER.info(f"{study.duplicates}: {pairs} pairs unite {groups} groups to {left}")
    return source, united


def recipe_of(config: Config) -> dict:
    """What all arms are trained with: all settings that change what is computed, but those that the study itself gives."""
    return {key: value for key, value in flat(config).items() if key not in OWN | RUNTIME_KEYS}


def note_parameters(study: Study, more: dict) -> None:
    """Write down what all arms share, or compare it with what is written.

    Args:
        more: what belongs to it beside the study's own parameters, by name.

    Raises:
        ValueError: the folder holds a study of something else.
    """
    path = study.out / "study.json"
    now = {
        "source": str(study.source.resolve()),
        "holdout": study.holdout,
        "stored": list(study.stored),
        "merge_duplicates": sha256(study.duplicates) if study.duplicates else "",
        **more,
    }
    if path.is_file():
        before = now | json.loads(path.read_bytes())  # a study of an earlier version does not say all
        if differ := differences(before["recipe"], now["recipe"]):
            raise ValueError(
                f"{study.out} holds a study of another recipe ({'; '.join(differ)}): its arms would not be comparable. Name another --out."
            )
        if changed := [name for name, value in now.items() if name != "recipe" and before[name] != value]:
            raise ValueError(
                f"{study.out} holds a study with another {changed[0]} ({before.get(changed[0])}, now {now[changed[0]]}). Name another --out."
            )
        return
    study.out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(now, indent=1) + "\n").encode())


def do(study: Study, source: Catalogue, united: Catalogue, arm: str, seed: int) -> None:
    """Pack, train and evaluate one arm with one seed, or what is missing of it."""
    data, run = study.data(arm, seed), study.run(arm, seed)
    if not (data / "dataset.json").is_file():
        pack(*split_arm(source, united, arm, seed, study.holdout), data, Packing(study.stored, "cover"))
    for warning in read_description(data / "dataset.json").warnings:
        LOGGER.warning(f"{arm}: {warning}")
    words = ["--data.path", str(data), "--run.folder", str(run), "--run.seed", str(seed), "--eval.split", "val"]
    if not (run / METRICS_FILE).is_file():
        call(study, run, HERE / "train.py", *study.settings, *words)
    for folder, *asked in (
        (ON_UNSEEN, "--split", "test"),
        (ON_TRAIN, "--split", "train", "--views", "none", "--allow-leak"),
    ):
        if not (run / folder / METRICS_FILE).is_file():
            call(study, run, HERE / "evaluate.py", str(run), *asked, "--out", str(run / folder))


def call(study: Study, run: Path, program: Path, *words: str) -> None:
    """Start a program of the harness and wait for it; a request to stop is passed on to it.

    Raises:
        StoppedError: it was asked to stop.
        ValueError: it failed; it has said why.
    """
    with passing_on(run) as asked:
        code = subprocess.run([*study.launcher, str(program), *words]).returncode
    if asked or code == STOPPED:
        raise StoppedError
    if code:
        raise ValueError(
            f"{program.name} ended with exit code {code}; its words above say why. The same command continues."
        )


@contextmanager
def passing_on(run: Path) -> Iterator[list[int]]:
    """Signals that come meanwhile are a request to stop, which a training reads from its folder."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            os._exit(128 + number)
        asked.append(number)
        if run.is_dir():
            (run / "stop").touch()

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report(study: Study, tasks: list[tuple[str, int]], level: float) -> None:
    """Print and write the table and the plot of what is finished."""
    runs = [found for arm, seed in tasks if (found := collect(study, arm, seed))]
    if not runs:
        return
    shown = {tuple(sorted(read_predictions(study.run(run.arm, run.seed) / ON_UNSEEN)["image_id"])) for run in runs}
    if len(shown) > 1:
        raise ValueError(
            f"The runs in {study.out} were not scored on the same images. Remove them, and start the study again."
        )
    runs.sort(key=lambda run: list(ARMS).index(run.arm))
    table = to_markdown(runs, level)
    write_atomically(study.out / "study.csv", to_rows(runs).to_csv(index=False, lineterminator="\n").encode())
    write_atomically(study.out / "study.md", table.encode())
    write_atomically(study.out / "study.png", draw_study(runs))
    print(
        f"\n{table}\n{len(runs)} of {len(tasks)} runs are finished; unseen: {len(next(iter(shown)))} images, one a group, the same for all"
    )
    print(f"results: {study.out}/study.csv, study.md and study.png")


def collect(study: Study, arm: str, seed: int) -> StudyRun | None:
    """The results of a run; None while there are not all."""
    run = study.run(arm, seed)
    if not all((folder / METRICS_FILE).is_file() for folder in (run, run / ON_UNSEEN, run / ON_TRAIN)):
        return None
    images = sum(read_description(study.data(arm, seed) / "dataset.json").counts["train"].values())
    accuracy = read_results(run / ON_TRAIN).tta["accuracy"]
    return StudyRun(arm, seed, images, accuracy, read_results(run), read_results(run / ON_UNSEEN))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/leak_study.py",
        description="What each split protocol claims, and what it is worth.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=user_path, help="images and their table, as for `python -m shards pack`")
    add("--out", type=user_path, default=Path("runs/leak_study"), help="folder of the study (default runs/leak_study)")
    add("--config", type=user_path, default=CONFIG, help="recipe of every run (default configs/leak_study.yaml)")
    add(
        "--merge-duplicates",
        type=user_path,
        metavar="AUDIT.CSV",
        help="of `python -m shards audit`: pairs that say yes are one group",
    )
    add("--arms", type=parse_names, default=(), help=f"of {','.join(ARMS)} (default: all)")
    add(
        "--seeds",
        type=int,
        default=2,
        help="runs of each arm, each with another seed of split, weights and order (default 2)",
    )
    add(
        "--task", type=int, help="do one run alone, by its number from 0, as of a SLURM array: seed by seed, arm by arm"
    )
    add("--holdout", type=float, default=0.15, help="share of the groups in the common test set (default 0.15)")
    add("--size", type=parse_size, help="stored WIDTHxHEIGHT (default: squares of data.image_size)")
    add("--level", type=float, default=0.98, help="training accuracy below which a run is marked (default 0.98)")
    add(
        "--launcher", default="", help="what starts a training, as 'torchrun --nproc-per-node 4' (default: this Python)"
    )
    add_column_options(parser.add_argument_group("source"))
    return parser


if __name__ == "__main__":
    run_and_exit(main)
