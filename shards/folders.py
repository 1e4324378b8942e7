"""Images in folders: which files are images, and what a tree of them means.

In: a folder. Out: image files in a fixed order, or rows of a catalogue with class, and split where the folders say it. Invariants:
hidden files are no images; every other file that is not taken is counted; a tree that may mean two things is refused.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from shards.image import image_suffixes
from shards.tables import find_separator, is_table
from shards.tree import RemotePath, SourcePath, read_start, relative, to_cell

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PART = re.compile(r"(^|[_\- ])(part|images?|imgs?|pictures?|photos?)([_\- ]?\d+)?($|[_\- ])", re.IGNORECASE)
COMMON_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")  # that a table may leave out
NOT_OURS = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # made by systems, beside hidden files


@overload
def walk(root: Path) -> list[Path]: ...
@overload
def walk(root: SourcePath) -> list[SourcePath]: ...
def walk(root: SourcePath) -> Sequence[SourcePath]:
    """All files below a folder, sorted; links to folders are followed, but not up; hidden files and folders are left out.

    Raises:
        OSError: a folder cannot be read.
    """
    if isinstance(root, RemotePath):
        return [path for path in root.walk() if not any(map(is_hidden, relative(path, root).parts))]
    found, above = [], {os.path.dirname(root): frozenset()}  # of each folder, what it is in, without links
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real, outer = os.path.realpath(folder), above[os.path.dirname(folder)]
        if real in outer:  # a link to a folder above
            folders.clear()
            continue
        above[folder] = outer | {real}
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(folder, name) for name in names if not is_hidden(name)]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise OSError(
        f"The folder {error.filename} cannot be read ({error.strerror}), and images may be in it. Make it readable, or move it away."
    ) from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own."""
    return name.startswith(".") or name in NOT_OURS


class ImageFinder:
    """Image files that a table names, below a folder: by path, or by a name that only one file has."""

    def __init__(self, root: SourcePath):
        """Nothing is listed before a path is not found as it stands; behind a URL, everything at once: the table may name many folders."""
        self.root = root
        self._by_name: dict[str, list[SourcePath]] | None = None
        self._kinds: set[str] = set()
        if isinstance(root, RemotePath):
            root.walk()

    def find(self, name: str) -> SourcePath | None:
        """The file that a table means, None if there is none.

        As a path from the folder, with or without its ending. Otherwise, where there is no folder as the path names it, by its name alone, in any case, with `_downsampled` behind it, or
        with the zeros before a number that a spreadsheet has lost.

        Raises:
            ValueError: several files have that name.
        """
        if not name:
            return None
        name = name.replace("\\", "/")
        for ending in ("", *COMMON_SUFFIXES):
            if (path := self.root / f"{name}{ending}").is_file():
                return path
        if "/" in name and not Path(name).is_absolute() and (self.root / name).parent.is_dir():
            return None  # its folder is there without it: a file of this name elsewhere is another one
        if self._by_name is None:
            self._by_name = self._list()
        stem = _stem(name)
        for key in (stem, f"{stem}_downsampled", *([f"#{int(stem)}"] if stem.isdecimal() else [])):
            if found := self._of_the_kind(name, self._by_name.get(key, [])):
                if len({os.path.realpath(path) if isinstance(path, Path) else path for path in found}) > 1:
                    raise ValueError(
                        f"Several images are named {name}: {found[0]} and {found[1]}. Give paths in the table, or --image-root with "
                        "the folder that is meant."
                    )
                return found[0]
        return None

    def _of_the_kind(self, name: str, found: list[SourcePath]) -> list[SourcePath]:
        """Without files of another kind than a name's ending says, where there are files of that kind: they may be masks."""
        kind = _kind(name)
        return [path for path in found if _kind(path.name) == kind] if kind in self._kinds else found

    def _list(self) -> dict[str, list[SourcePath]]:
        found: dict[str, list[SourcePath]] = {}
        for path in walk(self.root):
            if path.suffix.lower() in image_suffixes():
                self._kinds.add(_kind(path.name))
                stem = _stem(path.name)
                for key in (stem, *([f"#{int(stem)}"] if stem.isdecimal() else [])):
                    found.setdefault(key, []).append(path)
        return found


def _kind(name: str) -> str:
    """The ending of an image's name, one of JPEG's for all of them; nothing where there is none."""
    ending = Path(name.lower()).suffix
    if ending not in image_suffixes():
        return ""
    return ".jpg" if ending in (".jpeg", ".jpe", ".jfif") else ending


def _stem(name: str) -> str:
    """A file's name without folders and without an image's ending, in small letters."""
    last = name.rpartition("/")[2].lower()
    ending = Path(last).suffix
    return last.removesuffix(ending) if ending in image_suffixes() else last


def find_classes(root: SourcePath) -> tuple[list[dict[str, Any]], str]:
    """The images of class folders, or of class folders inside folders named train, val and test.

    Returns:
        rows with image_id, path, label, and split where the folders say it; and what the tree was taken for, in one line.

    Raises:
        FileNotFoundError: no images in folders below it.
        ValueError: folders that are no classes: parts of one set of images, some named as splits, beside a table, or one alone.
    """
    suffixes, files = image_suffixes(), walk(root)
    images = [path for path in files if path.suffix.lower() in suffixes and len(relative(path, root).parts) > 1]
    if not images:
        raise FileNotFoundError(
            f"No source in {root}: neither HAM10000_metadata.csv nor images (such as .jpg or .png) in one folder a class. Give such "
            "a folder, or a CSV or Parquet file with --image-column and --label-column."
        )
    if odd := [str(path) for path in images if not _is_utf8(str(path))]:
        raise ValueError(
            f"The name of {odd[0]!r} has bytes that are no letters in UTF-8; {len(odd)} such name(s). Rename them."
        )
    tops = sorted({relative(path, root).parts[0] for path in images})
    splits = {top: SPLIT_WORDS[top.lower()] for top in tops if top.lower() in SPLIT_WORDS}
    _refuse_tables(root, files)
    if splits and len(splits) < len(tops):
        others = [top for top in tops if top not in splits]
        raise ValueError(
            f"{root} has folders named as splits ({', '.join(splits)}) and others ({', '.join(others[:5])}). Give a folder with "
            "train, val and test alone, or with one folder a class."
        )
    depth = 1 if splits else 0
    rows = []
    for path in images:
        parts = relative(path, root).parts
        if len(parts) < depth + 2:
            raise ValueError(
                f"{path} is in no class folder: {root} has {'/'.join(parts[:depth])}/CLASS/image. Move it into one."
            )
        row = {"image_id": str(Path(*parts).with_suffix("").as_posix()), "path": to_cell(path), "label": parts[depth]}
        rows.append(row | ({"split": splits[parts[0]]} if splits else {}))
    _refuse_parts(root, sorted({row["label"] for row in rows}))
    what = "class folders" + (f" in {', '.join(splits)}" if splits else "")
    other = Counter(path.suffix.lower() or path.name for path in files if path.suffix.lower() not in suffixes)
    left = ", ".join(f"{times} {ending}" for ending, times in sorted(other.items()))
    if loose := sum(path.suffix.lower() in suffixes for path in files) - len(images):
        what += f"; in no folder, left out: {loose} image{'s' if loose > 1 else ''}"
    return rows, what + (f"; not images, left out: {left}" if left else "")


def _is_utf8(name: str) -> bool:
    return name.encode("utf-8", "replace").decode() == name


def _refuse_tables(root: SourcePath, files: list[SourcePath]) -> None:
    if tables := [path for path in files if path.parent == root and is_table(path) and _has_columns(path)]:
        raise ValueError(
            f"{root} has a table ({tables[0].name}) beside its folders of images. If it names the classes, give it: python -m "
            f"shards pack {tables[0]} OUT --image-column ... --label-column ...; if the folders are the classes, move it elsewhere."
        )


def _has_columns(path: SourcePath) -> bool:
    """Whether a .txt file is a table at all, and not somebody's notes; others are tables by their names."""
    if path.suffix.lower() != ".txt":
        return True
    header = io.TextIOWrapper(io.BytesIO(read_start(path, 40_000)), encoding="utf-8", errors="replace").readline(10_000)
    return header.count(find_separator(header)) > 0 and len(header.split()) <= 2 * (
        header.count(find_separator(header)) + 1
    )


def _refuse_parts(root: SourcePath, classes: list[str]) -> None:
    if len(classes) == 1:
        raise ValueError(
            f"{root} has images in one class folder alone ({classes[0]}). A classifier needs two classes: give the folder "
            "above, or a table with --image-column and --label-column."
        )
    if all(PART.search(name) for name in classes):
        raise ValueError(
            f"The folders {', '.join(classes[:3])} of {root} look like parts of one set of images, not like classes. Give the "
            "table of their labels: python -m shards pack TABLE OUT --image-column ... --label-column ... --image-root "
            f"{root}; if they are classes, rename them."
        )
