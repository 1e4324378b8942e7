"""What a command line names to be predicted: image files, folders, patterns, tables.

In: words. Out: image files with their names, in the order in which they were named. Invariants: nothing that was named is left out
in silence: a word that means no image is an error.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.catalogue import preview
from shards.folders import ImageFinder, walk
from shards.image import image_suffixes
from shards.public_data import recognise
from shards.tables import is_table, read_table_file


@dataclass(frozen=True)
class Inputs:
    """Image files and what they are called, in letters that UTF-8 has; a file that a table names and that is not there has its reason in `missing` (place -> why)."""

    paths: list[Path]
    names: list[str]
    missing: dict[int, str]


def find_inputs(words: Sequence[str], image_column: str = "", image_root: Path | None = None) -> Inputs:
    """The images that words name: files, folders (with all below them, sorted), patterns such as `'photos/*.jpg'`, tables.

    Args:
        image_column: of tables: paths or names of images. image_root: folder that these are taken from; the table's by default.

    Raises:
        FileNotFoundError: a word that names nothing, or no image.
        ValueError: a table without that column.
    """
    found = Inputs([], [], {})
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            _add(found, [file for file in walk(path) if file.suffix.lower() in image_suffixes()], word)
        elif path.is_file() and is_table(path):
            _add_table(found, path, image_column, image_root)
        elif path.is_file():
            _add(found, [path], word)
        elif glob.has_magic(word):
            _add(
                found,
                [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()],
                word,
            )
        else:
            raise FileNotFoundError(
                f"There is no {word}. Give images, folders, patterns in quotes, a table, or packed shards."
            )
    return found


def _add(found: Inputs, paths: list[Path], word: str) -> None:
    if not paths:
        raise FileNotFoundError(f"{word} has no image (such as .jpg or .png) in it.")
    found.paths.extend(paths)
    found.names.extend(str(path).encode("utf-8", "backslashreplace").decode() for path in paths)


def _add_table(found: Inputs, path: Path, column: str, root: Path | None) -> None:
    table, _ = read_table_file(path)
    known = recognise(table.columns)
    column = column or (known.image if known else "")
    if column not in table.columns:
        raise ValueError(f"{path} needs --image-column. It has: {', '.join(table.columns)}.")
    if table.empty:
        raise FileNotFoundError(f"{path} has no rows.")
    root = root or path.parent
    finder = ImageFinder(root)
    for name in table[column]:
        file = finder.find(name)
        assert file is None or isinstance(file, Path)
        if file is None:
            what = preview([name]) if name else f"a blank cell in {column}"
            found.missing[len(found.paths)] = f"{what} of {path}: no such image below {root}."
        found.paths.append(file or Path(root, name))
        found.names.append(name)
