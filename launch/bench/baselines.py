"""What ours is compared with: other input pipelines, and packing as one writes it first.

In: the training images, as shards or as raw files. Out: functions that give the sizes of one epoch's batches. Invariants:
each reads the same images; pipelines of packages that are not installed are left out.
"""

import importlib.util
import io
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from shards.ham10000 import read_ham10000
from shards.image import decode_into
from shards.index import load_table
from shards.reader import SplitReader

BATCH = 64
Pipeline = Callable[[], Iterator[int]]  # one epoch: sizes of its batches as they come


def pipelines(reader: SplitReader, source: Path, scratch: Path) -> dict[str, Pipeline]:
    """All of them, over the images of one split.

    Args:
        reader: the split's shards. source: HAM10000 folder, for the raw files. scratch: folder to fill.
    """
    dataset, blobs = reader.dataset, all_images(reader)
    shards = [dataset.folder / shard.file for shard in reader.shards]
    tables = [load_table(dataset, shard) for shard in reader.shards]
    rows = [row for table in tables for row in zip(table["label"], table["image_id"], strict=True)]
    names = [(dataset.classes[label], image_id) for label, image_id in rows]
    images = read_ham10000(source).images
    raw = dict(zip(images["image_id"], images["path"], strict=True))
    tree = _link_tree([(label, Path(raw[image_id])) for label, image_id in names], scratch / "raw")
    for (label, image_id), data in zip(names, blobs, strict=True):
        (scratch / "stored" / label).mkdir(parents=True, exist_ok=True)
        (scratch / "stored" / label / f"{image_id}.jpg").write_bytes(data)
    found = {
        "notebook, 0 workers": notebook(tree, 0, 1000),
        "notebook, 2 workers": notebook(tree, 2, 2000),
        "WebDataset + DataLoader, 2 workers": webdataset_loader(shards, 2),
    }
    if installed("timm"):
        found["timm create_loader, 2 workers"] = timm_loader(scratch / "stored", 2)
    if installed("litdata"):
        found["litdata, 2 workers"] = litdata_loader(blobs.__getitem__, len(blobs), scratch / "litdata", 2)
    if installed("nvidia.dali"):
        found["DALI CPU, 2 threads"] = dali_cpu(shards, 2, len(blobs))
    return found


def all_images(reader: SplitReader) -> list[bytes]:
    """Every stored image of a split, as its bytes, in order."""
    sizes = enumerate(reader.shard_sizes)
    return [data for shard, size in sizes for _, data in reader.read(np.full(size, shard), np.arange(size))]


def decode_from_memory(blobs: list[bytes], reader: SplitReader, threads: int, batch: int) -> float:
    """Images/s of threads that do nothing but decode, each a batch at a time."""
    height, width = reader.dataset.height, reader.dataset.width

    def work(first: int) -> None:
        out = np.empty((batch, height, width, 3), np.uint8)
        for start in range(first * batch, len(blobs), threads * batch):
            for place, data in enumerate(blobs[start : start + batch]):
                decode_into(data, out[place])

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return len(blobs) / (time.perf_counter() - began)


def pack_plainly(paths: list[str], out: Path) -> None:
    """What one writes first: open, resize to 341x256, save as JPEG, add to a tar, one image after the other."""
    with tarfile.open(out, "w") as tar:
        for number, path in enumerate(paths):
            image = ImageOps.fit(Image.open(path).convert("RGB"), (341, 256), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            image.save(data, "JPEG", quality=90)
            entry = tarfile.TarInfo(f"{number:08d}.jpg")
            entry.size = data.tell()
            data.seek(0)
            tar.addfile(entry, data)


def notebook(tree: Path, workers: int, images: int) -> Pipeline:
    """The 2021 notebook's: ImageFolder on raw 600x450 files with its transforms; the first `images` of a shuffle."""
    dataset = ImageFolder(str(tree), _notebook_transforms())
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images].tolist()
    return _sizes(DataLoader(torch.utils.data.Subset(dataset, chosen), BATCH, shuffle=True, num_workers=workers))


def webdataset_loader(shards: list[Path], workers: int) -> Pipeline:
    """A DataLoader over `webdataset.WebDataset`, shuffled, decoded by torchvision."""
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]  it exports lazily

    dataset = WebDataset([str(path) for path in shards], shardshuffle=len(shards), workersplitter=_by_worker)
    dataset = dataset.shuffle(1000).to_tuple("jpg", "cls").map_tuple(decode, int)
    return _sizes(DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0))


def timm_loader(tree: Path, workers: int) -> Pipeline:
    """timm's `create_loader` with its training augmentation, on a tree of stored-size JPEG files."""
    from timm.data import create_dataset, create_loader  # pyright: ignore[reportPrivateImportUsage]  timm lists none

    dataset: Any = create_dataset("", root=str(tree))
    options = {"is_training": True, "num_workers": workers, "use_prefetcher": False, "persistent_workers": workers > 0}
    return _sizes(create_loader(dataset, (3, 224, 224), BATCH, **options))


def dali_cpu(shards: list[Path], threads: int, images: int) -> Pipeline:
    """NVIDIA DALI on the CPU: its WebDataset reader and decoder."""
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]  optional

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None)
    def pipeline():
        jpegs, labels = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
            name="reader",
        )
        return fn.decoders.image(jpegs, device="cpu", output_type=types.RGB), labels

    built: Any = pipeline()  # the decorator's return type is not typed
    built.build()

    def epoch() -> Iterator[int]:
        for _ in range(max(1, images // BATCH)):
            pixels, _labels = built.run()
            yield len(pixels)

    return epoch


def litdata_loader(blobs: Callable[[int], bytes], n: int, folder: Path, workers: int) -> Pipeline:
    """litdata's streaming loader over its own format, filled with the same JPEGs, decoded by torchvision."""
    import litdata  # pyright: ignore[reportMissingImports]  optional

    method = multiprocessing.get_start_method()
    litdata.optimize(blobs, list(range(n)), str(folder), chunk_bytes="32MB", num_workers=0)
    multiprocessing.set_start_method(method, force=True)  # litdata changes it for the whole process
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=decode)
    return _sizes(litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers))


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _link_tree(files: list[tuple[str, Path]], root: Path) -> Path:
    """A folder for each class with links to its files, as ImageFolder wants it."""
    for label, path in files:
        (root / label).mkdir(parents=True, exist_ok=True)
        os.symlink(path.resolve(), root / label / path.name)
    return root


def _notebook_transforms() -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize((224, 280)),
            transforms.CenterCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.RandomRotation(180)], 0.99),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def _sizes(loader) -> Pipeline:
    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch[0] if isinstance(batch, list | tuple) else batch)

    return epoch


def decode(data: bytes) -> torch.Tensor:
    """A JPEG as (3, H, W) uint8, by torchvision."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return cast(torch.Tensor, decode_jpeg(encoded, ImageReadMode.RGB))  # a list is given for a list alone


def _by_worker(urls):
    """Give each worker its own shards."""
    info = torch.utils.data.get_worker_info()
    urls = list(urls)
    yield from urls if info is None else urls[info.id :: info.num_workers]
