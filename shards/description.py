"""What `dataset.json` says of a packed dataset.

In: its file, of a dataset or of a run's folder. Out: a frozen `Description`. Invariants: a description has all of its
fields, of the right types, and names no file outside its folder. Its checksum says that nothing was changed since, not who
made it.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.shape import misfit, parse_json

FORMAT = 2
ADDED_IN_FORMAT = {"group_name": 2, "citation": 2, "license": 2}  # the format that a field of `dataset.json` came with
DAMAGED = "Copy the dataset again, or pack it again."
MAX_SIDE = 65_535  # of a JPEG, in pixels
SETTING = (str, float, bool, None)
SHAPE = {
    **{"format": int, "classes": [str], "size": [int, int], "fit": str, "quality": int, "aliases": {str: str}},
    **{"counts": {str: {str: int}}, "left_out": int, "warnings": [str], "files": {str: str}, "checksum": str},
    **{"protocol": {"name": str, str: (*SETTING, [SETTING])}, "source": {"name": str, str: SETTING}},
}


@dataclass(frozen=True)
class Description:
    """What `dataset.json` says.

    classes: class names, a label is a place in them. size: stored (width, height) in pixels.
    protocol: name and parameters of the split. aliases: split names that mean another split.
    counts: split -> class -> images. left_out: number of source images stored nowhere.
    warnings: what a reader of a score must be told. source: name, number of images, fingerprint (SHA-256 over ids,
    labels, groups and original bytes). files: name -> SHA-256 of the index files.
    group_name: what a group is, in the singular. citation, license: of the images, empty where unknown. (Since format 2.)
    """

    format: int
    classes: list[str]
    size: list[int]
    fit: str
    quality: int
    protocol: dict
    aliases: dict[str, str]
    counts: dict[str, dict[str, int]]
    left_out: int
    warnings: list[str]
    source: dict
    files: dict[str, str]
    group_name: str = "group"
    citation: str = ""
    license: str = ""

    def to_bytes(self) -> bytes:
        """The bytes of `dataset.json`, with a checksum of everything else in them."""
        content = self._content() | {"checksum": self.checksum}
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @property
    def checksum(self) -> str:
        """SHA-256 over the content; since it covers every file's SHA-256, it identifies the whole dataset."""
        return hashlib.sha256(json.dumps(self._content(), ensure_ascii=False).encode()).hexdigest()

    def _content(self) -> dict:
        """The fields that the dataset's format has: an older dataset keeps its bytes and its checksum."""
        return {name: value for name, value in asdict(self).items() if ADDED_IN_FORMAT.get(name, 1) <= self.format}


def read_description(path: Path) -> Description:
    """What a `dataset.json` says: a dataset's own, or the copy in the folder of a run.

    Raises:
        ValueError: it is damaged, was changed, or is of a newer format.
        OSError: it cannot be read.
    """
    return parse_description(path.read_bytes(), path)


def parse_description(data: bytes, path: Path | str) -> Description:
    """What the bytes of a `dataset.json` say.

    Args:
        path: what errors call it.

    Raises:
        ValueError: it is damaged, was changed, or is of a newer format.
    """
    try:
        content = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}). {DAMAGED}") from error
    problem = misfit(content, {"format": int})
    found = 0 if problem else content["format"]
    if found > FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads up to {FORMAT}. Update dermharness.")
    fields = SHAPE | {name: str for name, since in ADDED_IN_FORMAT.items() if since <= found}
    if not problem and (unknown := sorted(set(content) - set(fields))):
        problem = f"it has an unknown field {unknown[0][:40]!r}"
    if problem := problem or misfit(content, fields) or _contradiction(content):
        raise ValueError(f"{path} is damaged ({problem}). {DAMAGED}")
    description = Description(**{name: value for name, value in content.items() if name != "checksum"})
    if description.to_bytes() != data:
        raise ValueError(f"{path} was changed after packing: its checksum does not match its content. {DAMAGED}")
    for name in description.files:
        check_name(name, path)
    return description


def check_name(name: str, found_in: Path | str, ending: str = "") -> None:
    """Refuse a file name that may lead out of the dataset's folder.

    Raises:
        ValueError: naming it, and the file that it was found in.
    """
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or not name.endswith(ending):
        kind = f"the plain name of a {ending} file" if ending else "a plain file name"
        raise ValueError(
            f"{found_in} names {name[:80]!r}, which is not {kind}: files outside the dataset's folder are not read. Get the "
            "dataset again from where it comes from."
        )


def _contradiction(content: dict) -> str | None:
    """What cannot be, although each value has the right type."""
    classes, size = content["classes"], content["size"]
    if not classes or len(set(classes)) < len(classes):
        return "it has no classes, or one twice"
    if not all(0 < side <= MAX_SIDE for side in size):
        return f"its size {size} is no width and height"
    if not content["counts"] or not all(set(classes) == set(counts) for counts in content["counts"].values()):
        return "its counts are not those of its classes"
    return None
