"""What the command line says of a dataset that is packed, or not yet.

In: an opened dataset, or the tasks that are not done. Out: lines on the console. Invariants: nobody can take a dataset for complete that is not.
"""

from shards.index import Dataset
from shards.tasks import Task


def print_packed(shown: str, dataset: Dataset, task: Task, seconds: float) -> None:
    """What is there now. Of several tasks, the seconds are those of the last one, so they say nothing of the speed of all."""
    images, size = sum(s.samples for s in dataset.shards), sum(s.bytes for s in dataset.shards)
    described = dataset.description
    speed = f"in {seconds:.0f} s, {images / seconds:.0f} images/s" if task.is_alone else f"by {task.size} tasks"
    print(
        f"packed {images} images into {len(dataset.shards)} shards ({size / 1e6:.0f} MB) {speed}; "
        f"left out {described.left_out} (left_out.csv says why)"
    )
    for note, times in described.source.items():
        if note not in ("name", "images", "fingerprint"):
            print(f"{times} images: {note}")
    print_table(shown, dataset)


def print_unfinished(shown: str, task: Task, unfinished: dict[int, str], seconds: float) -> None:
    """This task is done, and the dataset is not there yet: what has to happen, and what to do if it does not."""
    ranks = [str(rank) for rank in unfinished]
    print(
        f"{task} is done after {seconds:.0f} s. {shown} is NOT complete yet: {len(ranks)} of {task.size} tasks are not done "
        f"({', '.join(ranks)}). The last one to be done completes it. If one was killed or failed, start it again alone: the same "
        f"command with RANK={ranks[0]} WORLD_SIZE={task.size}"
    )
    for rank, error in unfinished.items():
        if error:
            print(f"task {rank} FAILED: {error}")


def print_table(shown: str, dataset: Dataset) -> None:
    """The class table of each split, and what a reader of a score must be told. shown: its path, or its URL without secrets."""
    about = dataset.description
    print(f"{shown}: {about.source['name']}, {dataset.width}x{dataset.height}, fingerprint {dataset.fingerprint[:12]}")
    print(dataset.describe_split())
    names = list(about.counts)
    print(f"{'class':<12}" + "".join(f"{name:>8}" for name in names))
    for label in dataset.classes:
        print(f"{label:<12}" + "".join(f"{about.counts[name][label]:>8}" for name in names))
    print(f"{'images':<12}" + "".join(f"{sum(about.counts[name].values()):>8}" for name in names))
    for what in ("citation", "license"):
        if text := getattr(about, what):
            print(f"{what}: {text}")
    for alias, real in about.aliases.items():
        print(f"{alias} is {real} under another name")
    for warning in about.warnings:
        print(f"warning: {warning}")
