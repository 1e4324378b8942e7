"""A page of predictions: each image with what the model says of it.

In: rows as `output.output_rows` makes them, the images' files. Out: one HTML file that needs no network. Invariants: what is shown is
what the model saw, as packing would store it; no text of a file or of a class gets into the page unescaped.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from harness.data.augment import plain_view
from harness.distributed.world import World
from harness.evaluation.nearest import Neighbour, find_nearest, training_features, training_split
from harness.evaluation.trained import TrainedRun
from harness.report.heat_maps import draw_heat_maps
from harness.report.markup import STYLE, image, text
from shards.files import write_atomically
from shards.image import FORMATS
from shards.index import load_table
from shards.inputs import Inputs
from shards.plan import locate_in_order
from shards.raw import RawReader
from shards.reader import SplitReader

MAX_SHOWN = 200  # images on a page; the output file has all of them
SIDE = 220  # of a small image, the longer one, in pixels
N_BARS = 3  # classes of the highest probability
MARKED = "Orange: at or above the threshold for those classes, which the run chose on its validation split."
BARS = """
.images{grid-template-columns:repeat(auto-fill,minmax(13rem,1fr))}
.bar{display:grid;grid-template-columns:1fr 3.2rem;gap:.4rem;font-size:.8rem;align-items:center}
.bar span{overflow-wrap:anywhere;background:linear-gradient(#48a8,#48a8) no-repeat left/var(--share) 100%;padding:0 .3rem;border-radius:.2rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.2rem}.pair img{aspect-ratio:1;object-fit:cover}
.alike{display:grid;grid-template-columns:repeat(3,1fr);gap:.2rem;margin-top:.4rem;font-size:.7rem}
.bar b{text-align:right;font-weight:500}.yes{background:#c80;color:#000;border-radius:.2rem;padding:0 .3rem;font-size:.8rem}
"""


@dataclass(frozen=True)
class Shown:
    """A small JPEG and the words below it."""

    jpeg: bytes
    caption: str


def write_prediction_page(
    rows: pd.DataFrame,
    inputs: Inputs,
    run: TrainedRun,
    path: Path,
    heat_maps: dict[int, bytes] | None = None,
    nearest: dict[int, list[Shown]] | None = None,
) -> None:
    """Write a page of the first `MAX_SHOWN` images, in their order, and of what could not be read.

    Args:
        rows: of all images. inputs: their files. heat_maps: place of an image -> a JPEG to show beside it. nearest: place -> training
            images to show below it.

    Raises:
        OSError: the page cannot be written.
    """
    reader = RawReader(inputs.paths, inputs.names, run.trained_on, run.classes)
    figures = [
        _figure(row, reader, place, (heat_maps or {}).get(place), (nearest or {}).get(place, []))
        for place, row in enumerate(rows.head(MAX_SHOWN).to_dict("records"))
    ]
    bad = rows.loc[rows["error"] != "", "error"]
    more = f" The first {MAX_SHOWN} are shown." if len(rows) > MAX_SHOWN else ""
    heading = text(f"{len(rows)} images by {run.weights.provenance.model}")
    parts = [
        f"<h1>{heading}</h1>",
        f"<p class=note>Run {text(run.folder)}, views: {text(run.config.eval.views)}; classes: {text(', '.join(run.classes))}.{more} The "
        "percentages are the model's own; they are no diagnosis.</p>",
        *([f"<p class=note>{MARKED}</p>"] if any(name.startswith("is_") for name in rows) else []),
        *(f"<p class=warning>{text(problem)}</p>" for problem in bad.head(20)),
        *([f"<p class=warning>and {len(bad) - 20} more that could not be read</p>"] if len(bad) > 20 else []),
        f"<div class=images>{''.join(figures)}</div>",
    ]
    head = '<meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
    head += f"<title>{heading}</title><style>{STYLE}{BARS}</style>"
    page = f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    write_atomically(path, page.encode())


def draw_maps(rows: pd.DataFrame, inputs: Inputs, run: TrainedRun, model: nn.Module) -> dict[int, bytes]:
    """Heat maps of the images of the page, for the class that is predicted: place -> JPEG.

    Args:
        rows: of all images. model: of the run, on its device.
    """
    reader = RawReader(inputs.paths, inputs.names, run.trained_on, run.classes)
    shown = rows.head(MAX_SHOWN)
    places = shown.index[shown["error"] == ""].to_numpy()
    if not len(places):
        return {}
    pixels = np.empty((len(places), reader.height, reader.width, 3), np.uint8)
    for number, data in reader.read(np.zeros(len(places), np.int64), places):
        reader.decode(0, int(places[number]), data, pixels[number])
    config, device = run.config, next(model.parameters()).device
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
    views = plain_view(images, config.augment, config.eval.image_size or config.data.image_size)
    labels = [run.classes.index(name) for name in shown.loc[places, "prediction"]]
    return dict(zip(places.tolist(), draw_heat_maps(model, views, labels, config.augment), strict=True))


def draw_nearest(
    rows: pd.DataFrame, inputs: Inputs, run: TrainedRun, model: nn.Module, world: World, most: int
) -> dict[int, list[Shown]]:
    """The training images most like each image of the page: place -> the nearest first, with class, id and cosine similarity.

    Args:
        rows: of all images. model: of the run, on the world's device. most: training images for each.

    Raises:
        FileNotFoundError, ValueError: the data that the run was trained on are not where its settings have them.
        OSError: the run's folder cannot be written, where their features are kept.
    """
    train = training_split(run.config.data, run.weights.provenance.dataset)
    shown = rows.head(MAX_SHOWN)
    places = shown.index[shown["error"] == ""].tolist()
    if not places:
        return {}
    reader = RawReader(
        [inputs.paths[p] for p in places], [inputs.names[p] for p in places], run.trained_on, run.classes
    )
    size = run.config.eval.image_size or run.config.data.image_size
    kept = run.folder / f"features-{run.weights.folder.name}-{size}px.npy"
    known = training_features(model, train, kept, run.config, world)
    found = find_nearest(model, reader, known, run.config, world, most)
    tables: dict[int, pd.DataFrame] = {}
    return {
        place: [_training_image(train, one, tables) for one in near] for place, near in zip(places, found, strict=True)
    }


def _training_image(train: SplitReader, one: Neighbour, tables: dict[int, pd.DataFrame]) -> Shown:
    shards, rows = locate_in_order(train.shard_sizes, np.array([one.place]))
    _, data = next(train.read(shards, rows))
    shard = int(shards[0])
    if shard not in tables:
        tables[shard] = load_table(train.dataset, train.shards[shard])
    sample = tables[shard].iloc[int(rows[0])]
    label = train.classes[int(sample["label"])]
    return Shown(_thumbnail(data, SIDE // 2), f"{label}, {one.similarity:.2f}, {sample['image_id']}")


def _figure(row: dict, reader: RawReader, place: int, heat_map: bytes | None, nearest: list[Shown]) -> str:
    if row["error"]:
        return f"<figure><figcaption><b>{text(row['image'])}</b><br>could not be read</figcaption></figure>"
    shares = sorted(((row[name], name.removeprefix("p_")) for name in row if name.startswith("p_")), reverse=True)
    bars = "".join(
        f'<div class=bar><span style="--share:{share:.1%}">{text(name)}</span><b>{share:.1%}</b></div>'
        for share, name in shares[:N_BARS]
    )
    marks = "".join(
        f" <span class=yes>{text(name.removeprefix('is_'))}</span>"
        for name in row
        if name.startswith("is_") and row[name] == "true"
    )
    shown = image(_small(reader, place), row["image"], "jpeg")
    if heat_map is not None:  # of the central square, which the photo is cut to beside it
        beside = image(heat_map, f"where the model looks in {row['image']}", "jpeg")
        shown = f"<div class=pair>{shown}{beside}</div>"
    if nearest:
        alike = "".join(
            f"<figure>{image(one.jpeg, one.caption, 'jpeg')}{text(one.caption)}</figure>" for one in nearest
        )
        bars += f"<div class=alike>{alike}</div>"
    return f"<figure>{shown}<figcaption>{text(Path(row['image']).name)}{marks}{bars}</figcaption></figure>"


def _small(reader: RawReader, place: int) -> bytes:
    _, data = next(reader.read(np.zeros(1, np.int64), np.array([place])))
    return _thumbnail(reader.stored(data, str(place)), SIDE)


def _thumbnail(data: bytes, side: int) -> bytes:
    with Image.open(io.BytesIO(data), formats=FORMATS) as stored:
        stored.thumbnail((side, side))
        buffer = io.BytesIO()
        stored.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
