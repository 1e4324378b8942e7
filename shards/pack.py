"""Write a catalogue and its split as WebDataset tar shards.

In: a `Catalogue` and a `Split`. Out: a folder as `shards.index` reads it. What stays true: the folder appears whole or
not at all (it is written beside its name and renamed at the end); the same input gives the same bytes, whatever the
number of threads; memory does not depend on the number of images.
"""

import errno
import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from shards.catalogue import Catalogue
from shards.image import FITS, encode, fit, open_rgb
from shards.index import FORMAT, SHARD_COLUMNS, Description, Shard, group_hashes, sha256
from shards.split import Split, check_split


@dataclass(frozen=True)
class Packing:
    """How pictures are stored.

    size: stored (width, height) in pixels. fit: cover, contain or squeeze. quality: JPEG quality, 1 to 100.
    shard_samples: at most this many samples in one shard.
    """

    size: tuple[int, int] = (341, 256)
    fit: str = "cover"
    quality: int = 90
    shard_samples: int = 1000

    def __post_init__(self):
        """Check the values."""
        if min(self.size) < 8 or max(self.size) > 65500:
            raise ValueError(
                f"The 'size' of stored pictures must be 8x8 to 65500x65500 pixels. Got {self.size} instead."
            )
        if self.fit not in FITS:
            raise ValueError(
                f"The 'fit' of stored pictures must be one of {', '.join(FITS)}. Got {self.fit!r} instead."
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"The JPEG 'quality' must be 1 to 100. Got {self.quality} instead.")
        if self.shard_samples < 1:
            raise ValueError(f"'shard_samples' must be at least 1. Got {self.shard_samples} instead.")


def pack(
    catalogue: Catalogue, split: Split, out: Path, packing: Packing | None = None, threads: int = 0, quiet: bool = False
) -> Description:
    """Pack a catalogue into `out`, which must not exist yet.

    Args:
        catalogue: checked rows. split: where each goes. packing: how pictures are stored.
        out: the folder to make. While packing, its content lies in `OUT.partial`; a killed pack leaves only that, and
            packing again removes it.
        threads: decoding threads, 0 for one a core.
        quiet: draw no progress bar.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: a picture that cannot be decoded, or a split that leaks.
    """
    check_split(catalogue.images, split)
    packing = packing or Packing()
    with _new_folder(Path(out)) as folder:
        source, written, shards = hashlib.sha256(), 0, []
        total = sum(map(len, split.rows.values()))
        with (
            ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool,
            tqdm(total=total, unit=" images", desc="packing", disable=True if quiet else None) as bar,
        ):
            for name, rows in split.rows.items():
                for number, start in enumerate(range(0, len(rows), packing.shard_samples)):
                    members = catalogue.images.iloc[rows[start : start + packing.shard_samples]]
                    samples = _encoded(pool, members, packing)
                    path = folder / f"{name}-{number:06d}.tar"
                    _write_shard(path, samples, members, catalogue, written, source, bar)
                    digests = sha256(path), sha256(path.with_suffix(".csv"))
                    shards.append(Shard(path.name, name, len(members), path.stat().st_size, *digests))
                    written += len(members)
        _write_table(pd.DataFrame(shards, columns=SHARD_COLUMNS), folder / "shards.csv")
        for name, rows in split.rows.items():
            np.save(folder / f"{name}.groups.npy", group_hashes(catalogue.images["group"].iloc[rows]))
        reasons = [(catalogue.images["image_id"].iloc[row], why) for row, why in sorted(split.left_out.items())]
        _write_table(pd.DataFrame(reasons, columns=["image_id", "reason"]), folder / "left_out.csv")
        description = Description(
            format=FORMAT,
            classes=list(catalogue.classes),
            size=list(packing.size),
            fit=packing.fit,
            quality=packing.quality,
            protocol=split.protocol,
            aliases=split.aliases,
            counts={name: _class_counts(catalogue, rows) for name, rows in split.rows.items()},
            left_out=len(split.left_out),
            warnings=[*catalogue.warnings, *split.warnings],
            source={"name": catalogue.name, "images": len(catalogue.images), "fingerprint": source.hexdigest()},
            files={
                name: sha256(folder / name)
                for name in ("shards.csv", "left_out.csv", *(f"{name}.groups.npy" for name in split.rows))
            },
        )
        _write(folder / "dataset.json", description.to_bytes())
    return description


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends well."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already. Give another folder, or remove it first: rm -r {out}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync_folder(partial)
        os.rename(partial, out)  # takes the place of an empty folder, too
        _sync_folder(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"The disk of {out} is full: nothing was kept. Free space there, or give another folder."
            ) from error
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _encoded(pool: ThreadPoolExecutor, members: pd.DataFrame, packing: Packing) -> Iterator[tuple[bytes, bytes]]:
    """Stored JPEG and SHA-256 of the original for each row, in order; a bounded number is under way."""
    waiting: deque = deque()
    try:
        for path in members["path"]:
            waiting.append(pool.submit(_encode_one, path, packing))
            if len(waiting) > 64:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _encode_one(path: str, packing: Packing) -> tuple[bytes, bytes]:
    original = Path(path).read_bytes()
    if not original:
        raise ValueError(f"The picture {path} is empty (0 bytes). Download it again or remove its row.")
    picture = fit(open_rgb(original, path), packing.size, packing.fit)
    return encode(picture, packing.quality), hashlib.sha256(original).digest()


def _write_shard(path: Path, samples, members: pd.DataFrame, catalogue: Catalogue, first_key: int, source, bar) -> None:
    """Write one tar and its table, and feed the source's fingerprint."""
    from webdataset import TarWriter  # imports torch, which takes seconds: only packing pays for it

    labels = members["label"].map(catalogue.classes.index).to_numpy()
    rows = members.drop(columns=["path", "label"]).to_dict("records")
    with open(path, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for number, ((jpeg, digest), row) in enumerate(zip(samples, rows, strict=True)):
                label = int(labels[number])
                text = {"label": label, "class": catalogue.classes[label]} | row
                tar.write(
                    {
                        "__key__": f"{first_key + number:08d}",
                        "jpg": jpeg,
                        "cls": str(label).encode(),
                        "json": json.dumps(text, ensure_ascii=False, sort_keys=True).encode(),
                    }
                )
                source.update(f"{row['image_id']}\t{text['class']}\t{row['group']}\t".encode() + digest)
                bar.update()
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(path) as tar:
        pictures = [member for member in tar if member.name.endswith(".jpg")]
    table = pd.DataFrame(
        {
            "key": [member.name.removesuffix(".jpg") for member in pictures],
            "offset": [member.offset_data for member in pictures],
            "size": [member.size for member in pictures],
            "label": labels,
        }
    )
    extras = members[["group", "image_id", *catalogue.extra_columns]].reset_index(drop=True)
    _write_table(pd.concat([table, extras], axis=1), path.with_suffix(".csv"))


def _class_counts(catalogue: Catalogue, rows: np.ndarray) -> dict[str, int]:
    counts = Counter(catalogue.images["label"].iloc[rows])
    return {name: counts[name] for name in catalogue.classes}


def _write_table(table: pd.DataFrame, path: Path) -> None:
    _write(path, table.to_csv(index=False, lineterminator="\n").encode())


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
