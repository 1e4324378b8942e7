"""Pictures for the page of a run: what was most wrong, what was least sure, and what training looks like.

In: predictions with their store; a dataset and settings. Out: small JPEGs under `pictures/` of a result's folder. What
stays true: which pictures these are follows from the predictions alone; a missing picture costs nothing but itself.
"""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from harness.config import Config
from harness.data.augment import MEAN, STD, plain_view, training_view
from shards.contact_sheet import draw_sheet, first_of_class
from shards.index import Dataset
from shards.reader import SplitReader

FOLDER, LIST, AUGMENTED = "pictures", "pictures.json", "augmented.jpg"
EACH = 8  # pictures of a kind
SIDE = 200  # longest side of a small picture, in pixels


def worst_mistakes(rows: pd.DataFrame) -> pd.DataFrame:
    """Of predictions.csv, the rows that gave their label the least probability, the worst first; only wrong ones."""
    own = np.array([row[f"p_{row['label']}"] for _, row in rows.iterrows()], float)
    wrong = rows.assign(own=own)[rows["prediction"] != rows["label"]]
    return wrong.sort_values(["own", "key"])[:EACH]


def least_sure(rows: pd.DataFrame) -> pd.DataFrame:
    """Of predictions.csv, the rows of the greatest entropy (nats), the least sure first."""
    probabilities = rows[[name for name in rows if name.startswith("p_")]].to_numpy(float)
    entropy = -(probabilities * np.log(probabilities.clip(1e-12))).sum(1)
    return rows.assign(entropy=entropy).sort_values(["entropy", "key"], ascending=[False, True])[:EACH]


def save_pictures(out: Path, rows: pd.DataFrame, reader: SplitReader) -> None:
    """Keep the pictures of the worst mistakes and of the least sure predictions, with a list of them."""
    chosen = {"mistakes": worst_mistakes(rows), "unsure": least_sure(rows)}
    wanted = sorted({int(key) for kind in chosen.values() for key in kind["key"]})
    folder = out / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(len(reader.shards)):
        places = np.flatnonzero(np.isin(reader.table(number).key, wanted))
        for place, data in reader.read(np.full(len(places), number), places):
            with Image.open(io.BytesIO(data)) as picture:
                picture.thumbnail((SIDE, SIDE))
                picture.convert("RGB").save(folder / f"{reader.table(number).key[places[place]]:08d}.jpg", quality=85)
    listed = {kind: [int(key) for key in found["key"]] for kind, found in chosen.items()}
    (folder / LIST).write_text(json.dumps(listed) + "\n")


def save_augmented(out: Path, dataset: Dataset, config: Config) -> None:
    """Keep a sheet of training views, one row a class; none where a picture cannot be decoded (it may be skipped)."""
    (out / FOLDER).mkdir(exist_ok=True)
    title = f"the plain view, then training views, {config.data.image_size} px"
    with suppress(ValueError):
        draw_sheet(augmented_rows(dataset, config, 6), out / FOLDER / AUGMENTED, title)


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
