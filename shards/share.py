"""One task's share of packing: its shards, one after the other, each recorded when it is there.

In: a `Job`. Out: files in their places, and records of them. Invariants: a shard that is there from before, whole and of the same
originals, is not packed again; a bounded number of images is under way, and one shard of each output on this machine's disk.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Semaphore

import pandas as pd
from tqdm import tqdm

from shards.catalogue import Catalogue
from shards.commit import readable_members
from shards.files import sha256
from shards.image import encode, fit, open_noted
from shards.originals import in_order, n_readers, threads_of
from shards.outputs import Output, Packing
from shards.places import write
from shards.records import Record, Records, join_digests, state_of_originals
from shards.tars import Sample, sample_table, write_tars
from shards.tasks import Cut, Task, share
from shards.tree import RemotePath, of_cell
from shards.unreadable import all_in_one_error


@dataclass(frozen=True)
class Job:
    """What one task packs: its shards of all `cuts`, from where, to where."""

    catalogue: Catalogue
    cuts: list[Cut]
    outputs: list[Output]
    records: Records
    task: Task
    skips: bool  # images that cannot be decoded


def pack_share(job: Job, threads: int, quiet: bool) -> None:
    """Pack the shards of a task that are not there yet, and say that it is done.

    Raises:
        ValueError: naming all images of the task that cannot be decoded, unless they are skipped.
    """
    task, own, bad = job.task, share(job.cuts, job.task), dict[int, str]()
    job.records.unsign(task)
    recorded = job.records.place.names()
    readers = n_readers(job.catalogue.images["path"], threads)
    with threads_of(readers) as pool, tqdm(
        total=sum(len(shard.rows) for shard in own),
        unit=" images",
        desc="packing" if task.is_alone else str(task),
        disable=True if quiet else None,
    ) as bar:  # fmt: skip
        encoder = Encoder(pool, Semaphore(threads), max(64, readers))
        for shard in own:
            members = job.catalogue.images.iloc[shard.rows]
            originals = state_of_originals(members)
            if f"{shard.name}.json" in recorded and _is_packed(job, shard, originals):
                bar.update(len(members))
                continue
            bad |= _pack_shard(job, shard, members, originals, encoder, bar)
    if bad and not job.skips:
        error = all_in_one_error(bad, _what_is_kept(job))
        job.records.sign(task, error.splitlines()[0])
        raise ValueError(error)
    job.records.sign(task)


def _is_packed(job: Job, shard: Cut, originals: str) -> bool:
    """Whether a shard is there from before, of the same originals, and to the last bit as it was recorded."""
    record = job.records.read(shard)
    if record is None or record.originals != originals or (record.bad and not job.skips):
        return False
    if record.samples == 0:  # none of its images could be read
        return True
    for output, (size, tar, table) in zip(job.outputs, record.files, strict=True):
        if output.files.sha256(f"{shard.name}.tar", size) != tar:
            return False
        with suppress(FileNotFoundError):
            if hashlib.sha256(output.files.read(f"{shard.name}.csv")).hexdigest() == table:
                continue
        return False
    return True


def _pack_shard(
    job: Job, shard: Cut, members: pd.DataFrame, originals: str, encoder: "Encoder", bar: tqdm
) -> dict[int, str]:
    """Pack one shard of each output and record it; returns row -> problem of images that cannot be decoded."""
    first_key = job.records.first_key(shard, job.cuts) if job.skips else shard.first
    samples = encoder.encoded(members["path"], [output.packing for output in job.outputs])
    paths = [output.scratch / f"{shard.name}.tar" for output in job.outputs]
    written = write_tars(paths, samples, members, job.catalogue, first_key, bar.update)
    bad = {int(shard.rows[place]): problem for place, problem in written.bad.items()}
    if not written.digests or (bad and not job.skips):
        for path, output in zip(paths, job.outputs, strict=True):
            path.unlink()
            for name in (path.name, f"{shard.name}.csv"):  # from before its images were damaged
                output.files.remove(name)
        if not job.skips:
            return bad
    files = []
    if written.digests:
        members = readable_members(job.catalogue, shard, written.bad)
        for path, output in zip(paths, job.outputs, strict=True):
            table, size, digest = sample_table(path, members, job.catalogue), path.stat().st_size, sha256(path)
            output.files.take(path, path.name)
            files.append((size, digest, write(output.files, f"{shard.name}.csv", table, output.scratch)))
    digests, notes = join_digests(written.digests), dict(written.notes)
    record = Record(first_key, len(written.digests), written.bad, notes, digests, originals, tuple(files))
    job.records.write(shard, record)
    return bad


@dataclass(frozen=True)
class Encoder:
    """Threads that read and encode images, `most` at a time. Each may wait for a network; `cores` of them decode and encode."""

    pool: ThreadPoolExecutor
    cores: Semaphore
    most: int

    def encoded(self, paths: Iterable[str | RemotePath], packings: list[Packing]) -> Iterator[Sample | str]:
        """Stored JPEGs, SHA-256 of the original and notes for each image, or what is wrong with it, in order; a bounded number is under way."""
        return in_order(self.pool, partial(_try_encode, packings=packings, cores=self.cores), paths, self.most)


def _what_is_kept(job: Job) -> str:
    """Where images cannot be decoded: what becomes of the others, in the middle of a sentence."""
    if not keeps_what_is_done(job.outputs, job.task):
        return "nothing was kept"
    again = "the same command" if job.task.is_alone else f"this task alone, as before ({job.task.variables})"
    return f"the dataset is not complete without them. Shards of other images are kept: start {again} to go on"


def keeps_what_is_done(outputs: list[Output], task: Task) -> bool:
    """Whether what was done is kept after an error."""
    return not task.is_alone or not all(output.is_local for output in outputs)


def _try_encode(path: str | RemotePath, packings: list[Packing], cores: Semaphore) -> Sample | str:
    """Stored JPEGs, SHA-256 of the original and notes, or what is wrong with the image.

    Raises:
        OSError: it cannot be read, which is no fault of the image: nobody may leave it out for that.
    """
    original = of_cell(path).read_bytes()
    try:
        with cores:
            return _encode(original, str(path), packings)
    except ValueError as error:
        return str(error)


def _encode(original: bytes, name: str, packings: list[Packing]) -> Sample:
    if not original:
        raise ValueError(f"The image {name} is empty (0 bytes). Download it again or remove its row.")
    image, notes = open_noted(original, name)
    stored = [encode(fit(image, packing.size, packing.fit), packing.quality) for packing in packings]
    return stored, hashlib.sha256(original).digest(), notes
