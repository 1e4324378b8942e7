"""Train and evaluate: `accelerate launch launch/train.py --config configs/ham10000.yaml --data.path data/ham10000`.

Without --config it trains the demo: lesions are drawn and packed first. Starting the same command again continues.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from harness.config import read_config
from shards.terminal import run_and_exit


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 when finished, 75 when stopped as asked (0 under --max-restarts), 1 after an error."""
    config = read_config(sys.argv[1:] if arguments is None else arguments)
    # After the settings were read: torch and its kin take seconds, and --help or a wrong setting needs none of them.
    from harness.distributed.hardware import set_arithmetic
    from harness.distributed.world import World
    from harness.model.normalization import with_normalization
    from harness.report.page import draw_report
    from harness.run.console import LOGGER, start_console
    from harness.run.stop import exit_code, follow_launcher
    from harness.training.train import train
    from shards.index import load
    from shards.storage import is_url

    start_console()
    follow_launcher()
    try:
        set_arithmetic(config.run.tf32, config.run.deterministic)
        world = World(config.run.precision, config.run.channels_last)
        world.print(world.describe())
        if config.data.demo_images and not is_url(config.data.path):
            world.run_on_main(draw_demo, Path(config.data.path), config.data.demo_images)
        # By rank 0: another machine may lack the file of weights, which may say how its images are normalised.
        outcome = train(world.run_on_main(with_normalization, config), world)
        if outcome == "finished":
            world.run_on_main(draw_report, Path(config.run.folder), load(config.data.path, config.data.access))
        world.close()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        LOGGER.error(str(error))
        return 1
    return exit_code(outcome)


def draw_demo(packed: Path, images: int) -> None:
    """Draw and pack demo lesions, unless they are there."""
    from harness.run.console import LOGGER
    from shards import demo
    from shards.ham10000 import read_ham10000
    from shards.pack import pack
    from shards.split import split_by_lesion

    if (packed / "dataset.json").is_file():
        return
    LOGGER.info(f"drawing and packing {images} demo lesions into {packed}")
    originals = Path(tempfile.mkdtemp(prefix="demo-lesions-"))
    try:
        demo.draw(originals, images)
        source = read_ham10000(originals)
        pack(source, split_by_lesion(source.images), packed)
    finally:
        shutil.rmtree(originals)


if __name__ == "__main__":
    run_and_exit(main)
