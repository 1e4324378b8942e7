"""A finished training, opened to be used: its settings, its best weights, and how its images are prepared.

In: run folders. Out: `TrainedRun`s and their models. Invariants: images are normalised as the weights were trained; runs that work
together know the same classes and prepare images alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from harness.config import Config, load_config
from harness.data.augment import parse_views
from harness.distributed.world import World
from harness.model.build import build_model
from harness.run import checkpoint
from harness.run.provenance import Checkpoint
from harness.run.recovery import find_best, refuse_other_copies
from shards.description import Description, read_description


@dataclass(frozen=True)
class Choices:
    """What a command line asks for in place of a run's own settings; None where it says nothing. Fields as in `Config`."""

    split: str | None = None
    views: str | None = None
    image_size: int | None = None
    prior_correction: bool | None = None
    precision: str | None = None
    data: Path | str | None = None
    cache_dir: str | None = None
    cache_gb: float | None = None


@dataclass(frozen=True)
class TrainedRun:
    """A run with finished weights.

    config: its settings, with what was chosen in their place, and the mean and deviation of its weights. weights: its best ones.
    trained_on: what the dataset.json of its training says.
    """

    folder: Path
    config: Config
    weights: Checkpoint
    trained_on: Description

    @property
    def classes(self) -> tuple[str, ...]:
        """The model's class names, in the order of its outputs."""
        return self.weights.provenance.classes


def open_trained(folder: Path, choices: Choices) -> TrainedRun:
    """Open a run's folder.

    Raises:
        FileNotFoundError: it is no run, or has no weights yet.
        ValueError: its settings or weights are damaged, or views that there are not.
    """
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.yaml). Give the --run.folder of a training.")
    config, weights = load_config(saved), find_best(folder)
    given = {name: getattr(choices, name) for name in ("split", "views", "image_size", "prior_correction")}
    cache = {name: value for name in ("cache_dir", "cache_gb") if (value := getattr(choices, name)) is not None}
    config = replace(
        config,
        eval=replace(config.eval, **{name: value for name, value in given.items() if value is not None}),
        run=replace(config.run, precision=choices.precision or config.run.precision),
        data=replace(config.data, path=str(choices.data or config.data.path), **cache),
        augment=replace(config.augment, mean=weights.provenance.mean, std=weights.provenance.std),
    )
    parse_views(config.eval.views)
    return TrainedRun(folder, config, weights, read_description(folder / "dataset.json"))


def open_together(folders: Sequence[Path], choices: Choices) -> list[TrainedRun]:
    """Open runs whose probabilities are averaged; one alone is no ensemble.

    Raises:
        FileNotFoundError, ValueError: as `open_trained`; also runs with other classes, another preparation of images, or other
            views than the first.
    """
    runs = [open_trained(folder, choices) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ValueError("A run is named twice. Name each run of an ensemble once.")
    first = runs[0]
    for run in runs[1:]:
        if odd := sorted(set(run.classes) ^ set(first.classes)):
            raise ValueError(
                f"{run.folder} and {first.folder} know other classes ({', '.join(odd[:5])} in one of them alone). An ensemble averages "
                "over the same classes."
            )
        if (stored := _stored(run)) != _stored(first):
            raise ValueError(
                f"{run.folder} was trained on images stored as {stored}, and {first.folder} as {_stored(first)}. An ensemble prepares "
                "an image once: train them on the same packed data."
            )
        if run.config.eval.views != first.config.eval.views:
            raise ValueError(
                f"{run.folder} is evaluated with the views {run.config.eval.views}, and {first.folder} with {first.config.eval.views}. "
                "Give --views for all of them."
            )
    return runs


def load_model(run: TrainedRun, world: World) -> nn.Module:
    """Collective: the model of a run with its best weights, on the world's device.

    Raises:
        ValueError: weights that do not fit, or that are another copy on another rank.
    """
    refuse_other_copies(run.weights.folder, world)
    model = build_model(run.config.model.name, len(run.classes))
    checkpoint.load_model(run.weights, model)
    # torch's stubs know no memory_format beside a device, which its documentation has
    return model.to(world.device, memory_format=world.memory_format)  # pyright: ignore[reportCallIssue]


def _stored(run: TrainedRun) -> str:
    about = run.trained_on
    return f"{about.size[0]}x{about.size[1]} by {about.fit}, quality {about.quality}"
