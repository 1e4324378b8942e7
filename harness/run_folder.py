"""The folder of a run: whose it is, and how the run fares.

In: settings, a dataset, a `Progress`. Out: `config.yaml`, `dataset.json`, `state.json`, `errors/`. What stays true: one
folder holds one run; `state.json` says `running | stopped | finished | failed` and how far, for people and job scripts.
"""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.checkpoint import Checkpoint, newest, write_atomically
from harness.config import Config, differences, flat, load_config, to_yaml
from harness.progress import Progress
from shards.index import Dataset


def open_run(folder: Path, config: Config, dataset: Dataset) -> None:
    """Make the run's folder, or check that it belongs to these settings.

    Raises:
        ValueError: it holds a run with other settings (the keys are named) or on another dataset.
        FileExistsError: it holds something else.
    """
    saved, described = folder / "config.yaml", folder / "dataset.json"
    if described.is_file():
        before = json.loads(described.read_text())["checksum"]
        if before != dataset.fingerprint:
            raise ValueError(
                f"{folder} holds a run on the dataset {before[:12]}, and {dataset.folder} is {dataset.fingerprint[:12]}. "
                "Give the dataset of before, or name another --run.folder."
            )
    if saved.is_file():
        changed = differences(flat(load_config(saved)), flat(config))
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}). "
                "Give these settings again to continue it, or name another --run.folder."
            )
    elif folder.is_dir() and any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run (no config.yaml). Name another --run.folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stop").unlink(missing_ok=True)
    write_atomically(saved, to_yaml(config).encode())  # first: it marks the folder as a run's, if killed here
    write_atomically(described, dataset.description.to_bytes())


def find_start(folder: Path, dataset: Dataset) -> Checkpoint | None:
    """Where to continue, None for a fresh start.

    Raises:
        ValueError: the run was trained on another dataset.
    """
    found = newest(folder)
    if found is not None and found.origin.dataset != dataset.fingerprint:
        raise ValueError(
            f"{found.folder} was trained on the dataset {found.origin.dataset[:12]}, and {dataset.folder} is "
            f"{dataset.fingerprint[:12]}. Give the dataset of before, or name another --run.folder."
        )
    return found


def finished_metrics(folder: Path) -> dict | None:
    """The results of a finished run, None of any other."""
    if _read_state(folder).get("status") != "finished" or not (folder / "metrics.json").is_file():
        return None
    return json.loads((folder / "metrics.json").read_text())


def write_state(folder: Path, status: str, progress: Progress) -> None:
    """Say how the run fares: status, epochs and steps done, samples of the current epoch."""
    state = {"status": status, "epoch": progress.epoch, "step": progress.step, "samples_seen": progress.samples_seen}
    write_atomically(folder / "state.json", (json.dumps(state) + "\n").encode())


@contextmanager
def failure_noted(folder: Path, rank: int) -> Iterator[None]:
    """Leave word of an error: errors/rank-N.txt has the traceback, state.json says `failed` and why.

    The first rank to fail is the cause: what others say after it follows from that.
    """
    try:
        yield
    except Exception as error:
        with suppress(OSError, ValueError):  # a full disk must not hide the error itself
            (folder / "errors").mkdir(exist_ok=True)
            (folder / "errors" / f"rank-{rank}.txt").write_text(traceback.format_exc())
            state = _read_state(folder)
            if state.get("status") != "failed":
                failed = state | {"status": "failed", "rank": rank, "error": f"{type(error).__name__}: {error}"}
                write_atomically(folder / "state.json", (json.dumps(failed) + "\n").encode())
        raise


def _read_state(folder: Path) -> dict:
    path = folder / "state.json"
    return json.loads(path.read_text()) if path.is_file() else {}
