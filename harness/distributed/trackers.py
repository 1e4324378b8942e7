"""Experiment trackers by Accelerate's names: wandb, mlflow, comet_ml, ...; TensorBoard is the run log's own.

In: names and settings. Out: trackers that `World.track` sends numbers to, and RUN/trackers.json. Invariants: a run that goes on is
the same run in wandb, MLflow and Comet.
"""

import json
import logging
import os
import uuid
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType

from shards.files import write_atomically

LOGGER = logging.getLogger("dermharness")
PROJECT = "dermharness"
IDS = "trackers.json"  # in the run folder: the run's id in each tracker
ID_VARIABLES = {"wandb": "WANDB_RUN_ID", "comet_ml": "COMET_EXPERIMENT_KEY"}  # these take an id; MLflow gives one


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that do not exist or are not installed.

    Raises:
        ValueError: an unknown tracker, or one whose package is not installed.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ValueError(f"The 'run.trackers' setting knows {known}. Got {name!r} instead.")
        if name in LoggerType.list() and name not in available:
            raise ValueError(f"'run.trackers' names {name}, which is not installed: pip install {name}.")


def start_trackers(accelerator: Accelerator, names: tuple[str, ...], folder: Path, settings: dict) -> None:
    """Start trackers (for rank 0 alone to call), in wandb, MLflow and Comet as the run that this folder began there; `tensorboard` is left out.

    Args:
        folder: of the run; its name is the run's. settings: shown with the run.

    Raises:
        ConnectionError: a tracker does not start (no login, no network, or its earlier run is gone).
    """
    names = tuple(dict.fromkeys(name for name in names if name != "tensorboard"))
    if not names:
        return
    known = _read_ids(folder / IDS)
    ids = known | {name: _new_id(name) for name in names if name in ID_VARIABLES and name not in known}
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.log_with = filter_trackers(list(names), str(folder))
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=tracker_options(folder, ids))
        for tracker in accelerator.trackers:
            if tracker.name == "mlflow":
                ids["mlflow"] = tracker.tracker.info.run_id
            if tracker.name != "mlflow" or "mlflow" not in known:  # MLflow refuses a setting that changed
                tracker.store_init_configuration(settings)
    except Exception as error:  # each tracker has its own
        raise ConnectionError(
            f"'run.trackers' ({', '.join(names)}) cannot start: {error}. Log in there or set it to [tensorboard]; where the "
            f"earlier run was deleted, remove {folder / IDS} and a new one begins."
        ) from error
    if ids != known:
        write_atomically(folder / IDS, (json.dumps(ids) + "\n").encode())


def tracker_options(folder: Path, ids: dict[str, str]) -> dict[str, dict]:
    """What each tracker is started with, by name; ids: of the runs there, where they are known."""
    options: dict[str, dict] = {
        "wandb": {"name": folder.name, "dir": str(folder), "resume": "allow"},
        "mlflow": {"run_name": folder.name},
        "comet_ml": {"mode": "get_or_create"},
    }
    for name, key in (("wandb", "id"), ("mlflow", "run_id"), ("comet_ml", "experiment_key")):
        options[name] |= {key: ids[name]} if name in ids else {}
    return options


def _new_id(name: str) -> str:
    """For a run that begins: the one of the tracker's variable, else 32 random hexadecimal digits."""
    return os.environ.get(ID_VARIABLES[name]) or uuid.uuid4().hex


def _read_ids(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return {str(name): str(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError):
        LOGGER.warning(f"{path} is damaged: the trackers begin new runs")
        return {}
