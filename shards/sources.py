"""Sources as people have them: HAM10000, the ISIC 2018 challenge, a folder for each class, a CSV or Parquet file.

In: a folder or a file. Out: a `Catalogue`, checked. Invariants: columns that the
shards do not need are kept as extra columns; a missing image is an error, never a dropped row.
"""

import filecmp
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from shards.catalogue import NO_GROUPS, REQUIRED, Catalogue, preview, unite_copies, validate
from shards.folders import ImageFinder, find_classes, walk
from shards.image import image_suffixes
from shards.stratify import connect
from shards.tables import read_table_file

HAM10000_CLASSES = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")  # the order of the ISIC 2018 challenge
METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata")  # as Kaggle and as Dataverse name it
GROUND_TRUTH = "ISIC2018_Task3_Test_GroundTruth.csv"
HAM10000_CITATION = (
    "Tschandl, Rosendahl, Kittler: The HAM10000 dataset, Scientific Data 5, 180161 (2018), doi:10.1038/sdata.2018.161"
)
ISIC2018_CITATION = (
    "Codella et al.: Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the International Skin Imaging "
    "Collaboration (ISIC), arXiv:1902.03368 (2019); " + HAM10000_CITATION
)
CC_BY_NC = "CC BY-NC 4.0"  # of both
DRAWN = "drawn"  # the `dx_type` of the demo's images, which nobody owns


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
    ids = table["image_id"].tolist()
    table["path"] = _paths(ids, _find_images(folder, set(ids)), folder)
    images = pd.concat([table[list(REQUIRED)], _extras(table, set(REQUIRED))], axis=1)
    is_demo = "dx_type" in table.columns and bool((table["dx_type"] == DRAWN).all())
    citation, terms = ("drawn by the demo", "no limits") if is_demo else (HAM10000_CITATION, CC_BY_NC)
    return validate(
        Catalogue(images, HAM10000_CLASSES, folder.name, group_name="lesion", citation=citation, license=terms)
    )


def read_isic2018(folder: Path, test: Path) -> Catalogue:
    """HAM10000 with the ISIC 2018 challenge's test images; the column `part` says which is which.

    Args:
        folder: HAM10000, as for `read_ham10000`. test: holds `ISIC2018_Task3_Test_GroundTruth.csv` (one-hot columns
            MEL, NV, BCC, AKIEC, BKL, DF, VASC) and the images, in any folders. Their lesions are not known, so each
            image is a group.

    Raises:
        FileNotFoundError, ValueError: as `read_ham10000`; also classes unknown to it, and rows that are not one-hot.
    """
    ham, test = read_ham10000(folder), Path(test)
    files = sorted(test.rglob(GROUND_TRUTH)) if test.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"No {GROUND_TRUTH} in {test}. Give the folder that holds it and the challenge's test images."
        )
    truth = read_table_file(files[0])[0]
    unknown = [column for column in truth.columns if column != "image" and column.lower() not in HAM10000_CLASSES]
    if "image" not in truth.columns or unknown:
        raise ValueError(
            f"{files[0]} must have the columns image, MEL, NV, BCC, AKIEC, BKL, DF, VASC. Found: {', '.join(truth)}."
        )
    hot = truth.drop(columns="image").apply(pd.to_numeric, errors="coerce")
    odd = truth["image"][(hot.sum(axis=1) != 1) | ~hot.isin([0, 1]).all(axis=1)]
    if len(odd):
        raise ValueError(f"{preview(odd)} of {files[0]}: not exactly one class is 1. Download the ground truth again.")
    ids = truth["image"].tolist()
    labels = [str(hot.columns[place]).lower() for place in hot.to_numpy().argmax(axis=1)]
    paths = _paths(ids, _find_images(test, set(ids)), test)
    rows = pd.DataFrame({"image_id": ids, "label": labels, "group": ids, "path": paths})
    both = pd.concat([ham.images.assign(part="train"), rows.assign(part="test")], ignore_index=True).fillna("")
    name = f"{ham.name} with the ISIC 2018 test images"
    return validate(
        Catalogue(both, HAM10000_CLASSES, name, group_name="lesion", citation=ISIC2018_CITATION, license=CC_BY_NC)
    )


def read_class_folders(root: Path) -> Catalogue:
    """Read `root/CLASS/**`, or `root/train/CLASS/**` beside `val` and `test`: the folders' names are the classes.

    Classes are in alphabetical order. Each image is a group, with its exact copies.

    Raises:
        FileNotFoundError: no folder, or no images in folders below it.
        ValueError: folders that may be no classes, as `folders.find_classes` says it.
    """
    root = Path(root)
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


def read_table(
    path: Path, image_column: str, label_column: str, group_column: str | None, image_root: Path | None = None
) -> Catalogue:
    """Read any CSV or Parquet file with one row an image.

    Args:
        path: the file. image_column: paths from the file's folder (or image_root), or absolute ones, with or without their
            ending; or names that one image below it has alone.
        label_column: class names; their alphabetical order numbers them. group_column: what no split may cut, such
            as the patient; of several, as `patient_id,lesion_id`, rows that share any value are one group; without it each
            image is a group.

    Raises:
        FileNotFoundError: the file does not exist, or paths in it do not.
        ValueError: missing columns, blanks, repeated images.
    """
    path = Path(path)
    table, what = read_table_file(path)
    groups = [name.strip() for name in (group_column or "").split(",") if name.strip()]
    wanted = [("--image-column", image_column), ("--label-column", label_column)]
    wanted += [("--group-column", name) for name in groups]
    for option, column in wanted:
        if column not in table.columns:
            raise ValueError(f"{path} has no column {column!r} ({option}). It has: {', '.join(table.columns)}.")
    given = table[image_column].str.strip()
    finder = ImageFinder(image_root or path.parent)
    resolved = [finder.find(name) for name in given]
    absent = [name for name, file in zip(given, resolved, strict=True) if file is None]
    if absent:
        raise FileNotFoundError(
            f"{preview(absent)} of {path}: no such image, and none of that name below {finder.root.resolve()}. Paths are taken "
            "from there: give the folder of the images as --image-root."
        )
    files = [str(file.resolve()) for file in resolved if file is not None]
    repeated = [file for file, times in Counter(files).items() if times > 1]
    if repeated:
        raise ValueError(f"{preview(repeated)} of {path}: image repeated. Keep one row for each image.")
    core = {
        "image_id": given.map(lambda name: name.removesuffix(Path(name).suffix) if _is_image_file(name) else name),
        "path": [str(file) for file in resolved],
        "label": table[label_column].str.strip(),
        "group": connect(table, groups) if len(groups) > 1 else table[groups[0]] if groups else given,
    }
    images = pd.concat([pd.DataFrame(core), _extras(table, {column for _, column in wanted})], axis=1)
    classes = tuple(sorted(set(images["label"]) - {""}))
    warned = () if group_column else (NO_GROUPS,)
    if not group_column:
        images = unite_copies(images)
    name = _group_name(groups[0] if groups else None)
    return validate(
        Catalogue(images, classes, path.name, warned, name, mixed_groups=bool(groups), what=f"table ({what})")
    )


def _read_metadata(folder: Path) -> pd.DataFrame:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The source {folder} is not a folder. Give the folder that holds HAM10000_metadata.csv."
        )
    for name in METADATA:
        if (folder / name).is_file():
            return read_table_file(folder / name)[0]
    raise FileNotFoundError(
        f"No HAM10000_metadata.csv in {folder}. Give the folder that holds it beside the image folders; "
        "`python -m shards demo OUT` draws an example of the layout."
    )


def _group_name(column: str | None) -> str:
    """What a group is, from the name of its column: `patient_id` holds patients."""
    name = re.sub(r"[ _-]?ids?$", "", (column or "").strip(), flags=re.IGNORECASE)
    return name.replace("_", " ").lower() or "group"


def _extras(table: pd.DataFrame, used: set) -> pd.DataFrame:
    """The source's other columns; one whose name the shards use themselves becomes `source_NAME`."""
    rest = table.drop(columns=[column for column in table.columns if column in used])
    return rest.rename(columns={name: f"source_{name}" for name in (*REQUIRED, "key", "offset", "size", "class")})


def _is_image_file(name: str | Path) -> bool:
    return Path(name).suffix.lower() in image_suffixes()


def _paths(image_ids: list[str], found: dict[str, Path], folder: Path) -> list[str]:
    absent = [image_id for image_id in image_ids if image_id not in found]
    if absent:
        raise FileNotFoundError(
            f"{preview(absent)} of the metadata: no image of that name (such as .jpg or .png) lies below "
            f"{folder}. Unpack every part of the download there, or remove those rows from the metadata."
        )
    return [str(found[image_id]) for image_id in image_ids]


def _find_images(folder: Path, wanted: set[str]) -> dict[str, Path]:
    """Map image id to file. The same image twice (Kaggle's download repeats its folders) is no error."""
    found: dict[str, Path] = {}
    for path in walk(folder):
        if not _is_image_file(path) or path.stem not in wanted:
            continue
        first = found.setdefault(path.stem, path)
        if first is not path and not filecmp.cmp(first, path, shallow=False):
            raise ValueError(f"Two different images for {path.stem}: {first} and {path}. Keep one of them.")
    return found
