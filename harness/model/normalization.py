"""By which mean and deviation of the colours a model's images are normalised.

In: settings. Out: the same with the model's own mean and deviation. Invariants: what the settings name is kept; ImageNet's are left
unsaid, as `auto`.
"""

from dataclasses import replace

from harness.config import Config
from harness.config.sections import MEAN, STD
from harness.model.build import TIMM


def with_normalization(config: Config) -> Config:
    """The settings, with the mean and deviation that the model's pretrained weights expect, where they are `auto`.

    torchvision's models expect ImageNet's; timm's say their own. A model that is not there is left to later checks.
    """
    mean, std = _of_model(config.model.name)
    augment = config.augment
    if augment.mean == "auto" and mean != MEAN:
        augment = replace(augment, mean=mean)
    if augment.std == "auto" and std != STD:
        augment = replace(augment, std=std)
    return replace(config, augment=augment)


def _of_model(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not name.startswith(TIMM):
        return MEAN, STD
    try:
        import timm  # pyright: ignore[reportMissingImports] - an extra

        found = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    except (ImportError, RuntimeError, KeyError, ValueError):
        return MEAN, STD
    return (tuple(found.mean), tuple(found.std)) if found else (MEAN, STD)
