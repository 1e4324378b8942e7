"""By which mean and deviation of the colours a model's images are normalised.

In: settings. Out: the same with the model's own mean and deviation. Invariants: what the settings name is kept; ImageNet's are left
unsaid, as `auto`.
"""

from dataclasses import replace
from pathlib import Path

from harness.config import Config
from harness.config.sections import MEAN, STD
from harness.model.build import TIMM
from harness.model.weights import Origin, read_origin


def with_normalization(config: Config) -> Config:
    """The settings, with the mean and deviation that the model's pretrained weights expect, where they are `auto`.

    A file of weights may say its own (`weights.read_origin`); else timm's models say theirs, and torchvision's expect ImageNet's. A
    model or a file that is not there is left to later checks.

    Raises:
        ValueError: the file of weights is damaged.
    """
    own_mean, own_std = normalization_of(config.model.name)
    file = Path(config.model.weights)
    origin = read_origin(file) if file.is_file() else Origin()
    mean, std = origin.mean or own_mean, origin.std or own_std
    augment = config.augment
    if augment.mean == "auto" and mean != MEAN:
        augment = replace(augment, mean=mean)
    if augment.std == "auto" and std != STD:
        augment = replace(augment, std=std)
    return replace(config, augment=augment)


def normalization_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the pretrained weights of a model expect, by its name alone."""
    if not name.startswith(TIMM):
        return MEAN, STD
    try:
        import timm  # pyright: ignore[reportMissingImports] - an extra

        found = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    except (ImportError, RuntimeError, KeyError, ValueError):
        return MEAN, STD
    return (tuple(found.mean), tuple(found.std)) if found else (MEAN, STD)
