"""Which training images are most like another, as a model sees them: cosine similarity of what its last layer is given.

In: a model, its training split, images. Out: places of training images with their similarity. Invariants: the features of the
training split are computed once for each set of weights and image size and kept in a file; one that does not fit is made anew.
"""

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from harness.config import Config, Data
from harness.distributed.world import World
from harness.evaluation.features import feature_batches
from shards.files import write_durably
from shards.index import load
from shards.reader import ImageReader, SplitReader


@dataclass(frozen=True)
class Neighbour:
    """A training image that is like another: its place in the split, and the cosine of the angle between their features, -1 to 1."""

    place: int
    similarity: float


def training_split(data: Data, fingerprint: str) -> SplitReader:
    """The training split that a run was trained on.

    Raises:
        FileNotFoundError: no packed dataset there.
        ValueError: it is another one.
    """
    dataset = load(data.path, data.access)
    if dataset.fingerprint != fingerprint:
        raise ValueError(
            f"{dataset.folder} is the dataset {dataset.fingerprint[:12]}, and the run was trained on {fingerprint[:12]}. Give that as --data."
        )
    return SplitReader(dataset, "train")


def find_nearest(
    model: nn.Module, reader: ImageReader, known: np.ndarray, config: Config, world: World, most: int
) -> list[list[Neighbour]]:
    """The training images most like each image of a reader, the nearest first. On one rank.

    Args:
        model: of the run, on the world's device. known: (N, F) features of its training images, as from `training_features`.
        most: neighbours of each.
    """
    wanted = np.concatenate(list(_features(model, reader, config, world)))  # (n, F)
    similar = wanted @ known.T  # (n, N)
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :most]
    return [
        [Neighbour(int(place), float(row[place])) for place in found]
        for row, found in zip(similar, nearest, strict=True)
    ]


def training_features(model: nn.Module, train: SplitReader, path: Path, config: Config, world: World) -> np.ndarray:
    """Features of unit length of all training images, in stored order: (N, F) float32, to half precision; kept in a file.

    Args:
        path: of these weights' features at this image size; where it fits the split, it is read.

    Raises:
        OSError: it cannot be written.
    """
    with suppress(OSError, ValueError, EOFError):
        kept = np.load(path, allow_pickle=False)
        if kept.dtype == np.float16 and kept.ndim == 2 and len(kept) == sum(train.shard_sizes):
            return kept.astype(np.float32)
    features = np.concatenate(list(_features(model, train, config, world))).astype(np.float16)
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_durably(path, buffer.getvalue())
    return features.astype(np.float32)


def _features(model: nn.Module, reader: ImageReader, config: Config, world: World) -> Iterator[np.ndarray]:
    """Batches of features of unit length of all images of a reader, (b, F) float32, in order."""
    for _, features in feature_batches(model, reader, config, world):
        yield nn.functional.normalize(features, dim=1).cpu().numpy()
