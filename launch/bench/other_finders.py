"""What an audit is compared with: other programs that look for copies.

In: images in memory. Out: pairs of rows that each takes for copies, by its own default threshold. Invariants: packages that are not
installed are left out; what was computed of an image is not computed again.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torchvision import transforms

from harness.model.build import build_model, find_head
from harness.model.normalization import normalization_of
from harness.model.weights import load_weights, read_origin
from shards.audit.collection import Collection

PairFinder = Callable[[Collection], set[tuple[int, int]]]
OWN = "own"  # the weights that imagededup downloads
# What imagededup feeds its own network, but for the normalisation.
INPUT = transforms.Compose([transforms.Resize((256, 256)), transforms.CenterCrop(224), transforms.ToTensor()])


def other_finders(own: Collection, folder: Path, cnn: str) -> dict[str, PairFinder]:
    """By name.

    Args:
        own: images that are in every collection, first. folder: for the files of these, and of the copies. cnn: weights of
            imagededup's CNN: empty for no CNN, `own` for those that it downloads, or a .safetensors file that names its model.

    Raises:
        ValueError: weights that do not fit, or do not say of which model they are.
    """
    if importlib.util.find_spec("imagededup") is None:
        return {}
    from imagededup.methods import CNN, PHash  # pyright: ignore[reportMissingImports]  optional

    n, hashes = len(own.table), PHash(verbose=False)

    def hash_files(files: Path) -> dict[str, Any]:
        """Its own loop over a folder forks a process, whose time nobody would count."""
        made = {path.name: hashes.encode_image(path) for path in files.iterdir()}
        return {name: words for name, words in made.items() if words}

    find = partial(hashes.find_duplicates, max_distance_threshold=10)
    finders = {"PHash": _finder(hash_files, find, folder / "PHash", n)}
    if cnn:
        method = CNN(verbose=False) if cnn == OWN else CNN(verbose=False, model_config=_custom(Path(cnn)))
        find = partial(method.find_duplicates, min_similarity_threshold=0.9, num_sim_workers=0)
        finders["CNN"] = _finder(method.encode_images, find, folder / "CNN", n)
    return finders


def _custom(weights: Path) -> Any:
    """A network without its last layer, as imagededup takes it; features are what its pooling gives."""
    from imagededup.utils import CustomModel  # pyright: ignore[reportMissingImports]  optional

    name = read_origin(weights).model
    if not name:
        raise ValueError(
            f"The weights file {weights} does not say of which model it is. Write it anew: "
            f"python -m harness.model.convert {weights} --like MODEL OUT.safetensors"
        )
    model = build_model(name, 1000)
    load_weights(model, name, str(weights), head="new")
    parent, _, layer = find_head(model).rpartition(".")
    setattr(model.get_submodule(parent), layer, nn.Identity())
    origin, (mean, std) = read_origin(weights), normalization_of(name)
    normalize = transforms.Normalize(origin.mean or mean, origin.std or std)
    return CustomModel(name=name, model=model.eval(), transform=transforms.Compose([INPUT, normalize]))


def _finder(encode: Callable[[Path], dict], find: Callable[..., dict], folder: Path, n_own: int) -> PairFinder:
    """Args: encode: what is computed of a folder's files, by name. find: names of the copies of each, of what was computed."""
    known: dict[str, Any] = {}

    def find_pairs(collection: Collection) -> set[tuple[int, int]]:
        if not known:
            known.update(encode(_write(collection, range(n_own), folder / "own")))
        rows = range(n_own, len(collection.table))
        encoded = known | (encode(_write(collection, rows, folder / "copies")) if rows else {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that no processes encode what is encoded
            found = find(encoding_map=encoded)
        return {_ends(one, other) for one, others in found.items() for other in others}

    return find_pairs


def _write(collection: Collection, rows: range, folder: Path) -> Path:
    """Files named by their rows. They are read by what is in them, whatever their ending."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row}.jpg").write_bytes(collection.read(row))
    return folder


def _ends(one: str, other: str) -> tuple[int, int]:
    a, b = sorted((int(Path(one).stem), int(Path(other).stem)))
    return a, b
