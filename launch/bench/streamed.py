"""Other packages that read images from object storage, over the same images: litdata and MosaicML Streaming.

In: the stored images of a split, and a URL under which each package's files are put. Out: for each package a function that opens its
dataset with an empty cache. Invariants: the JPEGs are the packed ones, byte for byte; one process reads, with a DataLoader of the
package; what was put there is removed; packages that are not installed are left out.
"""

import importlib.metadata
import multiprocessing
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bench.baselines import all_images, decode, installed
from shards.reader import SplitReader
from shards.storage import Storage

Sample = tuple[bytes, int, int]  # JPEG, label, key
Epoch = Callable[
    [], Iterator[tuple[torch.Tensor, torch.Tensor]]
]  # one more epoch: images (b, 3, H, W) uint8 and keys (b,)
PACKAGES = {"litdata": "litdata", "streaming": "mosaicml-streaming"}  # what is imported, and what pip calls it


@dataclass(frozen=True)
class Reading:
    """How a package reads: worker processes, images in a batch, and batches that each worker prepares ahead."""

    workers: int
    batch: int
    prefetch: int


@contextmanager
def uploaded(
    reader: SplitReader, url: str, scratch: Path, reading: Reading
) -> Iterator[dict[str, Callable[[Path], Epoch]]]:
    """Inside, each installed package's files are behind the URL.

    Args:
        url: of a folder that may be written, e.g. s3://BUCKET/NAME. scratch: folder for the files before they are sent.

    Yields:
        for each package, with its version, a function from an empty cache folder to epochs.

    Raises:
        ValueError: none is installed.
    """
    found = [name for name in PACKAGES if installed(name)]
    if not found:
        names = " ".join(PACKAGES.values())
        raise ValueError(f"--peers compares with other packages, and none is installed: pip install {names} boto3.")
    samples, size = stored_samples(reader), int(reader.shards.bytes.max())
    pipelines, written = {}, []
    try:
        for name in found:
            write, read = (write_litdata, read_litdata) if name == "litdata" else (write_mds, read_mds)
            folder, place = scratch / name, f"{url.rstrip('/')}/bench-{secrets.token_hex(4)}-{name}"
            write(samples, folder, size)
            files, storage = sorted(path for path in folder.iterdir() if path.is_file()), Storage(place, 30.0)
            written.append((storage, [path.name for path in files]))
            for path in files:
                storage.send(path, path.name)
            title = f"{PACKAGES[name]} {importlib.metadata.version(PACKAGES[name])}"
            pipelines[title] = lambda cache, read=read, place=place: read(place, cache, reading)
        yield pipelines
    finally:
        for storage, names in written:
            storage.remove(*names)


def stored_samples(reader: SplitReader) -> list[Sample]:
    """Every image of a split as it is stored, in order."""
    tables = [reader.table(shard) for shard in range(len(reader.shards))]
    labels, keys = (np.concatenate([getattr(table, name) for table in tables]).tolist() for name in ("label", "key"))
    return list(zip(all_images(reader), labels, keys, strict=True))


def write_litdata(samples: list[Sample], folder: Path, size: int) -> None:
    """Chunks of litdata, of about `size` bytes each."""
    import litdata  # pyright: ignore[reportMissingImports]  optional

    method = multiprocessing.get_start_method()
    places = list(range(len(samples)))
    litdata.optimize(samples.__getitem__, places, str(folder), chunk_bytes=size, num_workers=0, verbose=False)
    multiprocessing.set_start_method(method, force=True)  # litdata changes it for the whole process


def read_litdata(url: str, cache: Path, reading: Reading) -> Epoch:
    """litdata's loader: it downloads 4 chunks ahead, which is its default behind a URL, and shuffles chunks and inside them."""
    import litdata  # pyright: ignore[reportMissingImports]  optional
    from litdata.streaming import downloader  # pyright: ignore[reportMissingImports]

    # Its client refuses a server of one's own on http://, and it has no setting for that (0.2.76).
    getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", {})["allow_http"] = "true"
    dataset = litdata.StreamingDataset(url, cache_dir=str(cache), shuffle=True, drop_last=False, transform=_decoded)
    return _epoch(litdata.StreamingDataLoader(dataset, **_loader_options(reading)))


def write_mds(samples: list[Sample], folder: Path, size: int) -> None:
    """Shards of MosaicML Streaming, of at most `size` bytes each; its column type `jpeg` would decode by Pillow."""
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]  optional

    columns = {"data": "bytes", "label": "int", "key": "int"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as out:
        for data, label, key in samples:
            out.write({"data": data, "label": label, "key": key})


def read_mds(url: str, cache: Path, reading: Reading) -> Epoch:
    """MosaicML's loader: it downloads 8 batches ahead in each worker and shuffles across shards, both its defaults."""
    from streaming import StreamingDataLoader, StreamingDataset  # pyright: ignore[reportMissingImports]  optional

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, int, int]:
            sample: Any = super().__getitem__(at)
            return _decoded((sample["data"], sample["label"], sample["key"]))

    dataset = Images(remote=url, local=str(cache), shuffle=True, batch_size=reading.batch)
    for stream in dataset.streams:  # else forked workers share the connection that read the index, and its answers
        stream._downloader.clean_up()
    return _epoch(StreamingDataLoader(dataset, **_loader_options(reading)))


def _loader_options(reading: Reading) -> dict[str, Any]:
    """Of a DataLoader; workers stay from epoch to epoch."""
    prefetch = {"prefetch_factor": reading.prefetch, "persistent_workers": True}
    return {"batch_size": reading.batch, "num_workers": reading.workers, **prefetch}


def _decoded(sample: Sample) -> tuple[torch.Tensor, int, int]:
    data, label, key = sample
    return decode(data), label, key


def _epoch(loader: Any) -> Epoch:
    def epoch() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, _labels, keys in loader:
            yield images, keys

    return epoch
