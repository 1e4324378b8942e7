"""One table of images, whatever they came from.

In: rows as a reader of `shards.sources` found them. Out: a `Catalogue`, every row of it checked. Invariants: image ids
are unique, every image file exists and is not empty, every label is a known class, every group (lesion) has one label.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

REQUIRED = ("image_id", "path", "label", "group")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
NO_GROUPS = "the source names no groups (lesions, patients): images of one of them may be in several splits"


@dataclass(frozen=True)
class Catalogue:
    """A checked table of images.

    images: one row an image, all columns text: `image_id, path, label, group`, then what else the source knows
        (blank where unknown). `label` is a class name, `group` what must never be cut by a split (the lesion).
    classes: class names; a class's number is its place here.
    name: where the images came from, for people.
    warnings: what a reader of a score must be told of the source.
    group_name: what a group is, in the singular: lesion, patient, group.
    citation, license: of the images, as the dataset and its reports state them; empty where unknown.
    """

    images: pd.DataFrame
    classes: tuple[str, ...]
    name: str
    warnings: tuple[str, ...] = ()
    group_name: str = "group"
    citation: str = ""
    license: str = ""

    @property
    def extra_columns(self) -> list[str]:
        """Columns beyond the four that every catalogue has."""
        return [column for column in self.images.columns if column not in REQUIRED]


def validate(catalogue: Catalogue) -> Catalogue:
    """Return the catalogue unchanged, or say what is wrong with it.

    Raises:
        ValueError: blank or repeated ids, blank groups, unknown labels, a group with two labels, an empty file.
        FileNotFoundError: a picture that is not there.
    """
    images, name = catalogue.images, catalogue.name
    if images.empty:
        raise ValueError(f"The source {name} has no images. Give a folder whose metadata has at least one row.")
    for column in ("image_id", "label", "group"):
        blank = images.index[images[column].str.strip() == ""]
        if len(blank):
            raise ValueError(
                f"The source {name} has a blank {column} in row(s) {preview([str(row + 2) for row in blank])} of its table "
                "(row 1 is the header). Fill it in or remove the row."
            )
    repeated = images["image_id"][images["image_id"].duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{preview(repeated)} of {name}: image id repeated. Keep one row for each image.")
    unknown = images[~images["label"].isin(catalogue.classes)]
    if len(unknown):
        raise ValueError(
            f"{preview(unknown['image_id'])} of {name}: unknown label {preview(unknown['label'].unique())}. "
            f"Known classes: {', '.join(catalogue.classes)}. Correct the label or remove the row."
        )
    labels = images.groupby("group")["label"].unique()
    conflicts = labels[labels.map(len) > 1]
    if len(conflicts):
        raise ValueError(
            f"Group {conflicts.index[0]} of {name} has the labels {', '.join(sorted(conflicts.iloc[0]))}; {len(conflicts)} such group(s). "
            "All images of a group must have one label: correct the metadata, or give a --group-column of lesions "
            "instead of patients."
        )
    for path in images["path"]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"The picture {path} of {name} is not there. Restore it or remove its row.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"The picture {path} is empty (0 bytes). Download it again or remove its row.")
    return catalogue


def preview(names: Iterable, most: int = 3) -> str:
    """The first names of a list, and how many more there are, for an error's sentence."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
