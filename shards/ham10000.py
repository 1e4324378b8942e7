"""HAM10000 as it is downloaded, alone or with the test images of the ISIC 2018 challenge.

In: folders. Out: a `Catalogue`, checked. Invariants: classes are in the order of the challenge; columns that the shards do not need
are kept as extra columns; a missing image is an error, never a dropped row.
"""

import pandas as pd

from shards.catalogue import REQUIRED, Catalogue, extras, preview, validate
from shards.folders import walk
from shards.image import image_suffixes
from shards.labels import read_labels
from shards.originals import are_same
from shards.public_data import CC_BY_NC, HAM10000_CITATION, ISIC2018_CITATION
from shards.tables import read_table_file
from shards.tree import RemotePath, SourcePath, open_source, to_cell

HAM10000_CLASSES = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")  # the order of the ISIC 2018 challenge
METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")  # as Kaggle and as Dataverse name it
GROUND_TRUTH = ("ISIC2018_Task3_Test_GroundTruth.tab", "ISIC2018_Task3_Test_GroundTruth.csv")  # of Dataverse, of ISIC
DRAWN = "drawn"  # the `dx_type` of the demo's images, which nobody owns
COLUMNS = {"image_id": "image_id", "dx": "label", "lesion_id": "group"}


def read_ham10000(folder: SourcePath | str, table: SourcePath | None = None) -> Catalogue:
    """Read HAM10000 as it is downloaded: its metadata with the images in any folders beside it.

    Args:
        folder: holds the images, in `HAM10000_images_part_1/` and `_part_2/`, in one folder, or beside the table.
        table: the metadata, where it is not the folder's own `HAM10000_metadata.csv` (`.tab`, or without an ending).

    Raises:
        FileNotFoundError: no folder, no metadata file, or rows without an image.
        ValueError: missing columns, an unknown `dx`, a repeated image id, a lesion with two labels, an empty image.
    """
    folder = open_source(folder)
    text, what = read_table_file(table or find_metadata(folder))
    rows = _ham_rows(text, folder, folder)
    is_demo = "dx_type" in rows.columns and bool((rows["dx_type"] == DRAWN).all())
    citation, terms = ("drawn by the demo", "no limits") if is_demo else (HAM10000_CITATION, CC_BY_NC)
    return validate(
        Catalogue(
            rows,
            HAM10000_CLASSES,
            folder.name,
            group_name="lesion",
            citation=citation,
            license=terms,
            what=f"HAM10000 ({what})",
        )
    )


def read_isic2018(folder: SourcePath | str, test: SourcePath | str) -> Catalogue:
    """HAM10000 with the ISIC 2018 challenge's test images; the column `part` says which is which.

    Args:
        folder: HAM10000, as for `read_ham10000`. test: holds the images, in any folders, and their ground truth: Dataverse's
            `ISIC2018_Task3_Test_GroundTruth.tab`, which names their lesions, or ISIC's `.csv` (one-hot columns MEL, NV, BCC, AKIEC,
            BKL, DF, VASC), where each image is a group. Where both are there, the one with lesions is taken.

    Raises:
        FileNotFoundError, ValueError: as `read_ham10000`; also classes unknown to it, and rows that are not one-hot.
    """
    ham, test = read_ham10000(folder), open_source(test)
    below = walk(test)
    files = [file for name in GROUND_TRUTH for file in below if file.name == name]
    if not files:
        raise FileNotFoundError(
            f"No {GROUND_TRUTH[1]} in {test}. Give the folder that holds it (or Dataverse's {GROUND_TRUTH[0]}) and the "
            "challenge's test images."
        )
    tables = [read_table_file(file)[0] for file in files]
    place = next((place for place, table in enumerate(tables) if set(COLUMNS) <= set(table.columns)), 0)
    truth, file = tables[place], files[place]
    has_lesions = set(COLUMNS) <= set(truth.columns)
    rows = _ham_rows(truth, test, file) if has_lesions else _one_hot_rows(truth, test, file)
    both = pd.concat([ham.images.assign(part="train"), rows.assign(part="test")], ignore_index=True).fillna("")
    name = f"{ham.name} with the ISIC 2018 test images"
    what = f"test images of {file.name}, " + ("with their lesions" if has_lesions else "whose lesions are not known")
    return validate(
        Catalogue(
            both, HAM10000_CLASSES, name, group_name="lesion", citation=ISIC2018_CITATION, license=CC_BY_NC, what=what
        )
    )


def find_metadata(folder: SourcePath) -> SourcePath:
    """HAM10000's table in its folder.

    Raises:
        FileNotFoundError: no folder, or no table.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The source {folder} is not a folder. Give the folder that holds HAM10000_metadata.csv."
        )
    for name in METADATA:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"No HAM10000_metadata.csv in {folder}. Give the folder that holds it beside the image folders; "
        "`python -m shards demo OUT` draws an example of the layout."
    )


def _ham_rows(table: pd.DataFrame, images: SourcePath, named: SourcePath) -> pd.DataFrame:
    """Rows of a table with HAM10000's columns, `named` in errors."""
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise ValueError(
            f"The metadata of {named} lacks the column(s) {', '.join(missing)}. Found: {', '.join(table.columns)}. "
            "HAM10000's own CSV has lesion_id, image_id, dx, dx_type, age, sex, localization."
        )
    own = {
        name: f"source_{name}" for name in REQUIRED if name not in COLUMNS and name in table
    }  # as `extras` calls them
    table = table.rename(columns=COLUMNS | own)
    table["label"] = [label.lower() if label.lower() in HAM10000_CLASSES else label for label in table["label"]]
    ids = table["image_id"].tolist()
    table["path"] = _paths(ids, images)
    return pd.concat([table[list(REQUIRED)], extras(table, set(REQUIRED))], axis=1)


def _one_hot_rows(truth: pd.DataFrame, images: SourcePath, file: SourcePath) -> pd.DataFrame:
    columns = [column for column in truth.columns if column != "image"]
    if "image" not in truth.columns or {column.lower() for column in columns} - set(HAM10000_CLASSES):
        raise ValueError(
            f"{file} must have the columns image, MEL, NV, BCC, AKIEC, BKL, DF, VASC, or lesion_id, image_id, dx. "
            f"Found: {', '.join(truth)}."
        )
    ids = truth["image"].tolist()
    labels = [label.lower() for label in read_labels(truth, file, ids, columns, ()).values]
    return pd.DataFrame({"image_id": ids, "label": labels, "group": ids, "path": _paths(ids, images)})


def _paths(image_ids: list[str], folder: SourcePath) -> list[str | RemotePath]:
    """The file of each image id; the same image twice (Kaggle's download repeats its folders) is no error."""
    found: dict[str, SourcePath] = {}
    wanted, repeated = set(image_ids), []
    for path in walk(folder):
        if path.suffix.lower() not in image_suffixes() or path.stem not in wanted:
            continue
        first = found.setdefault(path.stem, path)
        if first is not path:
            repeated.append((first, path))
    for (first, path), is_same in zip(repeated, are_same(repeated), strict=True):
        if not is_same:
            raise ValueError(f"Two different images for {path.stem}: {first} and {path}. Keep one of them.")
    absent = [image_id for image_id in image_ids if image_id not in found]
    if absent:
        raise FileNotFoundError(
            f"{preview(absent)} of the metadata: no image of that name (such as .jpg or .png) lies below "
            f"{folder}. Unpack every part of the download there, or remove those rows from the metadata."
        )
    return [to_cell(found[image_id]) for image_id in image_ids]
