"""The folder of a run: whose it is, and how the run fares.

In: settings, a dataset, a `Progress`. Out: `config.yaml`, `dataset.json`, `state.json`, `errors/`. What stays true: one
folder holds one run; `state.json` says `running | stopped | finished | failed` and how far, for people and job scripts.
"""

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.config import Config, differences, flat, load_config, to_yaml
from harness.distributed.world import World
from harness.run.checkpoint import Checkpoint, latest_valid, repair_best
from harness.run.lock import RunLock
from harness.run.progress import Progress
from shards.files import write_atomically
from shards.index import Dataset

CHANGES = "changes.json"


def open_run(folder: Path, config: Config, dataset: Dataset, lock: RunLock) -> None:
    """Make the run's folder, or check that it belongs to these settings; take its lock.

    Raises:
        ValueError: it holds a run with other settings (the keys are named) or on another dataset.
        FileExistsError: it holds something else.
        BlockingIOError: another job is using it.
        OSError: it cannot be written.
    """
    saved, described = folder / "config.yaml", folder / "dataset.json"
    changed = []
    if described.is_file():
        before = _fingerprint(described)
        if before and before != dataset.fingerprint:
            raise ValueError(
                f"{folder} holds a run on the dataset {before[:12]}, and {dataset.folder} is {dataset.fingerprint[:12]}. "
                "Give the dataset of before, or name another --run.folder."
            )
    if saved.is_file():
        changed = _changed(saved, config)
        if changed and finished_metrics(folder):
            raise ValueError(
                f"{folder} is finished, with other settings ({'; '.join(changed)}). Name another --run.folder; to train "
                "on from its weights, give it --model.weights with the best-N/model.safetensors of this one."
            )
        if changed and config.run.on_changed_settings != "accept":
            raise ValueError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}). Give these settings again to continue "
                "it, name another --run.folder, or continue it with the new settings by --run.on_changed_settings accept."
            )
    elif folder.is_dir() and any(not path.name.endswith((".tmp", "lock.json", "stop")) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no run (no config.yaml). Name another --run.folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if changed:
            noted = [*changes(folder), *changed]
            write_atomically(folder / CHANGES, (json.dumps(noted, indent=1) + "\n").encode())
            print(f"continuing with other settings, as asked: {'; '.join(changed)}")
        write_atomically(saved, to_yaml(config).encode())  # first: it marks the folder as a run's, if killed here
        write_atomically(described, dataset.description.to_bytes())
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"Cannot write the run folder {folder} ({error.strerror or error}). Mend the disk, or name another --run.folder."
        ) from error


def _fingerprint(described: Path) -> str:
    """The dataset that a run was made on; nothing if that is damaged (each checkpoint knows it, too)."""
    try:
        return json.loads(described.read_text())["checksum"]
    except (ValueError, KeyError, TypeError):
        print(f"{described} is damaged: written anew")
        return ""


def _changed(saved: Path, config: Config) -> list[str]:
    try:
        return differences(flat(load_config(saved)), flat(config))
    except ValueError as error:
        if config.run.on_changed_settings != "accept":
            raise
        return [f"all settings: those of before are damaged ({error})"]


def changes(folder: Path) -> list[str]:
    """Settings that were changed while the run went on, as `key: OLD is now NEW`."""
    path = folder / CHANGES
    return json.loads(path.read_text()) if path.is_file() else []


def find_start(folder: Path, dataset: Dataset) -> Checkpoint | None:
    """Where to continue, None for a fresh start.

    Raises:
        ValueError: the run was trained on another dataset, or nothing that was saved is whole.
    """
    found = latest_valid(folder)
    if found is None:
        return None
    if found.provenance.dataset != dataset.fingerprint:
        raise ValueError(
            f"{found.folder} was trained on the dataset {found.provenance.dataset[:12]}, and {dataset.folder} is "
            f"{dataset.fingerprint[:12]}. Give the dataset of before, or name another --run.folder."
        )
    repair_best(folder, found.progress)
    return found


def finished_metrics(folder: Path) -> dict | None:
    """The results of a finished run, None of any other."""
    if _read_state(folder).get("status") != "finished" or not (folder / "metrics.json").is_file():
        return None
    return json.loads((folder / "metrics.json").read_text())


def write_state(folder: Path, status: str, progress: Progress, reason: str = "") -> None:
    """Say how the run fares: status and why, epochs and steps done, samples of the current epoch."""
    state = {"status": status, "epoch": progress.epoch, "step": progress.step, "samples_seen": progress.samples_seen}
    state |= {"reason": reason} if reason else {}
    write_atomically(folder / "state.json", (json.dumps(state) + "\n").encode())


def note_start(folder: Path, facts: dict) -> None:
    """Append a line to starts.jsonl: that the run started, or went on, and where."""
    with open(folder / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


@contextmanager
def failure_noted(folder: Path, world: World) -> Iterator[None]:
    """Leave word of an error: errors/rank-N.txt has the traceback, state.json says `failed`, which rank, and why.

    The first rank to fail is the cause: what others say after it follows from that.

    Raises:
        ConnectionError: in place of a failed exchange between ranks, naming the rank that is the cause.
    """

    def note(cause: dict) -> None:
        with suppress(OSError, ValueError):  # a full disk must not hide the error itself
            state = _read_state(folder)
            if state.get("status") != "failed":
                failed = json.dumps(state | {"status": "failed"} | cause)
                write_atomically(folder / "state.json", f"{failed}\n".encode())

    heartbeat = world.heartbeat
    if heartbeat:
        heartbeat.note = note
    try:
        yield
    except Exception as error:
        blamed = heartbeat.failure_behind_collective() if heartbeat and isinstance(error, RuntimeError) else None
        with suppress(OSError):
            (folder / "errors").mkdir(exist_ok=True)
            (folder / "errors" / f"rank-{world.rank}.txt").write_text(traceback.format_exc())
        if blamed:
            note(blamed)
            raise ConnectionError(f"{blamed['error']}. This run failed; the same command continues it.") from error
        note({"rank": world.rank, "error": f"{type(error).__name__}: {error}"})
        if heartbeat:
            heartbeat.report(f"rank {world.rank} ({world.host_pid}) failed: {type(error).__name__}: {error}")
        raise


def _read_state(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "state.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # damaged: it only tells, so nothing is lost
        return {}
