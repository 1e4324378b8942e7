"""Sources as people have them: HAM10000, a public data set's table, a folder for each class, any CSV or Parquet file.

In: a folder or a file, or the URL of one. Out: a `Catalogue`, checked. Invariants: what a source was taken for is said in one line; columns that the
shards do not need are kept as extra columns; a missing image is an error, never a dropped row.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd

from shards.catalogue import NO_GROUPS, REQUIRED, Catalogue, extras, preview, unite_copies, validate
from shards.folders import SPLIT_WORDS, ImageFinder, find_classes, walk
from shards.ham10000 import METADATA, read_ham10000
from shards.image import image_suffixes
from shards.labels import in_small_letters, read_labels
from shards.public_data import Columns, PublicData, fill, recognise
from shards.stratify import connect
from shards.tables import is_table, read_header, read_table_file
from shards.tree import SourcePath, open_source, relative, to_cell

DEEPEST = 3  # folders below the source's in which its table is looked for


def read_source(path: SourcePath | str, columns: Columns) -> Catalogue:
    """Read a source by what it is: HAM10000, a table, a folder with the table of a public data set, or one folder a class.

    Args:
        path: a folder or a table, or the URL of one. columns: what the user names of its table.

    Raises:
        FileNotFoundError, ValueError: as `read_table`, `read_class_folders` and `read_ham10000`; columns named for a folder without a
            table; a folder with several tables that may be meant.
    """
    path = open_source(path)
    names_columns = columns != Columns(image_root=columns.image_root)
    if path.is_file() or is_table(path):
        return _read_ham10000_or_table(path, columns, path.parent)
    if not path.is_dir():
        return read_ham10000(path)  # which says that there is none
    if any((path / name).is_file() for name in METADATA):
        if names_columns:
            raise ValueError(f"Options for columns go with a table. Give the table itself: {path / METADATA[0]}")
        return read_ham10000(path)
    tables = _known_tables(path)
    if tables and all(table.parent.name.lower() in SPLIT_WORDS for table in tables):
        return _read_tables_of_splits(path, tables, columns)
    if len(tables) > 1:
        raise ValueError(
            f"{path} has several tables of public data sets: {preview(tables, 5)}. Give the one that is meant: "
            f"python -m shards pack {tables[0]} OUT --image-root {path}"
        )
    if tables:
        return _read_ham10000_or_table(tables[0], columns, path)
    if names_columns:
        raise ValueError(
            f"Options for columns go with a table, and {path} has none that is known. Give the table itself."
        )
    return read_class_folders(path)


def read_class_folders(root: SourcePath | str) -> Catalogue:
    """Read `root/CLASS/**`, or `root/train/CLASS/**` beside `val` and `test`: the folders' names are the classes.

    Classes are in alphabetical order. Each image is a group, with its exact copies.

    Raises:
        FileNotFoundError: no folder, or no images in folders below it.
        ValueError: folders that may be no classes, as `folders.find_classes` says it.
    """
    root = open_source(root)
    rows, what = find_classes(root)
    images = pd.DataFrame([row | {"group": row["image_id"]} for row in rows])
    columns = [*REQUIRED, *(["split"] if "split" in images else [])]
    return validate(
        Catalogue(
            unite_copies(images[columns]),
            tuple(sorted({row["label"] for row in rows})),
            root.name,
            (NO_GROUPS,),
            what=what,
            split_column="split" if "split" in images else "",
        )
    )


def read_table(path: SourcePath | str, columns: Columns, prefix: str = "") -> Catalogue:
    """Read any CSV or Parquet file with one row an image.

    Args:
        path: the file. columns: as the user names them; of a public data set, what is not named is known. Images are paths from the
            file's folder (or image_root), or absolute ones, with or without their ending; or names that one image below it has
            alone. Without groups, each image is one, with its exact copies.
        prefix: stands before each image's id.

    Raises:
        FileNotFoundError: the file does not exist, or paths in it do not.
        ValueError: columns that are missing or not named, blanks, repeated images, labels as `labels.read_labels` refuses them.
    """
    path = open_source(path)
    table, what = read_table_file(path)
    known = recognise(table.columns)
    if known:
        table, lesions = _with_companion(table, path, known)
        what += f", lesions from {lesions.name}" if lesions else ""
        columns = fill(columns, known, table.columns)
    _check_columns(path, table, columns, known)
    given = table[columns.image].str.strip()
    files = _find_files(given, columns.image_root or path.parent, path)
    labels = read_labels(table, path, given.tolist(), columns.labels, columns.class_names)
    if known and known.in_small_letters:
        labels = in_small_letters(labels)
    groups, warned = _groups(table, given, columns, known)
    core = {
        "image_id": prefix
        + given.map(lambda name: name.removesuffix(Path(name).suffix) if _is_image_file(name) else name),
        "path": [to_cell(file) for file in files],
        "label": labels.values,
        "group": groups,
    }
    used = {columns.image, *columns.labels, *columns.groups}
    images = pd.concat([pd.DataFrame(core), extras(table, used)], axis=1)
    if not columns.groups:
        images = unite_copies(images)
    said = f"{known.name if known else 'table'} ({what}): images from {columns.image}, {labels.said}"
    said += f", groups from {' and '.join(columns.groups)}" if columns.groups else ", no groups"
    return validate(
        Catalogue(
            images,
            labels.classes,
            known.name if known and known.citation else path.name,
            warned,
            _group_name(columns.groups[0] if columns.groups else None),
            citation=known.citation if known else "",
            license=known.license if known else "",
            mixed_groups=bool(columns.groups),
            what=said,
        )
    )


def _read_ham10000_or_table(table: SourcePath, columns: Columns, root: SourcePath) -> Catalogue:
    """A table whose images lie below a folder; HAM10000's has classes in an order of their own, where its user names none."""
    root = columns.image_root or root
    known = recognise(read_header(table)) if table.is_file() else None
    if known and known.name == "HAM10000" and columns == Columns(image_root=columns.image_root):
        return read_ham10000(root, table)
    return read_table(table, replace(columns, image_root=root))


def _read_tables_of_splits(root: SourcePath, tables: list[SourcePath], columns: Columns) -> Catalogue:
    """Tables in folders named train, val and test, of one data set."""
    parts = []
    for table in tables:
        split = table.parent.name
        part = read_table(table, columns, prefix=f"{relative(table.parent, root).as_posix()}/")
        parts.append(replace(part, images=part.images.assign(split=SPLIT_WORDS[split.lower()])))
    first = parts[0]
    images = pd.concat([part.images for part in parts], ignore_index=True).fillna("")
    if NO_GROUPS in first.warnings:
        images = unite_copies(images.assign(group=images["image_id"]))
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    in_order = classes if columns.class_names or len(columns.labels) > 1 else tuple(sorted(classes))
    what = f"{first.what}; in {', '.join(table.parent.name for table in tables)}"
    return validate(replace(first, images=images, classes=in_order, name=root.name, what=what, split_column="split"))


def _known_tables(root: SourcePath) -> list[SourcePath]:
    """Tables of public data sets in a folder."""
    tables = [path for path in walk(root) if is_table(path) and len(relative(path, root).parts) <= DEEPEST]
    return [path for path in tables if recognise(read_header(path))]


def _with_companion(table: pd.DataFrame, path: SourcePath, known: PublicData) -> tuple[pd.DataFrame, SourcePath | None]:
    """The table with the columns of another that names its lesions, beside it or in a folder beside its own."""
    names = {path.name.replace("_GroundTruth", ending) for ending in known.companions} - {path.name}
    places = [path.parent, path.parent.parent, *(place for place in path.parent.parent.iterdir() if place.is_dir())]
    found = next((place / name for name in sorted(names) for place in places if (place / name).is_file()), None)
    if found is None:
        return table, None
    other = read_table_file(found)[0]
    if known.image not in other.columns or other[known.image].duplicated().any():
        raise ValueError(f"{found} must have one row for each {known.image}. Download it again.")
    new = [column for column in other.columns if column == known.image or column not in table.columns]
    return table.merge(other[new], how="left", on=known.image).fillna(""), found


def _check_columns(path: SourcePath, table: pd.DataFrame, columns: Columns, known: PublicData | None) -> None:
    has = f"It has: {', '.join(table.columns)}."
    if not (columns.image and columns.labels):
        missing = [*([] if columns.image else ["--image-column"]), *([] if columns.labels else ["--label-column"])]
        taken = f" ({known.name})" if known else ""
        raise ValueError(
            f"{path.name}{taken} needs {' and '.join(missing)} (--label-columns where each class has a column of 0 and 1, and "
            f"--group-column if it has groups). {has}"
        )
    option = "--label-column" if len(columns.labels) == 1 else "--label-columns"
    wanted = [("--image-column", columns.image), *((option, name) for name in columns.labels)]
    for option, column in [*wanted, *(("--group-column", name) for name in columns.groups)]:
        if column not in table.columns:
            raise ValueError(f"{path} has no column {column!r} ({option}). {has}")


def _find_files(names: pd.Series, root: SourcePath, path: SourcePath) -> list[SourcePath]:
    finder = ImageFinder(root)
    found = [finder.find(name) for name in names]
    absent = [name for name, file in zip(names, found, strict=True) if file is None]
    if absent:
        raise FileNotFoundError(
            f"{preview(absent)} of {path}: no such image, and none of that name below {root.resolve()}. Paths are taken "
            "from there: give the folder of the images as --image-root."
        )
    files = [file for file in found if file is not None]
    repeated = [file for file, times in Counter(str(file.resolve()) for file in files).items() if times > 1]
    if repeated:
        raise ValueError(f"{preview(repeated)} of {path}: image repeated. Keep one row for each image.")
    return files


def _groups(
    table: pd.DataFrame, images: pd.Series, columns: Columns, known: PublicData | None
) -> tuple[list[str], tuple[str, ...]]:
    """A group for each row, and what a reader of a score must know of them.

    Where the cell of an image is blank, it is a group of its own in a public data set, which is known to have such; elsewhere that is
    an error, later.
    """
    if not columns.groups:
        return images.tolist(), (NO_GROUPS,)
    first = columns.groups[0]
    groups, warned = table[first].str.strip(), ()
    if known and (blank := int((groups == "").sum())):
        groups = groups.where(groups != "", "image " + images)
        one = _group_name(first)
        warned = (f"{blank} images have no {first}: others of the same {one} may be in other splits",)
    if len(columns.groups) > 1:
        return connect(table.assign(**{first: groups}), list(columns.groups)), warned
    return groups.tolist(), warned


def _group_name(column: str | None) -> str:
    """What a group is, from the name of its column: `patient_id` holds patients."""
    name = re.sub(r"[ _-]?ids?$", "", (column or "").strip(), flags=re.IGNORECASE)
    return name.replace("_", " ").lower() or "group"


def _is_image_file(name: str | Path) -> bool:
    return Path(name).suffix.lower() in image_suffixes()
