"""Draw training images as the model will see them: `python launch/preview.py --config configs/ham10000.yaml --out sheet.png`.

One row a class: the plain view first, then the same picture in the variations of as many epochs.
"""

import sys
from pathlib import Path

from harness.config import read_config
from harness.report.gallery import augmented_rows
from launch.train import DEMO
from shards.contact_sheet import draw_sheet
from shards.index import load


def main(arguments: list[str] | None = None) -> int:
    """Draw; takes --out FILE.png and the settings that training takes."""
    words, out = _out(sys.argv[1:] if arguments is None else arguments)
    config = read_config(words, DEMO)
    try:
        dataset = load(config.data.path)
        out = out or dataset.folder.resolve().with_name(f"{dataset.folder.resolve().name}-augmented.png")
        title = f"{dataset.folder.name} at {config.data.image_size} px: the plain view, then training views"
        draw_sheet(augmented_rows(dataset, config), out, title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"augmented training images: {out}")
    return 0


def _out(words: list[str]) -> tuple[list[str], Path | None]:
    """Take --out FILE from the words; the rest are settings."""
    if "--out" not in words:
        return words, None
    place = words.index("--out")
    if place + 1 == len(words):
        print("error: --out needs a file name, as --out sheet.png", file=sys.stderr)
        sys.exit(2)
    return words[:place] + words[place + 2 :], Path(words[place + 1])


if __name__ == "__main__":
    sys.exit(main())
