"""Packing by many tasks: which one this process is, and which shards are its own.

In: the environment of torchrun or srun. Out: a `Task`. Invariants: a shard is one task's; the tasks take turns in the order of the shards,
so that they come to the same place at about the same time.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shards.files import usable_cores
from shards.grouping import Split

SPECIAL_STEPS = 2**32 - 16  # from here on, a step's number means a batch script, an interactive shell and the like


@dataclass(frozen=True)
class Task:
    """One of the processes that pack one dataset. here: how many of them are on this machine, as far as the launcher says."""

    rank: int = 0
    size: int = 1
    here: int = 1

    def __post_init__(self):
        """Check the numbers."""
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"RANK must be 0 to WORLD_SIZE - 1. Got RANK {self.rank} of WORLD_SIZE {self.size} instead."
            )

    @property
    def is_alone(self) -> bool:
        """Whether one process packs everything."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one of all tasks that says what is the same for all."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """Decoding threads: the cores that this process may use, shared with the other tasks of this machine."""
        return max(1, usable_cores() // self.here)

    @property
    def variables(self) -> str:
        """What makes a process this task."""
        return f"RANK={self.rank} WORLD_SIZE={self.size}"

    def __str__(self) -> str:
        """For people; numbers begin with 0, as RANK does."""
        return f"task {self.rank} of {self.size}"


ALONE = Task()


def this_task(environment: Mapping[str, str] = os.environ) -> Task:
    """The task that a launcher made of this process; the only one where there is no launcher.

    RANK and WORLD_SIZE (torchrun, or by hand) count before SLURM's. Of those, only what a step says is taken, the processes that `srun`
    started: the shell of `sbatch` or `salloc` knows the tasks of its job (SLURM_NTASKS), but is not one of them.

    Raises:
        ValueError: RANK without WORLD_SIZE, or numbers that cannot be.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
        here = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else 1
        return Task(rank, size, max(1, here))
    step = environment.get("SLURM_STEP_ID", "")
    if step.isdecimal() and int(step) < SPECIAL_STEPS and "SLURM_STEP_NUM_TASKS" in environment:
        return Task(_number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS"))
    return ALONE


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        found = f"Got {text!r}" if name in environment else "It is missing"
        raise ValueError(
            f"{name} must be a whole number: each of N tasks gets RANK (0 to N - 1) and WORLD_SIZE (N), from torchrun, srun or by "
            f"hand. {found}. One process alone needs neither: env -u RANK -u WORLD_SIZE python -m shards pack ..."
        )
    return int(text)


@dataclass(frozen=True)
class Cut:
    """A shard to be: its place among all, its split, its name without ending, and the rows that go into it.

    first: the number of rows before it, which is its first key as long as no image is left out.
    """

    place: int
    split: str
    name: str
    rows: np.ndarray
    first: int


def cut(split: Split, per_shard: int) -> list[Cut]:
    """The shards of a split, in order."""
    cuts: list[Cut] = []
    first = 0
    for name, rows in split.rows.items():
        for number, start in enumerate(range(0, len(rows), per_shard)):
            here = rows[start : start + per_shard]
            cuts.append(Cut(len(cuts), name, f"{name}-{number:06d}", here, first))
            first += len(here)
    return cuts


def share(cuts: Sequence[Cut], task: Task) -> Sequence[Cut]:
    """The shards of a task, in order."""
    return cuts[task.rank :: task.size]
