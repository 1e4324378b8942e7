"""Experiment trackers by Accelerate's names: wandb, mlflow, comet_ml, ...; TensorBoard is the run log's own.

In: names and settings. Out: trackers that `World.track` sends numbers to.
"""

from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import LoggerType


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
    """Start trackers on rank 0; `tensorboard` is left out.

    Args:
        folder: of the run; its name is the run's. settings: shown with the run.
    """
    if names := tuple(dict.fromkeys(name for name in names if name != "tensorboard")):
        own = {"wandb": {"name": folder.name, "dir": str(folder)}, "mlflow": {"run_name": folder.name}}
        accelerator.project_configuration.logging_dir = str(folder)
        accelerator.log_with = filter_trackers(list(names), str(folder))
        accelerator.init_trackers("dermharness", config=settings, init_kwargs=own)
