"""Write a catalogue and its split as WebDataset tar shards.

In: a `Catalogue` and a `Split`. Out: a folder as `shards.index` reads it. Invariants: the folder appears whole or
not at all (it is written beside its name and renamed at the end); the same input gives the same bytes, whatever the
number of threads; memory does not depend on the number of images.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from shards.catalogue import Catalogue
from shards.description import FORMAT, Description
from shards.files import new_folder, sha256, usable_cores, write_durably
from shards.grouping import Split
from shards.groups import group_hashes
from shards.image import FITS, encode, fit, open_noted
from shards.leaks import check_split, missing_classes
from shards.shard_list import SHARD_COLUMNS, Shard
from shards.unreadable import all_in_one_error, without


@dataclass(frozen=True)
class Packing:
    """How images are stored.

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
            raise ValueError(f"The 'size' of stored images must be 8x8 to 65500x65500 pixels. Got {self.size} instead.")
        if self.fit not in FITS:
            raise ValueError(f"The 'fit' of stored images must be one of {', '.join(FITS)}. Got {self.fit!r} instead.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"The JPEG 'quality' must be 1 to 100. Got {self.quality} instead.")
        if self.shard_samples < 1:
            raise ValueError(f"'shard_samples' must be at least 1. Got {self.shard_samples} instead.")


def pack(
    catalogue: Catalogue,
    split: Split,
    out: Path,
    packing: Packing | None = None,
    threads: int = 0,
    quiet: bool = False,
    on_bad_image: str = "fail",
) -> Description:
    """Pack a catalogue into `out`, which must not exist yet.

    Args:
        catalogue: checked rows. split: where each goes. packing: how images are stored.
        out: the folder to make. While packing, its content lies in `OUT.partial`; a killed pack leaves only that, and
            packing again removes it.
        threads: decoding threads, 0 for one a core.
        quiet: draw no progress bar.
        on_bad_image: fail: images that cannot be decoded are an error that names them all, after the last image, and nothing
            is kept. skip: they are left out, each with its reason in `left_out.csv`.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: images that cannot be decoded, or a split that leaks.
        OSError: a full disk, among others.
    """
    return pack_several(catalogue, split, [(out, packing or Packing())], threads, quiet, on_bad_image)[0]


def pack_several(
    catalogue: Catalogue,
    split: Split,
    outputs: list[tuple[Path, Packing]],
    threads: int = 0,
    quiet: bool = False,
    on_bad_image: str = "fail",
) -> list[Description]:
    """Pack one split in several sizes with one pass over the originals; otherwise as `pack`.

    Raises:
        ValueError: also where `shard_samples` differ between the outputs.
    """
    check_split(catalogue.images, split)
    split = replace(split, warnings=(*split.warnings, *missing_classes(catalogue.images["label"], split)))
    per_shard = outputs[0][1].shard_samples
    if any(packing.shard_samples != per_shard for _, packing in outputs):
        raise ValueError("Outputs of one pass must have the same 'shard_samples'.")
    named = [Path(out).resolve() for out, _ in outputs]
    if len({*named, *(out.with_name(f"{out.name}.partial") for out in named)}) < 2 * len(named):
        raise ValueError(f"Outputs of one pass must be different folders. Got {', '.join(map(str, named))}.")
    with ExitStack() as stack:
        folders = [stack.enter_context(new_folder(Path(out))) for out, _ in outputs]
        pool = stack.enter_context(ThreadPoolExecutor(threads or usable_cores()))
        total = sum(map(len, split.rows.values()))
        bar = stack.enter_context(tqdm(total=total, unit=" images", desc="packing", disable=True if quiet else None))
        source, written, bad = hashlib.sha256(), 0, dict[int, str]()  # bad: row -> what is wrong with its image
        notes = Counter[str]()  # what was done to how many images
        shards: list[list[Shard]] = [[] for _ in outputs]
        for name, rows in split.rows.items():
            for number, start in enumerate(range(0, len(rows), per_shard)):
                here = rows[start : start + per_shard]
                members = catalogue.images.iloc[here]
                samples = _encoded(pool, members, [packing for _, packing in outputs])
                paths = [folder / f"{name}-{number:06d}.tar" for folder in folders]
                problems = _write_tars(paths, samples, members, catalogue, written, source, notes, bar)
                bad |= {int(here[place]): problem for place, problem in problems.items()}
                members = members.drop(members.index[list(problems)])
                if members.empty:
                    for path in paths:
                        path.unlink()
                    continue
                for path, found in zip(paths, shards, strict=True):
                    _write_table(_sample_table(path, members, catalogue), path.with_suffix(".csv"))
                    digests = sha256(path), sha256(path.with_suffix(".csv"))
                    found.append(Shard(path.name, name, len(members), path.stat().st_size, *digests))
                written += len(members)
        if bad and on_bad_image == "fail":
            raise ValueError(all_in_one_error(bad))
        split = without(split, bad, catalogue.images["label"])
        return [
            _write_index(folder, catalogue, split, packing, found, source.hexdigest(), notes)
            for folder, (_, packing), found in zip(folders, outputs, shards, strict=True)
        ]


def _write_index(
    folder: Path,
    catalogue: Catalogue,
    split: Split,
    packing: Packing,
    shards: list[Shard],
    fingerprint: str,
    notes: Counter,
) -> Description:
    """Write the index files; `dataset.json`, which marks a complete dataset, goes last."""
    images = catalogue.images
    _write_table(pd.DataFrame(shards, columns=SHARD_COLUMNS), folder / "shards.csv")
    reasons = [(images["image_id"].iloc[row], why) for row, why in sorted(split.left_out.items())]
    _write_table(pd.DataFrame(reasons, columns=["image_id", "reason"]), folder / "left_out.csv")
    for name, rows in split.rows.items():
        hashes = io.BytesIO()
        np.save(hashes, group_hashes(images["group"].iloc[rows]))
        write_durably(folder / f"{name}.groups.npy", hashes.getvalue())
    files = ["shards.csv", "left_out.csv", *(f"{name}.groups.npy" for name in split.rows)]
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
        source={"name": catalogue.name, "images": len(images), "fingerprint": fingerprint}
        | dict(sorted(notes.items())),
        files={name: sha256(folder / name) for name in files},
        group_name=catalogue.group_name,
        citation=catalogue.citation,
        license=catalogue.license,
    )
    write_durably(folder / "dataset.json", description.to_bytes())
    return description


def _encoded(
    pool: ThreadPoolExecutor, members: pd.DataFrame, packings: list[Packing]
) -> Iterator[tuple[list[bytes], bytes, list[str]] | str]:
    """Stored JPEGs, SHA-256 of the original and notes for each row, or what is wrong with it, in order; a bounded number is under way."""
    waiting: deque = deque()
    try:
        for path in members["path"]:
            waiting.append(pool.submit(_try_encode, path, packings))
            if len(waiting) > 64:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _try_encode(path: str, packings: list[Packing]) -> tuple[list[bytes], bytes, list[str]] | str:
    try:
        return _encode_one(path, packings)
    except ValueError as error:
        return str(error)


def _encode_one(path: str, packings: list[Packing]) -> tuple[list[bytes], bytes, list[str]]:
    original = Path(path).read_bytes()
    if not original:
        raise ValueError(f"The image {path} is empty (0 bytes). Download it again or remove its row.")
    image, notes = open_noted(original, path)
    stored = [encode(fit(image, packing.size, packing.fit), packing.quality) for packing in packings]
    return stored, hashlib.sha256(original).digest(), notes


def _write_tars(
    paths: list[Path],
    samples: Iterator,
    members: pd.DataFrame,
    catalogue: Catalogue,
    first_key: int,
    source,
    notes: Counter,
    bar,
) -> dict[int, str]:
    """Write one shard of each output, feed the source's fingerprint, count notes; returns place -> problem of what is not in them."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds: only packing pays for it

    rows = members.drop(columns=["path", "label"]).to_dict("records")
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        with ExitStack() as writing:
            tars = [writing.enter_context(TarWriter(file, encoder=False, mtime=0)) for file in files]
            problems: dict[int, str] = {}
            for place, (sample, row) in enumerate(zip(samples, rows, strict=True)):
                bar.update()
                if isinstance(sample, str):
                    problems[place] = sample
                    continue
                (jpegs, digest, noted), number, name = sample, place - len(problems), members["label"].iloc[place]
                notes.update(noted)
                label = catalogue.classes.index(name)
                text = json.dumps(row | {"label": label, "class": name}, ensure_ascii=False, sort_keys=True).encode()
                for tar, jpeg in zip(tars, jpegs, strict=True):
                    key = f"{first_key + number:08d}"
                    tar.write({"__key__": key, "jpg": jpeg, "cls": str(label).encode(), "json": text})
                source.update(f"{row['image_id']}\t{name}\t{row['group']}\t".encode() + digest)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return problems


def _sample_table(path: Path, members: pd.DataFrame, catalogue: Catalogue) -> pd.DataFrame:
    """One row a sample of a tar that was just written: where its image lies, and the source's columns."""
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
    table = pd.DataFrame(
        {
            "key": [member.name.removesuffix(".jpg") for member in images],
            "offset": [member.offset_data for member in images],
            "size": [member.size for member in images],
            "label": members["label"].map(catalogue.classes.index).to_numpy(),
        }
    )
    extras = members[["group", "image_id", *catalogue.extra_columns]].reset_index(drop=True)
    return pd.concat([table, extras], axis=1)


def _class_counts(catalogue: Catalogue, rows: np.ndarray) -> dict[str, int]:
    counts = Counter(catalogue.images["label"].iloc[rows])
    return {name: counts[name] for name in catalogue.classes}


def _write_table(table: pd.DataFrame, path: Path) -> None:
    write_durably(path, table.to_csv(index=False, lineterminator="\n").encode())
