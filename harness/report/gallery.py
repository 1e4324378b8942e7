"""Images for the report: the worst mistakes, the least certain predictions, and what training looks like.

In: a folder of results and the dataset that was evaluated. Out: small JPEGs under `images/` of that folder. Invariants:
which images these are follows from `predictions.csv` alone; an image that cannot be read is left out and costs nothing else.
"""

import io
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from harness.config import Augment, Config
from harness.data.augment import mix, plain_view, training_view
from harness.evaluation.ensemble import Member
from harness.report.heat_maps import draw_heat_maps
from harness.report.markup import image as html_image
from harness.report.markup import text
from shards.contact_sheet import draw_sheet, first_of_class
from shards.image import FORMATS
from shards.index import Dataset
from shards.reader import SplitReader

FOLDER, AUGMENTED = "images", "augmented.jpg"
MAX_IMAGES = 8  # of a kind
MAX_CLASSES = 30  # of which training views are drawn: the first ones
THUMBNAIL_SIDE = 200  # the longer one, in pixels


def worst_mistakes(rows: pd.DataFrame) -> pd.DataFrame:
    """Of predictions.csv, the wrong rows that gave their label the least probability, the worst first."""
    names, probabilities = _probabilities(rows)
    of_label = probabilities[np.arange(len(rows)), names.get_indexer("p_" + rows["label"])]
    ranks = pd.DataFrame({"of_label": of_label, "key": rows["key"]})[rows["prediction"] != rows["label"]]
    return rows.loc[ranks.sort_values(["of_label", "key"]).head(MAX_IMAGES).index]


def least_certain(rows: pd.DataFrame) -> pd.DataFrame:
    """Of predictions.csv, the rows of the greatest entropy (nats), the least certain first."""
    _, probabilities = _probabilities(rows)
    entropy = -(probabilities * np.log(probabilities.clip(1e-12))).sum(1)
    ranks = pd.DataFrame({"entropy": entropy, "key": rows["key"]})
    return rows.loc[ranks.sort_values(["entropy", "key"], ascending=[False, True]).head(MAX_IMAGES).index]


def _probabilities(rows: pd.DataFrame) -> tuple[pd.Index, np.ndarray]:
    """Names of the columns of probabilities in predictions.csv, and these, (N, C)."""
    columns = rows[[name for name in rows if str(name).startswith("p_")]]
    return columns.columns, columns.to_numpy(float)


def thumbnail_path(folder: Path, key: int) -> Path:
    """Where a sample's small image lies in a folder of results, if it could be made."""
    return folder / FOLDER / f"{key:08d}.jpg"


def heat_map_path(folder: Path, key: int) -> Path:
    """Where the heat map of a sample lies in a folder of results, if one was drawn."""
    return folder / FOLDER / f"{key:08d}-heat.jpg"


def save_heat_maps(folder: Path, split: str, rows: pd.DataFrame, dataset: Dataset, member: Member) -> None:
    """Draw where a model looks in the images of the gallery, for the class that was predicted.

    Args:
        rows: of predictions.csv, of that split. member: the model, on its device, with the settings by which images become views.
    """
    model, config = member.model, member.config
    keys, size = _chosen(rows), config.eval.image_size or config.data.image_size
    wanted = rows[rows["key"].isin(keys)]
    stored = _stored_images(SplitReader(dataset, split), keys)
    device, known = next(model.parameters()).device, [key for key in wanted["key"] if key in stored]
    if not known:
        return
    images = torch.from_numpy(np.stack([stored[key] for key in known])).permute(0, 3, 1, 2).to(device)
    labels = [member.classes.index(name) for name in wanted.set_index("key").loc[known, "prediction"]]
    drawn = draw_heat_maps(model, plain_view(images, config.augment, size), labels, config.augment)
    for key, data in zip(known, drawn, strict=True):
        heat_map_path(folder, key).write_bytes(data)


def gallery_html(folder: Path, rows: pd.DataFrame) -> str:
    """The worst mistakes and the least certain predictions, where their images could be made, with heat maps where there are."""
    parts = []
    for heading, chosen in (("Worst mistakes", worst_mistakes(rows)), ("Least certain", least_certain(rows))):
        figures = []
        for row in chosen.to_dict("records"):
            path, heat_map = (of_key(folder, int(row["key"])) for of_key in (thumbnail_path, heat_map_path))
            if not path.is_file():
                continue
            label, predicted = row["label"], row["prediction"]
            truth = "right" if predicted == label else f"is {label} {row['p_' + label]:.2f}"
            caption = text(f"{predicted} {row['p_' + predicted]:.2f}, {truth}")
            shown = html_image(path.read_bytes(), str(row["image_id"]), "jpeg")
            if heat_map.is_file():
                shown += html_image(heat_map.read_bytes(), f"where the model looks for {predicted}", "jpeg")
            figures.append(f"<figure>{shown}<figcaption>{caption}<br>{text(row['image_id'])}</figcaption></figure>")
        if figures:
            parts.append(f"<h2>{heading}</h2><div class=images>{''.join(figures)}</div>")
    return "".join(parts)


def save_gallery(folder: Path, split: str, rows: pd.DataFrame, dataset: Dataset, config: Config | None = None) -> None:
    """Replace `images/` of a folder of results: small images of the predictions, and a sheet of training views.

    Args:
        rows: of predictions.csv, of that split of the dataset. config: settings of the training whose views are drawn;
            None for no sheet.
    """
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    (folder / FOLDER).mkdir()
    for key, image in _thumbnails(SplitReader(dataset, split), _chosen(rows)).items():
        image.save(thumbnail_path(folder, key), quality=85)
    if config is not None:
        title = f"the center view, then training views, {config.data.image_size} px"
        # An image that cannot be decoded (training may skip it), or a shard that is gone: no sheet.
        with suppress(OSError, ValueError):
            sheet = augmented_rows(dataset, config, 6)
            draw_sheet(sheet, folder / FOLDER / AUGMENTED, title)


def augmented_rows(dataset: Dataset, config: Config, n_views: int = 9) -> list[tuple[str, list[np.ndarray]]]:
    """For each class (of the first `MAX_CLASSES`) one training image: its center view and `n_views` training views,
    (S, S, 3) uint8. Where pairs are mixed, its partner is the image of the next class.

    Raises:
        ValueError, FileNotFoundError: an image cannot be decoded, or its shard is missing.
    """
    augment, seed, size = config.augment, config.run.seed, config.data.image_size
    firsts = [
        (name, torch.tensor([key]), torch.from_numpy(image).permute(2, 0, 1)[None])  # (1,), (1, 3, H, W)
        for label, name in enumerate(dataset.classes[:MAX_CLASSES])
        for key, image in first_of_class(dataset, "train", label, 1)
    ]
    rows = []
    for (name, position, image), (_, other, partner) in zip(firsts, firsts[1:] + firsts[:1], strict=True):
        views, images, positions = (
            [plain_view(image, augment, size)],
            torch.cat([image, partner]),
            torch.cat([position, other]),
        )
        for epoch in range(n_views):
            pair = training_view(images, positions, epoch, seed, augment, size)
            if augment.group_size > 1:
                pair, _ = mix(pair, positions, epoch, seed, augment)
            views.append(pair)
        rows.append((name, [_visible(view[0], augment) for view in views]))
    return rows


def _chosen(rows: pd.DataFrame) -> set[int]:
    """Keys of the images of the gallery."""
    return {int(key) for kind in (worst_mistakes(rows), least_certain(rows)) for key in kind["key"]}


def _stored_images(reader: SplitReader, keys: set[int]) -> dict[int, np.ndarray]:
    """Stored images by key, (H, W, 3) uint8 each, of those that can be read."""
    images = {}
    for shard in range(len(reader.shards)):
        with suppress(OSError, ValueError):  # the shard is gone, or damaged
            places = np.flatnonzero(np.isin(reader.table(shard).key, sorted(keys)))
            for number, data in reader.read(np.full(len(places), shard), places):
                pixels = np.empty((reader.height, reader.width, 3), np.uint8)
                with suppress(ValueError):
                    reader.decode(shard, int(places[number]), data, pixels)
                    images[int(reader.table(shard).key[places[number]])] = pixels
    return images


def _thumbnails(reader: SplitReader, keys: set[int]) -> dict[int, Image.Image]:
    """Small RGB images by key, of those that can be read."""
    images = {}
    for shard in range(len(reader.shards)):
        with suppress(OSError, ValueError):  # the shard is gone, or damaged
            all_keys = reader.table(shard).key
            places = np.flatnonzero(np.isin(all_keys, sorted(keys)))
            for number, data in reader.read(np.full(len(places), shard), places):
                # A decoder may raise anything; an image of another size is not one of the dataset's, and may be huge.
                with suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    if image.size != (reader.dataset.width, reader.dataset.height):
                        continue
                    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
                    images[int(all_keys[places[number]])] = image.convert("RGB")
    return images


def _visible(view: torch.Tensor, augment: Augment) -> np.ndarray:
    """A normalised view, (3, S, S), as an image, (S, S, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.normalization)
    colours = view * std + mean
    return (colours * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
