"""Public data sets of skin lesions, known by the columns of their tables.

In: the header of a table. Out: which of its columns hold images, classes and groups, and how the images are cited. Invariants: what a
user names overrides what is known; a table that matches none is nobody's.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from shards.tree import SourcePath

HAM10000_CITATION = (
    "Tschandl, Rosendahl, Kittler: The HAM10000 dataset, Scientific Data 5, 180161 (2018), doi:10.1038/sdata.2018.161"
)
ISIC2018_CITATION = (
    "Codella et al.: Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the International Skin Imaging "
    "Collaboration (ISIC), arXiv:1902.03368 (2019); " + HAM10000_CITATION
)
BCN20000_CITATION = (
    "Hernandez-Perez et al.: BCN20000: Dermoscopic Lesions in the Wild, Scientific Data 11, 641 (2024), "
    "doi:10.1038/s41597-024-03387-w"
)
CC_BY_NC = "CC BY-NC 4.0"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what, as a user names them; empty where nothing was named.

    image: paths or names of images. labels: class names, or, of several columns, 1 in the one of an image's class.
    groups: what no split may cut; rows that share a value of any of them are one group. class_names: of the labels 0, 1, ..., or the
    order of the classes. image_root: the folder of the images, the table's where there is none.
    """

    image: str = ""
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    image_root: SourcePath | None = None


@dataclass(frozen=True)
class PublicData:
    """A public data set.

    name: as people call it. marks: columns that its table has, and no other. image, labels, groups: as `Columns`; a group's column may be
    missing in some editions; without labels, its users choose. companions: endings of the tables that name its lesions, in place of
    `_GroundTruth`. in_small_letters: class names are written as HAM10000 writes its own. citation, license: of the images.
    """

    name: str
    marks: tuple[str, ...]
    image: str
    labels: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    in_small_letters: bool = False
    citation: str = ""
    license: str = ""


KNOWN = (
    PublicData(
        "HAM10000",
        ("lesion_id", "image_id", "dx"),
        "image_id",
        ("dx",),
        ("lesion_id",),
        in_small_letters=True,
        citation=HAM10000_CITATION,
        license=CC_BY_NC,
    ),
    PublicData(
        "ISIC 2019",
        ("image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"),
        "image",
        ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"),
        ("lesion_id",),
        companions=("_Metadata",),
        in_small_letters=True,
        citation=f"{HAM10000_CITATION}; Codella et al., arXiv:1710.05006 (2017); {BCN20000_CITATION}",
        license=CC_BY_NC,
    ),
    PublicData(
        "ISIC 2018",
        ("image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"),
        "image",
        ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"),
        ("lesion_id",),
        companions=("_LesionGroupings",),
        in_small_letters=True,
        citation=ISIC2018_CITATION,
        license=CC_BY_NC,
    ),
    PublicData(
        "ISIC 2020",
        ("image_name", "patient_id", "benign_malignant"),
        "image_name",
        ("benign_malignant",),
        ("patient_id", "lesion_id"),
        citation=(
            "Rotemberg et al.: A patient-centric dataset of images and metadata for identifying melanomas using clinical context, "
            "Scientific Data 8, 34 (2021), doi:10.1038/s41597-021-00815-z"
        ),
        license=CC_BY_NC,
    ),
    PublicData(
        "PAD-UFES-20",
        ("img_id", "patient_id", "diagnostic"),
        "img_id",
        ("diagnostic",),
        ("patient_id", "lesion_id"),
        in_small_letters=True,
        citation=(
            "Pacheco et al.: PAD-UFES-20: A skin lesion dataset composed of patient data and clinical images collected from smartphones, "
            "Data in Brief 32, 106221 (2020), doi:10.1016/j.dib.2020.106221"
        ),
        license="CC BY 4.0",
    ),
    PublicData(
        "BCN20000",
        ("bcn_filename", "diagnosis"),
        "bcn_filename",
        ("diagnosis",),
        ("lesion_id",),
        in_small_letters=True,
        citation=BCN20000_CITATION,
    ),
    PublicData("ISIC Archive", ("isic_id",), "isic_id", (), ("patient_id", "lesion_id")),
    PublicData(
        "Fitzpatrick17k",
        ("md5hash", "fitzpatrick_scale"),
        "md5hash",
        citation=(
            "Groh et al.: Evaluating Deep Neural Networks Trained on Clinical Images in Dermatology with the Fitzpatrick 17k Dataset, "
            "arXiv:2104.09957 (2021)"
        ),
    ),
    PublicData("imagefolder", ("file_name",), "file_name", ("label",)),
)


def recognise(header: Iterable[str]) -> PublicData | None:
    """The public data set whose table has these columns, None if there is none."""
    present = set(header)
    return next((known for known in KNOWN if present.issuperset(known.marks)), None)


def fill(named: Columns, known: PublicData, header: Iterable[str]) -> Columns:
    """What a user named, and, where nothing was named, the columns of a public data set that a table has."""
    present = set(header)
    labels = known.labels if present.issuperset(known.labels) else ()
    return replace(
        named,
        image=named.image or known.image,
        labels=named.labels or labels,
        groups=named.groups or tuple(column for column in known.groups if column in present),
    )
