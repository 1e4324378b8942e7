"""The folder of a run: whose it is, who may write there, where to continue.

In: settings, a dataset. Out: a `Run`, with `config.yaml` and `dataset.json` in its folder. Invariants: one folder holds one run,
and one job writes there.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.config import Config, differences, flat, load_config, to_yaml
from harness.distributed.world import World
from harness.run.console import LOGGER, console_log
from harness.run.lock import RunLock
from harness.run.log import Log
from harness.run.profile import StepProfiler
from harness.run.progress import Progress
from harness.run.provenance import Checkpoint, Provenance
from harness.run.recovery import latest_valid, repair_best
from harness.run.state import CHANGES, changes, failure_noted, is_finished, write_state, writing
from harness.run.stop import StopRequest
from harness.run.writer import CheckpointWriter
from shards.files import write_atomically
from shards.groups import load_groups
from shards.index import Dataset
from shards.plan import LARGE_BLOCK, largest_block
from shards.shape import misfit, parse_json

PROBE_FILE = "probe.csv"  # of a linear probe, which no training has


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder while this process trains into it: where it is written, and who asks it to stop."""

    folder: Path
    world: World
    lock: RunLock
    stop: StopRequest
    writer: CheckpointWriter
    log: Log
    profiler: StepProfiler
    provenance: Provenance
    accept_settings: Callable[[], None]
    """on rank 0: note the settings that were changed, once they are known to fit what was saved"""

    def is_finished(self) -> bool:
        """Collective: whether the run was finished before, and its results are there."""
        return self.world.run_on_main(is_finished, self.folder)

    def find_start(self, dataset: Dataset) -> Checkpoint | None:
        """Collective: where to continue, as `find_start` says it, after copies in a local folder were compared."""
        self.world.run_on_main(self.writer.sync_on_start)
        return self.world.run_on_main(find_start, self.folder, dataset)

    def write_state(self, status: str, progress: Progress, reason: str = "") -> None:
        """Collective: how the run fares, in state.json."""
        self.world.run_on_main(write_state, self.folder, status, progress, reason)

    def stopped(self, progress: Progress, then: str = "continues") -> str:
        """Collective: end a run that was asked to stop, after its checkpoint; `stopped`. then: what the same command does."""

        def note() -> str:
            reason = self.stop.reason or "another process was asked"
            write_state(self.folder, "stopped", progress, reason)
            self.stop.file.unlink(missing_ok=True)  # the next start is not asked to stop
            return reason

        reason = self.world.run_on_main(note)
        self.world.print(f"stopped as asked ({reason}) at step {progress.step}; the same command {then}")
        return "stopped"


@contextmanager
def open_run(config: Config, world: World, dataset: Dataset) -> Iterator[Run]:
    """Collective: make the run's folder, or check that it belongs to these settings; hold its lock inside.

    Raises:
        ValueError, OSError: as `claim_folder`; and what goes wrong inside, noted in the folder.
    """
    folder = Path(config.run.folder)
    with (
        RunLock(folder) as lock,
        StopRequest(folder, config.run.time_limit_minutes) as stop,
        CheckpointWriter(folder, config.run.checkpoint_dir) as writer,
        Log() as log,
        StepProfiler(config.run.profile, folder, world.device, world.is_main) as profiler,
    ):
        changed = world.run_on_main(claim_folder, folder, config, dataset, lock)
        world.run_on_main(stop.forget_old_file)
        stop.saving_s = writer.longest_s
        with console_log(folder, world.is_main), failure_noted(folder, world):
            yield Run(
                folder=folder,
                world=world,
                lock=lock,
                stop=stop,
                writer=writer,
                log=log,
                profiler=profiler,
                provenance=provenance(config, dataset),
                accept_settings=partial(accept_settings, folder, config, changed),
            )


def provenance(config: Config, dataset: Dataset) -> Provenance:
    """What the weights of a run are made of.

    Raises:
        ValueError, FileNotFoundError: the dataset's list of training groups is damaged or missing.
    """
    data = config.data
    order = f"batches of {data.global_batch_size}, {data.lanes} lanes, blocks of {data.shuffle_block_shards}, seed {config.run.seed}"
    order += ", classes equally often" if config.optim.balance == "sampler" else ""
    sizes = dataset.split("train").samples.tolist()
    if largest_block(sizes, data.lanes, data.shuffle_block_shards) > LARGE_BLOCK:
        order += ", large blocks by a Feistel network"  # up to version 0.1 by a table, too
    groups = load_groups(dataset, "train")
    return Provenance(
        config.model.name, dataset.classes, dataset.fingerprint, groups, order, *config.augment.normalization
    )


def check_folder(folder: Path, config: Config, dataset: Dataset) -> list[str]:
    """Settings that would change if this run went on in the folder, as `key: OLD is now NEW`; nothing is written.

    Raises:
        ValueError: it holds a run with other settings (the keys are named) or on another dataset.
        FileExistsError: it holds something else.
    """
    saved, described = folder / "config.yaml", folder / "dataset.json"
    if described.is_file():
        before = _fingerprint(described)
        if before and before != dataset.fingerprint:
            raise ValueError(
                f"{folder} holds a run on the dataset {before[:12]}, and {dataset.folder} is {dataset.fingerprint[:12]}. "
                "Give the dataset of before, or name another --run.folder."
            )
    if not saved.is_file():
        if folder.is_dir() and any(not path.name.endswith((".tmp", "lock.json", "stop")) for path in folder.iterdir()):
            raise FileExistsError(
                f"{folder} is not empty and holds no run (no config.yaml). Name another --run.folder."
            )
        return []
    changed = _changed(saved, config)
    if changed and is_finished(folder):
        raise ValueError(
            f"{folder} is finished, with other settings ({'; '.join(changed)}). Name another --run.folder; to train "
            "on from its weights, give it --model.weights with the best-N/model.safetensors of this one."
        )
    if changed and config.run.on_changed_settings != "accept":
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}). Give these settings again to continue "
            "it, name another --run.folder, or continue it with the new settings by --run.on_changed_settings accept."
        )
    return changed


def claim_folder(folder: Path, config: Config, dataset: Dataset, lock: RunLock) -> list[str]:
    """Make the run's folder, or check that it belongs to these settings; take its lock.

    Returns:
        the settings that would change, which `accept_settings` writes: until then, the folder holds those of before.

    Raises:
        ValueError, FileExistsError: as `check_folder`.
        BlockingIOError: another job is using it.
        OSError: it cannot be written.
    """
    changed = check_folder(folder, config, dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        if not changed:  # first: it marks the folder as a run's, if killed here
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
        if (folder / "dataset.json").is_file() and not _fingerprint(folder / "dataset.json"):
            LOGGER.warning(f"{folder / 'dataset.json'} is damaged: written anew")
        write_atomically(folder / "dataset.json", dataset.description.to_bytes())
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"Cannot write the run folder {folder} ({error.strerror or error}). Repair the disk, or name another "
            "--run.folder."
        ) from error
    return changed


def accept_settings(folder: Path, config: Config, changed: list[str]) -> None:
    """Write the settings that a run goes on with, and note what changed.

    Raises:
        OSError: they cannot be written. ValueError: the notes of before are damaged.
    """
    if changed:
        noted = [*changes(folder), *changed]
        with writing(folder / CHANGES):
            write_atomically(folder / CHANGES, (json.dumps(noted, indent=1) + "\n").encode())
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
        LOGGER.info(f"continuing with other settings, as asked: {'; '.join(changed)}")


def _fingerprint(described: Path) -> str:
    """The dataset that a run was made on; nothing if that is damaged (each checkpoint knows it, too)."""
    try:
        content = parse_json(described.read_bytes())
        return content["checksum"] if misfit(content, {"checksum": str}) is None else ""
    except ValueError:
        return ""


def _changed(saved: Path, config: Config) -> list[str]:
    try:
        return differences(flat(load_config(saved)), flat(config))
    except ValueError as error:
        if config.run.on_changed_settings != "accept":
            raise
        return [f"all settings: those of before are damaged ({error})"]


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
