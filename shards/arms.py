"""The arms of a leak study: one source, split by several protocols, all beside the same unseen test set.

In: a `Catalogue`, and one with the groups of duplicates united. Out: what is packed for each arm. Invariants: the test set is cut first,
from united groups, and is the same images in every arm; nothing of a group in it, united or not, is left for the protocol.
"""

from dataclasses import dataclass

import pandas as pd

from shards.catalogue import Catalogue
from shards.grouping import Split
from shards.split import PROTOCOLS, beside_holdout
from shards.stratify import with_holdout


@dataclass(frozen=True)
class Arm:
    """A protocol, and whether it knows which groups are one: `unites`."""

    protocol: str
    unites: bool = False


# From the widest leak to none.
ARMS = {
    "notebook-leaky": Arm("notebook-leaky"),
    "image": Arm("image"),
    "notebook": Arm("notebook"),
    "lesion": Arm("lesion"),
    "lesion-united": Arm("lesion", unites=True),
}


def split_arm(source: Catalogue, united: Catalogue, name: str, seed: int, holdout: float) -> tuple[Catalogue, Split]:
    """The catalogue and the split of an arm, to be packed.

    Args:
        source: as it is. united: the same images with the groups of duplicates united, or `source` itself.
        name: of `ARMS`. seed: of the protocol; the test set does not depend on it. holdout: its share of the groups.

    Raises:
        ValueError: no such arm, or a class that is too small for it.
    """
    if name not in ARMS:
        raise ValueError(f"An arm must be one of {', '.join(ARMS)}. Got {name!r} instead.")
    arm = ARMS[name]
    protocol = beside_holdout(PROTOCOLS[arm.protocol], seed)
    groups = source.images.set_index("image_id")["group"]

    def split_rest(images: pd.DataFrame) -> Split:
        return protocol(images if arm.unites else images.assign(group=groups.loc[images["image_id"]].to_numpy()))

    split = with_holdout(united.images, holdout, split_rest)
    return (united if arm.unites else source), split
