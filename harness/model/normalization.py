"""By which mean and deviation of the colours a model's images are normalised.

In: settings. Out: the same with the model's own mean and deviation. Invariants: what the settings name is kept; ImageNet's are left
unsaid, as `auto`; a run that continues keeps its numbers, whatever became of its file of weights.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torchvision

from harness.config import Augment, Config, load_config
from harness.config.sections import MEAN, STD
from harness.model.build import TIMM
from harness.model.weights import Origin, read_origin


def with_normalization(config: Config) -> Config:
    """The settings, with the mean and deviation that the model's pretrained weights expect, where they are `auto`.

    A file of weights may say its own (`weights.read_origin`); else timm and torchvision say what the model's weights expect. A model
    or a file that is not there is left to later checks.

    Raises:
        ValueError: the file of weights is damaged.
    """
    if before := _of_before(config):
        mean, std = before.mean, before.std
    else:
        own_mean, own_std = normalization_of(config.model.name, config.model.weights)
        file = Path(config.model.weights)
        origin = read_origin(file) if file.is_file() else Origin()
        mean, std = origin.mean or own_mean, origin.std or own_std
    augment = config.augment
    if augment.mean == "auto" and mean != MEAN:
        augment = replace(augment, mean=mean)
    if augment.std == "auto" and std != STD:
        augment = replace(augment, std=std)
    return replace(config, augment=augment)


def _of_before(config: Config) -> Augment | None:
    """Of a run that continues with the same model and weights, whose file it needs no more."""
    folder = Path(config.run.folder)
    if any((folder / "checkpoints").glob("step-*")):
        with suppress(ValueError, OSError):  # damaged or gone: left to later checks
            before = load_config(folder / "config.yaml")
            if (before.model.name, before.model.weights) == (config.model.name, config.model.weights):
                return before.augment
    return None


def normalization_of(name: str, weights: str = "") -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the pretrained weights of a model expect.

    Args:
        name: of the model. weights: torchvision's, by their name; of any other, those of the model's default weights.
    """
    if not name.startswith(TIMM):
        return _of_torchvision(name, weights)
    try:
        import timm  # pyright: ignore[reportMissingImports] - an extra

        found = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    except (ImportError, RuntimeError, KeyError, ValueError):
        return MEAN, STD
    return (tuple(found.mean), tuple(found.std)) if found else (MEAN, STD)


def _of_torchvision(name: str, weights: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        choices = torchvision.models.get_model_weights(name)
        chosen = next((entry for entry in choices if entry.name.lower() == weights), choices.DEFAULT)
        transforms = chosen.transforms()
        return tuple(transforms.mean), tuple(transforms.std)
    except (ValueError, AttributeError):  # no such model, or none with weights
        return MEAN, STD
