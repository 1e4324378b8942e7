"""One table of images, whatever they came from.

In: rows as a reader of `shards.sources` found them. Out: a `Catalogue`, every row of it checked. Invariants: image ids
are unique, every image file exists and is not empty, every label is a known class, every group (lesion) has one label.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

import pandas as pd

from shards.originals import digests
from shards.tree import of_cell, size_and_version

REQUIRED = ("image_id", "path", "label", "group")
NO_GROUPS = "the source names no groups (lesions, patients): images of one of them may be in several splits"


@dataclass(frozen=True)
class Catalogue:
    """A checked table of images.

    images: one row an image, all columns text: `image_id, path, label, group`, then what else the source knows
        (blank where unknown). `label` is a class name, `group` what must never be cut by a split (the lesion). `path` is a
        `RemotePath` where the image is behind a URL: `tree.of_cell` opens either.
    classes: class names; a class's number is its place here.
    name: human-readable, where the images came from.
    warnings: what a reader of a score must be told of the source.
    group_name: what a group is, in the singular: lesion, patient, group.
    citation, license: of the images, as the dataset and its reports state them; empty where unknown.
    mixed_groups: whether a group may have images of several classes (a patient), or must not (a lesion).
    what: what the source was taken for, in one line. split_column: the column in which the source itself says train, val or test;
        empty where it says nothing.
    """

    images: pd.DataFrame
    classes: tuple[str, ...]
    name: str
    warnings: tuple[str, ...] = ()
    group_name: str = "group"
    citation: str = ""
    license: str = ""
    mixed_groups: bool = False
    what: str = ""
    split_column: str = ""

    @property
    def extra_columns(self) -> list[str]:
        """Columns beyond the four that every catalogue has."""
        return [column for column in self.images.columns if column not in REQUIRED]


def validate(catalogue: Catalogue) -> Catalogue:
    """Return the catalogue unchanged, or say what is wrong with it.

    Raises:
        ValueError: blank or repeated ids, names that look alike or like a formula, blank groups, unknown labels, a group with two labels, an empty file.
        FileNotFoundError: an image file that does not exist.
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
    for column in ("image_id", "label", "group"):
        _refuse_names(images[column].unique(), column, name)
    ids, labels = images["image_id"].tolist(), images["label"].tolist()
    repeated = [image_id for image_id, times in Counter(ids).items() if times > 1]
    if repeated:
        files = images.loc[images["image_id"] == repeated[0], "path"].unique()
        if len(files) > 1:
            raise ValueError(
                f"{preview(repeated)} of {name}: {PurePosixPath(files[0]).name} and {PurePosixPath(files[1]).name} would be one image id. Keep one of "
                "them where they are the same picture, or rename one."
            )
        raise ValueError(f"{preview(repeated)} of {name}: image id repeated. Keep one row for each image.")
    unknown = {image_id: label for image_id, label in zip(ids, labels, strict=True) if label not in catalogue.classes}
    if unknown:
        raise ValueError(
            f"{preview(unknown)} of {name}: unknown label {preview(dict.fromkeys(unknown.values()))}. "
            f"Known classes: {', '.join(catalogue.classes)}. Correct the label or remove the row."
        )
    if len(set(labels)) < 2:
        raise ValueError(
            f"All {len(labels)} images of {name} have one label ({labels[0]}). A classifier needs two classes: check how the source "
            "names them."
        )
    labels_of: dict[str, set[str]] = {}
    for group, label in zip(images["group"], labels, strict=True):
        labels_of.setdefault(group, set()).add(label)
    conflicts = sorted(group for group, of_group in labels_of.items() if len(of_group) > 1)
    if conflicts and not catalogue.mixed_groups:
        raise ValueError(
            f"Group {conflicts[0]} of {name} has the labels {', '.join(sorted(labels_of[conflicts[0]]))}; {len(conflicts)} such group(s). "
            "All images of a lesion must have one label: correct the metadata."
        )
    for path in images["path"]:
        if not of_cell(path).is_file():
            raise FileNotFoundError(f"The image {path} of {name} does not exist. Restore it or remove its row.")
    return catalogue


def _refuse_names(names: Iterable[str], column: str, source: str) -> None:
    """Refuse names that people take for one (they differ by case, white space or Unicode form), and what a spreadsheet would run."""
    seen: dict[str, str] = {}
    for name in names:
        alike = seen.setdefault("".join(unicodedata.normalize("NFKC", name).casefold().split()), name)
        if alike != name:
            raise ValueError(
                f"The source {source} has the {column} {alike!r} and {name!r}, which differ by case, white space or the form of their "
                "letters alone. Write them alike if they are one, or more apart if they are not."
            )
        if name[0] in "=@\t" or (name[0] in "+-" and not name[1:].replace(".", "").isalnum()):
            raise ValueError(
                f"The {column} {name!r} of {source} begins with {name[0]!r}: a spreadsheet that opens the predictions would run it as a "
                "formula. Rename it."
            )


def unite_copies(images: pd.DataFrame) -> pd.DataFrame:
    """Images whose files are the same bytes get one group, that of the first of them: copies must not be in two splits.

    Files that share their size with another are read for that.

    Raises:
        ValueError: copies with different labels, of which at most one can be right.
    """
    by_size: dict[int, list[int]] = {}
    for row, path in enumerate(images["path"]):
        by_size.setdefault(size_and_version(of_cell(path))[0], []).append(row)
    paths, labels, groups = (images[column].tolist() for column in ("path", "label", "group"))
    rows = [row for size, rows in by_size.items() if len(rows) > 1 and size for row in rows]
    first, conflicts = {}, []
    for row, digest in zip(rows, digests(of_cell(paths[row]) for row in rows), strict=True):
        original = first.setdefault(digest, row)
        groups[row] = groups[original]
        if labels[row] != labels[original]:
            conflicts.append((original, row))
    if conflicts:
        one, other = conflicts[0]
        raise ValueError(
            f"{paths[one]} and {paths[other]} are the same file under two labels ({labels[one]} and {labels[other]}); "
            f"{len(conflicts)} such pair(s). Keep the right one of each."
        )
    return images.assign(group=groups)


def extras(table: pd.DataFrame, used: set) -> pd.DataFrame:
    """The source's other columns; one whose name the shards use themselves becomes `source_NAME`."""
    rest = table.drop(columns=[column for column in table.columns if column in used])
    return rest.rename(columns={name: f"source_{name}" for name in (*REQUIRED, "key", "offset", "size", "class")})


def preview(names: Iterable, most: int = 3) -> str:
    """The first names of a list, and how many more there are, for an error's sentence."""
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
