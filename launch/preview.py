"""Draw training images as the model will see them: `python launch/preview.py --config configs/ham10000.yaml --out sheet.png`.

One row a class: the plain view first, then the same image as augmented in as many epochs.
"""

import argparse
import sys
from pathlib import Path

from harness.config import read_config
from harness.report.gallery import augmented_rows
from shards.contact_sheet import draw_sheet
from shards.index import load
from shards.terminal import replace_unprintable, run_and_exit, user_path

ABOUT = (
    "Draw training images as the model will see them into --out FILE.png (default: beside the dataset). "
    "Takes the settings of launch/train.py, too."
)


def main(arguments: list[str] | None = None) -> int:
    """Draw; takes --out FILE.png and the settings that training takes."""
    # Without its own --help: that of the settings is shown, which says what --out is.
    parser = argparse.ArgumentParser(prog="launch/preview.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=user_path, help="PNG to write (default: beside the dataset)")
    options, settings = parser.parse_known_args(arguments)
    config = read_config(settings, program="launch/preview.py", about=ABOUT)
    replace_unprintable()
    try:
        dataset = load(config.data.path, config.data.access)
        beside = dataset.folder.resolve().parent if isinstance(dataset.folder, Path) else Path()
        out = options.out or beside / f"{dataset.name}-augmented.png"
        title = f"{dataset.name} at {config.data.image_size} px: the plain view, then training views"
        draw_sheet(augmented_rows(dataset, config), out, title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"augmented training images: {out}")
    return 0


if __name__ == "__main__":
    run_and_exit(main)
