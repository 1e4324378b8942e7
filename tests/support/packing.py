"""Packing by tasks, for tests: in this process with numbers given, or as a program that records each state a kill could leave.

`python tests/support/packing.py STATES RANK SIZE SOURCE OUT...` packs SOURCE as that task into each OUT, in shards of 10, and writes
`tests/support/recorder.py`'s states of the folder of OUT as a pickle.
"""

import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from shards.outputs import Packing
from shards.pack import Packed, pack_several
from shards.public_data import Columns
from shards.sources import read_source
from shards.split import split_by_lesion
from shards.tasks import Task


def draw_source(folder: Path, damaged: tuple[int, ...] = ()) -> list[Path]:
    """84 small images in two folders, one a class; those at the places that are named are damaged. Returns their paths."""
    random, paths = np.random.default_rng(0), [folder / "mn"[n % 3 == 0] / f"{n:02d}.png" for n in range(84)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (18, 24, 3), np.uint8)).save(path)
        if number in damaged:
            path.write_bytes(path.read_bytes()[:60])
    return paths


def pack_task(
    source: Path, outs: list, rank: int = 0, size: int = 1, bad: str = "fail", seed: int = 0, **packing
) -> Packed:
    """What `python -m shards pack SOURCE OUT --also ...` does, of one task; the first output has 16x12 pixels, the second 12x9."""
    catalogue = read_source(source, Columns())
    sizes = [(16 - 4 * n, 12 - 3 * n) for n in range(len(outs))]
    outputs = [
        (out, Packing(**{"size": side, "shard_samples": 10} | packing)) for out, side in zip(outs, sizes, strict=True)
    ]
    split = split_by_lesion(catalogue.images, seed=seed)
    return pack_several(catalogue, split, outputs, 2, quiet=True, on_bad_image=bad, task=Task(rank, size))


def words_of(source: Path, *outs: Path | str) -> list[str]:
    """The same as a command, which skips images that cannot be read."""
    out, *also = map(str, outs)
    words = ["-m", "shards", "pack", str(source), out, "--size", "16x12", "--shard-samples", "10"]
    words += ["--on-bad-image", "skip", *(word for other in also for word in ("--also", f"{other}=12x9"))]
    return [sys.executable, *words]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from recorder import Recorder

    states, rank, size, source, *outs = sys.argv[1:]
    recorder = Recorder(Path(outs[0]).parent)
    sys.addaudithook(recorder)
    pack_task(Path(source), [Path(out) for out in outs], int(rank), int(size), "skip")
    recorder.look("the end")
    recorder._looking = True
    Path(states).write_bytes(pickle.dumps([(place, dict(pickle.loads(key))) for key, place in recorder.states.items()]))
