"""Packing by tasks, for tests: in this process with numbers given, or as a program that records each state a kill could leave.

`python tests/support/packing.py STATES RANK SIZE SOURCE OUT...` packs SOURCE as that task into each OUT, in shards of 10, and writes
`tests/support/recorder.py`'s states of the folder of OUT as a pickle.
"""

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from shards.outputs import Packing
from shards.pack import Packed, pack_several
from shards.public_data import Columns
from shards.sources import read_source
from shards.split import split_by_lesion
from shards.tasks import Task

CLASSES = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
GROUND_TRUTH = "ISIC2018_Task3_Training_GroundTruth"


def draw_source(folder: Path, damaged: tuple[int, ...] = ()) -> list[Path]:
    """84 small images in two folders, one a class; those at the places that are named are damaged. Returns their paths."""
    random, paths = np.random.default_rng(0), [folder / "mn"[n % 3 == 0] / f"{n:02d}.png" for n in range(84)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (18, 24, 3), np.uint8)).save(path)
        if number in damaged:
            path.write_bytes(path.read_bytes()[:60])
    return paths


def draw_kinds(ham10000: Path, root: Path) -> dict[str, list[str]]:
    """Sources of every kind below one folder, and words that pack each, with ROOT in place of that folder, which is `root`'s."""
    shutil.copytree(ham10000, root / "ham")
    draw_source(root / "classes")
    names = [path.relative_to(root / "classes") for path in sorted((root / "classes").rglob("*.png"))]
    rows = [
        (f"classes/{name}", name.parent.name, f"P{place // 2}") for place, name in enumerate(sorted(names, key=str))
    ]
    pd.DataFrame(rows, columns=["image", "dx", "patient"]).to_csv(root / "table.csv", index=False)
    (root / "tables").mkdir()
    alone = [(name.stem, name.parent.name) for name in names]
    pd.DataFrame(alone, columns=["image", "dx"]).to_csv(root / "tables" / "table.csv", index=False)
    for name in names:
        there = root / "splits" / ("train", "val", "test")[int(name.stem) % 5 % 3] / name
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "classes" / name, there)
    _draw_challenge(
        root / "ISIC2018_Task3_Training_GroundTruth", names, root / "ISIC2018_Task3_Training_LesionGroupings.csv"
    )
    _draw_test_images(root / "challenge")
    metadata = next(path.name for path in ham10000.iterdir() if path.is_file())
    return {
        "root": [str(root)],
        "ham10000": ["ROOT/ham"],
        "table of ham10000": [f"ROOT/ham/{metadata}"],
        "classes": ["ROOT/classes"],
        "splits": ["ROOT/splits"],
        "groups": ["ROOT/table.csv", "--image-column", "image", "--label-column", "dx", "--group-column", "patient"],
        "image root": [
            "ROOT/tables/table.csv",
            "--image-column",
            "image",
            "--label-column",
            "dx",
            "--image-root",
            "ROOT/classes",
        ],
        "companion": [f"ROOT/{GROUND_TRUTH}/{GROUND_TRUTH}.csv", "--image-root", "ROOT/classes"],
        "isic2018": ["ROOT/ham", "--protocol", "isic2018", "--test-source", "ROOT/challenge"],
    }


def _draw_challenge(folder: Path, names: list[Path], companion: Path) -> None:
    """A table of the ISIC 2018 challenge, and beside its folder the one that names lesions."""
    folder.mkdir()
    hot = [[name.stem, *np.eye(7)[int(name.parent.name == "n")].tolist()] for name in names]
    pd.DataFrame(hot, columns=["image", *CLASSES]).to_csv(folder / f"{folder.name}.csv", index=False)
    lesions = [(name.stem, f"HAM_{int(name.stem) // 6 * 2 + (name.parent.name == 'n')}") for name in names]
    pd.DataFrame(lesions, columns=["image", "lesion_id"]).to_csv(companion, index=False)


def _draw_test_images(folder: Path) -> None:
    names, random = [f"ISIC_{34524 + number:07d}" for number in range(7)], np.random.default_rng(5)
    folder.mkdir()
    for name in names:
        Image.fromarray(random.integers(0, 256, (18, 24, 3), np.uint8)).save(folder / f"{name}.jpg")
    hot = pd.DataFrame(np.eye(7), columns=CLASSES)
    hot.insert(0, "image", names)
    hot.to_csv(folder / "ISIC2018_Task3_Test_GroundTruth.csv", index=False)


def pack_task(
    source: Path | str, outs: list, rank: int = 0, size: int = 1, bad: str = "fail", seed: int = 0, **packing
) -> Packed:
    """What `python -m shards pack SOURCE OUT --also ...` does, of one task; the first output has 16x12 pixels, the second 12x9."""
    catalogue = read_source(source, Columns())
    sizes = [(16 - 4 * n, 12 - 3 * n) for n in range(len(outs))]
    outputs = [
        (out, Packing(**{"size": side, "shard_samples": 10} | packing)) for out, side in zip(outs, sizes, strict=True)
    ]
    split = split_by_lesion(catalogue.images, seed=seed)
    return pack_several(catalogue, split, outputs, 2, quiet=True, on_bad_image=bad, task=Task(rank, size))


def words_of(source: Path | str, *outs: Path | str) -> list[str]:
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
