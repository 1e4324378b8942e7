"""Contact sheets: what is in a dataset, at a glance.

In: rows of images with their names. Out: one PNG. Invariants: a sheet is drawn beside a dataset, never into it.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.index import Dataset, load_table
from shards.reader import SplitReader

GAP, MARGIN = 4, 104  # pixels between images, and for the names on the left


def draw_sheet(rows: list[tuple[str, list[np.ndarray]]], path: Path, title: str, height: int = 96) -> None:
    """Draw named rows of images, (H, W, 3) uint8 each, at `height` pixels."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    most = max(len(images) for _, images in rows)
    width = max(round(p.shape[1] * height / p.shape[0]) for _, images in rows for p in images)
    sheet = Image.new("RGB", (MARGIN + most * (width + GAP), 30 + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 6), title, fill="black", font=font)
    for line, (name, images) in enumerate(rows):
        top = 30 + line * (height + GAP)
        pen.multiline_text((GAP, top + 4), name, fill="black", font=small)
        for column, image in enumerate(images):
            shown = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(shown, (MARGIN + column * (width + GAP), top))
    sheet.save(path)


def dataset_rows(dataset: Dataset, each: int = 10) -> list[tuple[str, list[np.ndarray]]]:
    """The first images of each class in each split, classes together, decoded as training decodes them."""
    rows = []
    for label, name in enumerate(dataset.classes):
        for split, counts in dataset.description.counts.items():
            images = first_of_class(dataset, split, label, each)
            if images:
                rows.append((f"{name}\n{split}\n{counts[name]} images", [image for _, image in images]))
    return rows


def first_of_class(dataset: Dataset, split: str, label: int, most: int) -> list[tuple[int, np.ndarray]]:
    """Keys and images, (H, W, 3) uint8, of the first samples of a class in a split."""
    reader, found = SplitReader(dataset, split), []
    for number, shard in enumerate(reader.shards):
        table = load_table(dataset, shard)
        rows = np.flatnonzero(table["label"] == label)[: most - len(found)]
        for place, data in reader.read(np.full(len(rows), number), rows):
            image = np.empty((dataset.height, dataset.width, 3), np.uint8)
            reader.decode(number, int(rows[place]), data, image)
            found.append((int(table["key"].iloc[rows[place]]), image))
        if len(found) == most:
            break
    return found
