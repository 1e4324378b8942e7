"""Results that are compared: the folds of a cross-validation are taken together, as one result of all their images.

In: results and the rows of their `predictions.csv`. Out: `Scored`. Invariants: an image stands in a `Scored` once; results of
other data, splits or seeds of the split are never taken together.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.evaluation.calibration import Prior, change_prior
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Results


@dataclass(frozen=True)
class Scored:
    """N images and their probabilities: of one run, or of the runs of several folds.

    images: N rows by id, with `label` and `group` as text and the number of the `fold`, -1 for none. probabilities: (N, C).
    cut: how the folds were cut, equal for those of one cross-validation; None without. n_runs: runs that scored the images.
    """

    images: pd.DataFrame
    probabilities: np.ndarray
    cut: dict[str, Any] | None
    n_runs: int = 1

    @property
    def folds(self) -> np.ndarray | None:
        """(N,) as `compute_metrics` takes them; None where one model scored all."""
        return self.images["fold"].to_numpy() if self.n_runs > 1 else None

    def has_folds_of(self, other: "Scored") -> bool:
        """Whether the models of the other, which has the same images in the same order, scored the same ones of them."""
        if self.n_runs == 1 or other.n_runs == 1:
            return self.n_runs == other.n_runs
        return bool((self.images["fold"].to_numpy() == other.images["fold"].to_numpy()).all())

    def labels(self, classes: tuple[str, ...]) -> np.ndarray:
        """(N,) numbers of the labels among the C classes."""
        return self.images["label"].map({name: number for number, name in enumerate(classes)}).to_numpy(np.int64)

    def metrics(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """What `compute_metrics` finds, with intervals; classes: C names, in the order of the probabilities."""
        groups = self.images["group"].to_numpy()
        return compute_metrics(self.probabilities, self.labels(classes), classes, groups, self.folds)


def read_scored(results: Results, rows: pd.DataFrame, classes: tuple[str, ...], correction: Prior | None) -> Scored:
    """One result, its probabilities brought to another prior if asked for.

    Args:
        rows: as `read_predictions` returns them. classes: the result's, in the order wanted.
    """
    rows = rows.set_index("image_id")
    own = rows[[f"p_{name}" for name in results.classes]].to_numpy(np.float64)  # (N, C)
    corrected = change_prior(own, correction) if correction else own
    probabilities = corrected[:, [results.classes.index(name) for name in classes]]
    fold = results.protocol.get("fold")
    cut = None
    if fold is not None and results.dataset == results.trained_on:  # not another dataset, whose images all models score
        protocol = {name: value for name, value in results.protocol.items() if name != "fold"}
        cut = protocol | {"split": results.split, "classes": sorted(classes)}
    return Scored(rows[["label", "group"]].assign(fold=-1 if fold is None else fold), probabilities, cut)


def join_folds(parts: list[Scored]) -> list[Scored]:
    """Those of one cross-validation as one, each other one alone; of several seeds in each fold, one for each seed.

    Results are joined in the order given where they are of one cross-validation and have no image in common. Where all folds
    score one held-out test set, each stays alone.
    """
    joined: list[Scored] = []
    for part in parts:
        for number, whole in enumerate(joined):
            if part.cut and part.cut == whole.cut and part.images.index.intersection(whole.images.index).empty:
                images = pd.concat([whole.images, part.images])
                probabilities = np.concatenate([whole.probabilities, part.probabilities])
                joined[number] = replace(whole, images=images, probabilities=probabilities, n_runs=whole.n_runs + 1)
                break
        else:
            joined.append(part)
    return joined


def in_one_order(parts: list[Scored]) -> list[Scored] | None:
    """All in the order of the first one's images; None if they are of other images, or name other labels."""
    images, ordered = parts[0].images, []
    for part in parts:
        places = part.images.index.get_indexer(images.index)
        rows = part.images.iloc[places]
        if len(part.images) != len(images) or (places < 0).any() or not rows["label"].equals(images["label"]):
            return None
        ordered.append(replace(part, images=rows, probabilities=part.probabilities[places]))
    return ordered
