"""Results that are compared: the folds of a cross-validation are taken together, as one result of all their images.

In: results and the rows of their `predictions.csv`. Out: `Scored`. Invariants: an image, and a fold, stands in a `Scored` once; results of
other splits, seeds of the split, recipes, models, views or sizes are never taken together, nor of data with another citation or group.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from harness.evaluation.calibration import Prior, change_prior
from harness.evaluation.metrics import compute_metrics
from harness.evaluation.results import Results

PROTOCOL = "protocol's "
SAME = ("split", "model", "views", "image_size", "group_name", "citation", "license")  # in all folds, of `Results`


@dataclass(frozen=True, eq=False)
class Scored:
    """N images and their probabilities: of one run, or of the runs of several folds.

    images: N rows by id, with `label` and `group` as text and the number of the `fold`, -1 for none. probabilities: (N, C).
    cut: what is equal in all folds of one cross-validation: data, split and its seed, recipe, views; None without. folds_of: name of
    each run that scored the images -> its fold.
    """

    images: pd.DataFrame
    probabilities: np.ndarray
    cut: dict[str, Any] | None
    folds_of: dict[str, int]

    @property
    def n_runs(self) -> int:
        """Runs that scored the images."""
        return len(self.folds_of)

    @property
    def numbers(self) -> str:
        """The folds, as text; empty without cross-validation."""
        return ", ".join(str(number) for number in sorted(self.folds_of.values()) if number >= 0)

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


def read_scored(
    name: str,
    results: Results,
    rows: pd.DataFrame,
    classes: tuple[str, ...],
    correction: Prior | None = None,
    recipe: str = "",
) -> Scored:
    """One result, its probabilities brought to another prior if asked for.

    Args:
        name: of the run. rows: as `read_predictions` returns them. classes: the result's, in the order wanted.
        recipe: what tells the settings of trainings apart, as far as it is known.

    Raises:
        ValueError: the rows are of other classes than the result.
    """
    rows = rows.set_index("image_id")
    if missing := [one for one in results.classes if f"p_{one}" not in rows]:
        raise ValueError(
            f"The predictions of {name} have no class {missing[0]}, and its metrics.json has. Run launch/evaluate.py on the run."
        )
    own = rows[[f"p_{name}" for name in results.classes]].to_numpy(np.float64)  # (N, C)
    corrected = change_prior(own, correction) if correction else own
    probabilities = corrected[:, [results.classes.index(name) for name in classes]]
    fold = results.protocol.get("fold")
    cut = None
    if fold is not None and results.dataset == results.trained_on:  # not another dataset, whose images all models score
        cut = {f"{PROTOCOL}{key}": value for key, value in results.protocol.items() if key != "fold"}
        cut |= {key: getattr(results, key) for key in SAME} | {"recipe": recipe, "classes": sorted(classes)}
    number = -1 if fold is None else fold
    return Scored(rows[["label", "group"]].assign(fold=number), probabilities, cut, {name: number})


def join_folds(parts: list[Scored]) -> list[Scored]:
    """Those of one cross-validation as one, each other one alone; of several seeds in each fold, one for each seed.

    Results are joined in the order given where they are of one cross-validation, of other folds, and have no image in common.
    Where all folds score one held-out test set, each stays alone.
    """
    joined: list[Scored] = []
    for part in parts:
        for number, whole in enumerate(joined):
            is_other = set(part.folds_of.values()).isdisjoint(whole.folds_of.values())
            is_other &= part.images.index.intersection(whole.images.index).empty
            if part.cut and part.cut == whole.cut and is_other:
                images = pd.concat([whole.images, part.images])
                probabilities = np.concatenate([whole.probabilities, part.probabilities])
                folds_of = whole.folds_of | part.folds_of
                joined[number] = replace(whole, images=images, probabilities=probabilities, folds_of=folds_of)
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
