"""Leaks between splits: errors or warnings where two sets share groups (lesions, patients).

In: a split of images, or a packed dataset. Out: an error, or a warning. Invariants: a group is in
one split only; a leak is refused unless it was asked for, and then every result says so.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from shards.grouping import Split
from shards.groups import GroupFile, Groups, count_shared, load_groups
from shards.index import Dataset


def missing_classes(labels: pd.Series, split: Split) -> list[str]:
    """What a reader of a score must be told of classes that are trained, and that a split to evaluate has no image of."""
    trained = set(labels.iloc[split.rows["train"]]) if "train" in split.rows else set()
    said = []
    for name, rows in split.rows.items():
        if missing := sorted(trained - set(labels.iloc[rows])):
            said.append(f"the {name} split has no image of {', '.join(missing)}: its scores say nothing of that")
    return said


def check_split(images: pd.DataFrame, split: Split) -> None:
    """Refuse a split that loses an image, evaluates classes without training images, or leaks without being marked.

    Raises:
        ValueError: naming a group and where it was found, or an image.
    """
    placed = np.concatenate([*split.rows.values(), np.fromiter(split.left_out, dtype=np.int64)])
    if not np.array_equal(np.unique(placed), np.arange(len(images))):
        raise ValueError("A split must place each image or say why it is left out; this one omits some.")
    trained = set(images["label"].iloc[split.rows["train"]]) if "train" in split.rows else set(images["label"])
    for name, rows in split.rows.items():
        if unknown := sorted(set(images["label"].iloc[rows]) - trained):
            raise ValueError(
                f"The {name} split has classes that train lacks: {', '.join(unknown)}. Add training images of them."
            )
    if split.leaks:
        return
    split_of: dict[str, str] = {}
    for name, rows in split.rows.items():
        for group in images["group"].iloc[rows].unique():
            if split_of.setdefault(group, name) != name:
                raise ValueError(
                    f"Group {group} is in {split_of[group]} and in {name}: scores would leak. "
                    "Give each group one split, or let `--protocol lesion` split."
                )
    if len(np.unique(placed)) != len(placed):
        raise ValueError("A split must place each image once; this one places some twice.")


def refuse_leak(dataset: Dataset) -> None:
    """Refuse to train on a dataset with training groups in its evaluation splits, unless it is marked as a study.

    Raises:
        ValueError: naming the splits and the number of shared groups.
    """
    train = load_groups(dataset, "train")
    for name in dataset.description.counts:
        shared = count_shared(train, load_groups(dataset, name)) if name != "train" else 0
        if shared and not dataset.description.protocol.get("leaks"):
            raise ValueError(
                f"{dataset.folder}: {shared} training {dataset.groups_name} are also in the {name} split, so its scores would leak. "
                "Pack the source again with `--protocol lesion`."
            )


def leak_warnings(dataset: Dataset, split: str, train_groups: Sequence[Groups]) -> list[str]:
    """One sentence if groups of a split are among those that a model was trained on, or if that is not known; else an empty list.

    Args:
        train_groups: training groups of the model, or of each model of an ensemble.
    """
    groups = load_groups(dataset, split)
    try:
        shared = count_shared(groups, *(_at_hand(one, dataset) for one in train_groups))
    except (OSError, ValueError) as error:
        return [f"whether {dataset.groups_name} of the {split} split were trained on is not known: {error}"]
    if not shared:
        return []
    counted = f"{shared} of {len(groups)} {dataset.groups_name} of the {split} split"
    return [f"{counted} were trained on: the scores are too high"]


def _at_hand(train_groups: Groups, dataset: Dataset) -> Groups:
    """The training groups; from the dataset that is evaluated, if it is the one of the training."""
    recorded = dataset.description.files.get("train.groups.npy")
    is_same = isinstance(train_groups, GroupFile) and recorded == train_groups.sha256
    return load_groups(dataset, "train") if is_same else train_groups


def refuse_trained_groups(dataset: Dataset, split: str, train_groups: Sequence[Groups]) -> None:
    """Refuse to evaluate on groups that a model was trained on, or may have been.

    Raises:
        ValueError: saying how many there are, or what is needed to know.
    """
    if warnings := leak_warnings(dataset, split, train_groups):
        raise ValueError(
            f"{dataset.folder}: {warnings[0]}. Give other data; --allow-leak evaluates anyway and marks the results."
        )
