"""A linear probe: `python launch/probe.py --config configs/ham10000.yaml --model.name timm/NAME --model.weights FILE --run.folder runs/probe`.

The network stays as it is; a logistic regression is fitted on its features, with the penalty that is best on validation. Settings are those
of training. The result is a run folder: `launch/evaluate.py`, `predict.py`, `compare.py` and `export.py` take it.
"""

import sys

from harness.config import read_config
from shards.terminal import run_and_exit

ABOUT = (
    "Fit a logistic regression on the features of a network that stays as it is, and evaluate it. Takes the settings of "
    "launch/train.py; of `optim`, the class balance alone counts."
)


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 when finished, 75 when stopped as asked, 1 after an error."""
    words = sys.argv[1:] if arguments is None else arguments
    config = read_config(words, program="launch/probe.py", about=ABOUT)
    # After the settings were read: torch and its kin take seconds, and --help needs none of them.
    from pathlib import Path

    from harness.distributed.hardware import set_arithmetic
    from harness.distributed.world import World
    from harness.model.normalization import with_normalization
    from harness.report.page import draw_report
    from harness.run.console import LOGGER, start_console
    from harness.run.stop import exit_code, follow_launcher
    from harness.training.probe import probe
    from shards.index import load

    start_console()
    follow_launcher()
    try:
        set_arithmetic(config.run.tf32, config.run.deterministic)
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        outcome = probe(world.run_on_main(with_normalization, config), world)
        if outcome == "finished":
            world.run_on_main(draw_report, Path(config.run.folder), load(config.data.path, config.data.access))
        world.close()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return exit_code(outcome)


if __name__ == "__main__":
    run_and_exit(main)
