"""Write a catalogue and its split as WebDataset tar shards.

In: a `Catalogue` and a `Split`. Out: folders as `shards.index` reads them, or the same behind URLs. Invariants: a dataset is complete or not
there; the same input gives the same bytes, whatever the number of threads and tasks; no task waits for another; memory does not depend on
the number of images.
"""

import errno
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import PIL
from PIL import features

from shards.catalogue import Catalogue
from shards.commit import commit
from shards.description import FORMAT, Description
from shards.grouping import Split
from shards.leaks import check_split, missing_classes
from shards.outputs import Output, Packing, clear_way
from shards.records import Records, identity
from shards.share import Job, keeps_what_is_done, pack_share
from shards.storage import PATIENCE_S
from shards.tasks import ALONE, Task, cut
from shards.unreadable import refuse_empty


@dataclass(frozen=True)
class Packed:
    """What is there after a task: the datasets, if they are complete, and which tasks they wait for, with the errors of those that said one."""

    descriptions: list[Description] = field(default_factory=list)
    unfinished: dict[int, str] = field(default_factory=dict)


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
    patience: float = PATIENCE_S,
) -> Packed:
    """Pack one split in several sizes with one pass over the originals, this task's share of it; otherwise as `pack`.

    patience: seconds without an answer after which writing to a URL fails.

    The last of the tasks to be done makes the datasets complete. What a task that was killed had done stays done when it is started again.

    Raises:
        ValueError: also where `shard_samples` differ between the outputs, or where somebody packs something else there.
    """
    check_split(catalogue.images, split)
    split = replace(split, warnings=(*split.warnings, *missing_classes(catalogue.images["label"], split)))
    if on_bad_image != "skip":
        refuse_empty(catalogue.images["path"])
    made = [Output(out, packing, patience) for out, packing in outputs]
    _check_outputs(made)
    plan = _plan(catalogue, split, made, task)
    with ExitStack() as stack:
        for output in made:
            output.lock(task, stack)
        clear_way(made, plan, task)
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
                pack_share(job, threads or task.threads, quiet)
                if unfinished := records.unfinished(task):
                    return Packed(unfinished=unfinished)
                _complete(job, split)
        except BaseException as error:
            _give_up(made, task, error)
            raise
        descriptions = [output.read_description() for output in made]
        for output in reversed(made):
            output.tidy()
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


def _give_up(outputs: list[Output], task: Task, error: BaseException) -> None:
    """One process that packs folders keeps nothing; what tasks have done, or what is behind a URL, stays for the next start.

    So does all where a source behind a URL could not be read any more: the next start goes on.

    Raises:
        OSError: a full disk, with what to do.
    """
    if not (keeps := keeps_what_is_done(outputs, task) or isinstance(error, ConnectionError)):
        for output in outputs:
            output.discard()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        disk = outputs[0].shown if outputs[0].is_local else "temporary files (TMPDIR)"
        kept = "what is complete is kept: the same command goes on" if keeps else "no partial output was kept"
        raise OSError(f"The disk of {disk} is full, and {kept}. Free space there, or give another folder.") from error
