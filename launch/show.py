"""Draw training images as the model will see them: `python launch/show.py --config configs/ham10000.yaml --out sheet.png`.

One row a class: the plain view first, then the same picture in the variations of as many epochs.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from harness.augment import MEAN, STD, plain_view, training_view
from harness.config import Config, read_config
from launch.train import DEMO
from shards.index import Dataset, load
from shards.sheet import draw_sheet, first_of_class


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


def augmented_rows(dataset: Dataset, config: Config, each: int = 9) -> list[tuple[str, list[np.ndarray]]]:
    """For each class one training picture: its plain view and `each` training views, (S, S, 3) uint8."""
    rows, size = [], config.data.image_size
    for label, name in enumerate(dataset.classes):
        for key, picture in first_of_class(dataset, "train", label, 1):
            images = torch.from_numpy(picture).permute(2, 0, 1)[None]
            position = torch.tensor([key])
            views = [plain_view(images, config.augment, size)]
            views += [
                training_view(images, position, epoch, config.run.seed, config.augment, size) for epoch in range(each)
            ]
            rows.append((name, [_visible(view[0]) for view in views]))
    return rows


def _visible(view: torch.Tensor) -> np.ndarray:
    colours = view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (colours * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


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
