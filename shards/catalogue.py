"""One table of images, whatever they came from.

In: a folder as people have it. Out: a `Catalogue`, every row of it checked. What stays true: image ids are unique,
every picture exists and is not empty, every label is a known class, every group (lesion) has one label.
"""

import filecmp
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

HAM10000_CLASSES = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")  # the order of the ISIC 2018 challenge
REQUIRED = ("image_id", "path", "label", "group")
PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Catalogue:
    """A checked table of images.

    images: one row an image, all columns text: `image_id, path, label, group`, then what else the source knows
        (blank where unknown). `label` is a class name, `group` what must never be cut by a split (the lesion).
    classes: class names; a class's number is its place here.
    name: where the images came from, for people.
    """

    images: pd.DataFrame
    classes: tuple[str, ...]
    name: str

    @property
    def extra_columns(self) -> list[str]:
        """Columns beyond the four that every catalogue has."""
        return [column for column in self.images.columns if column not in REQUIRED]


def read_ham10000(folder: Path) -> Catalogue:
    """Read HAM10000 as it is downloaded: its metadata CSV with the images in any folders beside it.

    Args:
        folder: holds `HAM10000_metadata.csv` (or `HAM10000_metadata`) and the images, in
            `HAM10000_images_part_1/` and `_part_2/`, in one folder, or beside the CSV.

    Raises:
        FileNotFoundError: no folder, no metadata file, or rows without an image.
        ValueError: missing columns, an unknown `dx`, a repeated image id, a lesion with two labels, an empty image.
    """
    folder = Path(folder)
    table = _read_metadata(folder)
    columns = {"image_id": "image_id", "dx": "label", "lesion_id": "group"}
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"The metadata of {folder} lacks the column(s) {', '.join(missing)}. Found: {', '.join(table.columns)}. "
            "HAM10000's own CSV has lesion_id, image_id, dx, dx_type, age, sex, localization."
        )
    table = table.rename(columns=columns)
    found = _find_pictures(folder, set(table["image_id"]))
    absent = [image_id for image_id in table["image_id"] if image_id not in found]
    if absent:
        raise FileNotFoundError(
            f"{_some(absent)} of {folder}'s metadata: no picture of that name ({', '.join(sorted(PICTURES))}) lies below "
            f"{folder}. Unpack every part of the download there, or remove those rows from the metadata."
        )
    table["path"] = [str(found[image_id]) for image_id in table["image_id"]]
    extras = [column for column in table.columns if column not in REQUIRED]
    return checked(Catalogue(table[[*REQUIRED, *extras]], HAM10000_CLASSES, folder.name))


def checked(catalogue: Catalogue) -> Catalogue:
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
                f"The source {name} has a blank {column} in row(s) {_some([str(row + 2) for row in blank])} of its table "
                "(row 1 is the header). Fill it in or remove the row."
            )
    repeated = images["image_id"][images["image_id"].duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{_some(repeated)} of {name}: image id repeated. Keep one row for each image.")
    unknown = images[~images["label"].isin(catalogue.classes)]
    if len(unknown):
        raise ValueError(
            f"{_some(unknown['image_id'])} of {name}: unknown label {_some(unknown['label'].unique())}. "
            f"Known classes: {', '.join(catalogue.classes)}. Correct the label or remove the row."
        )
    labels = images.groupby("group")["label"].unique()
    torn = labels[labels.map(len) > 1]
    if len(torn):
        raise ValueError(
            f"Group {torn.index[0]} of {name} has the labels {', '.join(sorted(torn.iloc[0]))}; {len(torn)} such group(s). "
            "A group (lesion) has one label: correct the metadata."
        )
    for path in images["path"]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"The picture {path} of {name} is not there. Restore it or remove its row.")
        if Path(path).stat().st_size == 0:
            raise ValueError(f"The picture {path} is empty (0 bytes). Download it again or remove its row.")
    return catalogue


def _read_metadata(folder: Path) -> pd.DataFrame:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The source {folder} is not a folder. Give the folder that holds HAM10000_metadata.csv."
        )
    for name in ("HAM10000_metadata.csv", "HAM10000_metadata"):
        if (folder / name).is_file():
            try:
                return pd.read_csv(folder / name, dtype=str, keep_default_na=False)
            except pd.errors.ParserError as error:
                raise ValueError(f"{folder / name} is no CSV: {error}. Download it again.") from error
            except pd.errors.EmptyDataError as error:
                raise ValueError(f"{folder / name} is empty. Download it again.") from error
    raise FileNotFoundError(
        f"No HAM10000_metadata.csv in {folder}. Give the folder that holds it beside the image folders; "
        "`python -m shards demo OUT` draws an example of the layout."
    )


def _find_pictures(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Map image id to file. The same picture twice (Kaggle's download repeats its folders) is no error."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in PICTURES or path.stem not in wanted:
            continue
        first = found.setdefault(path.stem, path)
        if first is not path and not filecmp.cmp(first, path, shallow=False):
            raise ValueError(f"Two different pictures for {path.stem}: {first} and {path}. Keep one of them.")
    return found


def _some(names, most: int = 3) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
