"""Write a catalogue and its split as WebDataset tar shards.

In: a `Catalogue` and a `Split`. Out: folders as `shards.index` reads them, or the same behind URLs. Invariants: a dataset is complete or not
there; the same input gives the same bytes, whatever the number of threads and tasks; no task waits for another; memory does not depend on
the number of images.
"""

import errno
import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import PIL
from PIL import features
from tqdm import tqdm

from shards.catalogue import Catalogue
from shards.commit import commit, readable_members
from shards.description import FORMAT, Description
from shards.files import sha256
from shards.grouping import Split
from shards.image import encode, fit, open_noted
from shards.leaks import check_split, missing_classes
from shards.outputs import Output, Packing, clear_way
from shards.places import write
from shards.records import Record, Records, identity, join_digests, state_of_originals
from shards.tars import Sample, sample_table, write_tars
from shards.tasks import ALONE, Cut, Task, cut, share
from shards.unreadable import all_in_one_error


@dataclass(frozen=True)
class Packed:
    """What is there after a task: the datasets, if they are complete, and which tasks they wait for, with the errors of those that said one."""

    descriptions: list[Description] = field(default_factory=list)
    unfinished: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What one task packs: its shards of all `cuts`, from where, to where."""

    catalogue: Catalogue
    cuts: list[Cut]
    outputs: list[Output]
    records: Records
    task: Task
    skips: bool  # images that cannot be decoded


def pack(
    catalogue: Catalogue,
    split: Split,
    out: Path | str,
    packing: Packing | None = None,
    threads: int = 0,
    quiet: bool = False,
    on_bad_image: str = "fail",
) -> Description:
    """Pack a catalogue into `out`, which must not exist yet, by this process alone.

    Args:
        catalogue: checked rows. split: where each goes. packing: how images are stored.
        out: the folder to make, or its URL. While packing, its content lies in `OUT.partial` and `OUT.packing`; a killed pack leaves only
            those, and the same one goes on with them. Behind a URL, `dataset.json` goes last.
        threads: decoding threads, 0 for one a core.
        quiet: draw no progress bar.
        on_bad_image: fail: images that cannot be decoded are an error that names them all, after the last image, and of a folder nothing
            is kept. skip: they are left out, each with its reason in `left_out.csv`.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError: images that cannot be decoded, or a split that leaks.
        OSError: a full disk, or storage that cannot be written, among others.
    """
    outputs = [(out, packing or Packing())]
    return pack_several(catalogue, split, outputs, threads, quiet, on_bad_image).descriptions[0]


def pack_several(
    catalogue: Catalogue,
    split: Split,
    outputs: list[tuple[Path | str, Packing]],
    threads: int = 0,
    quiet: bool = False,
    on_bad_image: str = "fail",
    task: Task = ALONE,
) -> Packed:
    """Pack one split in several sizes with one pass over the originals, this task's share of it; otherwise as `pack`.

    The last of the tasks to be done makes the datasets complete. What a task that was killed had done stays done when it is started again.

    Raises:
        ValueError: also where `shard_samples` differ between the outputs, or where somebody packs something else there.
    """
    check_split(catalogue.images, split)
    split = replace(split, warnings=(*split.warnings, *missing_classes(catalogue.images["label"], split)))
    made = [Output(out, packing) for out, packing in outputs]
    _check_outputs(made)
    plan = _plan(catalogue, split, made, task)
    clear_way(made, plan, task)
    with ExitStack() as stack:
        for output in made:
            output.open(task, stack)
        records = Records(made[0].work, made[0].scratch)
        cuts = cut(split, made[0].packing.shard_samples)
        job = Job(catalogue, cuts, made, records, task, skips=on_bad_image == "skip")
        try:
            records.begin(plan)
            for output in made:
                output.make(task)
            if not all(output.is_complete for output in made):
                _pack_share(job, threads or task.threads, quiet)
                if unfinished := records.unfinished(task):
                    return Packed(unfinished=unfinished)
                _complete(job, split)
        except BaseException as error:
            _give_up(made, task, error)
            raise
        descriptions = [output.read_description() for output in made]
        for output in made:
            output.work.clear()
    return Packed(descriptions)


def _check_outputs(outputs: list[Output]) -> None:
    if any(output.packing.shard_samples != outputs[0].packing.shard_samples for output in outputs):
        raise ValueError("Outputs of one pass must have the same 'shard_samples'.")
    places = [output.identity[0] for output in outputs]
    reserved = {f"{place}{ending}" for place in places for ending in ("", ".partial", ".packing")}
    if len(reserved) < 3 * len(places):
        raise ValueError(f"Outputs of one pass must be different folders. Got {', '.join(places)}.")


def _plan(catalogue: Catalogue, split: Split, outputs: list[Output], task: Task) -> dict:
    """What all tasks of this packing have in common; other decoders or encoders would give other bytes."""
    libraries = [PIL.__version__, *(str(features.version(name)) for name in ("jpg", "libjpeg_turbo", "littlecms2"))]
    settings = {
        "tasks": task.size,
        "outputs": [output.identity for output in outputs],
        "format": FORMAT,
        "libraries": libraries,
    }
    return json.loads(json.dumps(identity(catalogue, split, settings)))


def _pack_share(job: Job, threads: int, quiet: bool) -> None:
    """Pack the shards of a task that are not there yet, and say that it is done.

    Raises:
        ValueError: naming all images of the task that cannot be decoded, unless they are skipped.
    """
    task, own, bad = job.task, share(job.cuts, job.task), dict[int, str]()
    job.records.unsign(task)
    recorded = job.records.place.names()
    with ThreadPoolExecutor(threads) as pool, tqdm(
        total=sum(len(shard.rows) for shard in own),
        unit=" images",
        desc="packing" if task.is_alone else str(task),
        disable=True if quiet else None,
    ) as bar:  # fmt: skip
        for shard in own:
            members = job.catalogue.images.iloc[shard.rows]
            originals = state_of_originals(members)
            if f"{shard.name}.json" in recorded and _is_packed(job, shard, originals):
                bar.update(len(members))
                continue
            bad |= _pack_shard(job, shard, members, originals, pool, bar)
    if bad and not job.skips:
        error = all_in_one_error(bad, _what_is_kept(job))
        job.records.sign(task, error.splitlines()[0])
        raise ValueError(error)
    job.records.sign(task)


def _complete(job: Job, split: Split, tries: int = 3) -> None:
    """Make the datasets complete, unless another task does so at the same time, by the same bytes.

    Raises:
        FileNotFoundError: a file is gone, and no other task has completed them.
    """
    while True:
        try:
            commit(job.catalogue, split, job.cuts, job.outputs, job.records, job.task)
            return
        except FileNotFoundError:
            tries -= 1
            if all(output.is_complete for output in job.outputs):
                return
            if not tries or job.task.is_alone:
                raise
            time.sleep(1.0)  # the other one is about to be done, or was killed


def _is_packed(job: Job, shard: Cut, originals: str) -> bool:
    """Whether a shard is there from before, of the same originals, and to the last bit as it was recorded."""
    record = job.records.read(shard)
    if record is None or record.originals != originals or (record.bad and not job.skips):
        return False
    for output, (size, tar, table) in zip(job.outputs, record.files, strict=True):
        if output.files.sha256(f"{shard.name}.tar", size) != tar:
            return False
        with suppress(FileNotFoundError):
            if hashlib.sha256(output.files.read(f"{shard.name}.csv")).hexdigest() == table:
                continue
        return False
    return True


def _pack_shard(
    job: Job, shard: Cut, members: pd.DataFrame, originals: str, pool: ThreadPoolExecutor, bar: tqdm
) -> dict[int, str]:
    """Pack one shard of each output and record it; returns row -> problem of images that cannot be decoded."""
    first_key = job.records.first_key(shard, job.cuts) if job.skips else shard.first
    samples = _encoded(pool, members, [output.packing for output in job.outputs])
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


def _what_is_kept(job: Job) -> str:
    """Where images cannot be decoded: what becomes of the others, in the middle of a sentence."""
    if not _keeps(job.outputs, job.task):
        return "nothing was kept"
    again = "the same command" if job.task.is_alone else f"this task alone, as before ({job.task.variables})"
    return f"the dataset is not complete without them. Shards of other images are kept: start {again} to go on"


def _keeps(outputs: list[Output], task: Task) -> bool:
    """Whether what was done is kept after an error."""
    return not task.is_alone or not all(output.is_local for output in outputs)


def _give_up(outputs: list[Output], task: Task, error: BaseException) -> None:
    """One process that packs folders keeps nothing; what tasks have done, or what is behind a URL, stays for the next start.

    Raises:
        OSError: a full disk, with what to do.
    """
    if not (keeps := _keeps(outputs, task)):
        for output in outputs:
            output.discard()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        disk = outputs[0].shown if outputs[0].is_local else "temporary files (TMPDIR)"
        kept = "what is complete is kept: the same command goes on" if keeps else "no partial output was kept"
        raise OSError(f"The disk of {disk} is full, and {kept}. Free space there, or give another folder.") from error


def _encoded(pool: ThreadPoolExecutor, members: pd.DataFrame, packings: list[Packing]) -> Iterator[Sample | str]:
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


def _try_encode(path: str, packings: list[Packing]) -> Sample | str:
    try:
        return _encode_one(path, packings)
    except ValueError as error:
        return str(error)


def _encode_one(path: str, packings: list[Packing]) -> Sample:
    original = Path(path).read_bytes()
    if not original:
        raise ValueError(f"The image {path} is empty (0 bytes). Download it again or remove its row.")
    image, notes = open_noted(original, path)
    stored = [encode(fit(image, packing.size, packing.fit), packing.quality) for packing in packings]
    return stored, hashlib.sha256(original).digest(), notes
