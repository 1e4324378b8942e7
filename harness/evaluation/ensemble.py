"""Several models as one: their probabilities, averaged.

In: models with their settings, images. Out: `Predictions` of each, and of all. Invariants: classes are matched by name; the one
that the ensemble is compared with is chosen on validation, never on the split that is evaluated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from harness.config import Config
from harness.distributed.world import World
from harness.evaluation.metrics import balanced_accuracy, paired_differences
from harness.evaluation.predict import never, predict
from harness.evaluation.results import Predictions
from shards.reader import ImageReader


@dataclass(frozen=True)
class Member:
    """A model, with the settings that its images are prepared by; name: its run's folder. classes: of its outputs, in order."""

    name: str
    model: nn.Module
    config: Config
    classes: tuple[str, ...]


def predict_each(
    members: Sequence[Member],
    reader: ImageReader,
    world: World,
    stop: Callable[[], bool] = never,
    bad_keys: list[int] | None = None,
) -> list[Predictions] | None:
    """Collective: what each model predicts of all images, with the classes in the first one's order; None if asked to stop.

    Args, Returns, Raises:
        as `predict`: rank 0 has the rows.
    """
    found = []
    for member in members:
        predictions = predict(member.model, reader, member.classes, member.config, world, stop, bad_keys)
        if predictions is None:
            return None
        found.append(_in_order(predictions, member.classes, members[0].classes))
    return found


def average(parts: Sequence[Predictions]) -> Predictions:
    """The mean of probabilities over models, of each view and of the views' mean; the spread over views is the models' mean spread."""
    if len(parts) == 1:
        return parts[0]
    views = [part.view_probs for part in parts if part.view_probs is not None]
    return replace(
        parts[0],
        center_probs=_mean([part.center_probs for part in parts]),
        tta_probs=_mean([part.tta_probs for part in parts]),
        tta_std=_mean([part.tta_std for part in parts]),
        view_probs=_mean(views) if views else None,
    )


def gain_of_ensemble(
    members: Sequence[Member],
    parts: Sequence[Predictions],
    on_validation: Sequence[Predictions] | None,
    classes: tuple[str, ...],
    groups: np.ndarray,
) -> dict[str, Any]:
    """How much better the ensemble is than its best single member, with paired intervals: `Results.ensemble`.

    Args:
        parts, on_validation: predictions of each member. The best is the one of the highest balanced accuracy on validation; where
            there is none, on the images that are evaluated, which flatters it, and is said.
        groups: (N,) names of what is independent.
    """
    chosen_on = on_validation or parts
    scores = [balanced_accuracy(one.tta_probs, one.labels, len(classes)) for one in chosen_on]
    best = int(np.argmax(scores))
    gain = paired_differences([parts[best].tta_probs], [average(parts).tta_probs], parts[0].labels, classes, groups)
    return {
        "members": [member.name for member in members],
        "best": members[best].name,
        "chosen_on": "validation" if on_validation else "the images themselves",
        "gain": gain,
    }


def _in_order(predictions: Predictions, own: tuple[str, ...], wanted: tuple[str, ...]) -> Predictions:
    """The same, with the classes in another order."""
    if own == wanted:
        return predictions
    places = np.array([own.index(name) for name in wanted])
    number = np.array([*(wanted.index(name) for name in own), -1])  # a label of -1 stays one
    views = predictions.view_probs
    return replace(
        predictions,
        labels=number[predictions.labels],
        center_probs=predictions.center_probs[:, places],
        tta_probs=predictions.tta_probs[:, places],
        view_probs=None if views is None else views[:, :, places],
    )


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.asarray(np.stack(arrays).mean(0, dtype=np.float64), np.float32)
