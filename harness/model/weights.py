"""Where a model's weights come from, and whether they fit.

In: a model, a source of weights. Out: the model, filled. Invariants: weights either fit (everything but the head) or are
refused with the names that do not; a head of other classes is never taken for one of ours; no pickle is executed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from harness.model.build import TIMM, find_head
from shards.shape import misfit, parse_json

IMAGENET = "imagenet1k_"  # before the names of torchvision's weights


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights: where it is, or where it is kept once it has been downloaded from `url`.

    `url` is None for the user's own file.
    """

    path: Path
    url: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a .safetensors file says of its weights, in its metadata: those of a checkpoint, an export or a conversion do.

    model: as in 'model.name'. classes: of its head, in order. mean, std: three numbers each, of the images that it was trained
    with. Each is None where the file does not say it.
    """

    model: str | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def locate_weights(name: str, weights: str) -> WeightsFile | None:
    """Where a model's initial weights are, or will be once downloaded. Downloads nothing.

    Args:
        name: of the model. weights: the 'model.weights' setting: imagenet1k_v1, imagenet1k_v2 (torchvision's, kept in
            torch.hub's folder), none, or a .safetensors or .pth file.

    Returns:
        None for none: training from scratch.

    Raises:
        ValueError: torchvision has no such weights for this model.
        FileNotFoundError: no such file.
    """
    if weights == "none":
        return None
    if not weights.startswith(IMAGENET):
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"Weights file {weights} not found. Set 'model.weights' to imagenet1k_v1, imagenet1k_v2, none, or a file."
            )
        return WeightsFile(Path(weights))
    if name.startswith(TIMM):
        raise ValueError(
            f"'model.weights' {weights} belong to torchvision, but 'model.name' is {name}. Set 'model.weights' to a file "
            "of timm weights, or none."
        )
    choices = {entry.name.lower(): entry for entry in torchvision.models.get_model_weights(name)}
    if weights not in choices:
        raise ValueError(
            f"torchvision has no {weights} weights for {name}. Set 'model.weights' to one of {', '.join([*choices, 'none'])}, "
            "or a file."
        )
    url = choices[weights].url
    return WeightsFile(Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2], url)


def load_weights(
    model: nn.Module, name: str, weights: str, classes: tuple[str, ...] | None = None, head: str = "auto"
) -> str:
    """Fill a model built by `build_model`; downloads the weights if needed.

    Args:
        model: changed in place. name, weights: as in `locate_weights`. A file holds the model's own tensor names:
            torchvision's, timm's, or a checkpoint's `model.safetensors`. classes: of the model's outputs, in order.
        head: as the 'model.head' setting. auto: the file's last layer is kept where it has as many outputs and, if the file
            names its classes, is of these; keep: it must be; new: it is not.

    Returns:
        one line that says how many tensors matched, are missing, and were not expected, with the first names.

    Raises:
        ValueError: weights that do not fit, with the names; weights that torchvision does not have; a head that cannot be kept.
        FileNotFoundError: no such file.
        ConnectionError: weights that cannot be downloaded.
    """
    file = locate_weights(name, weights)
    if file is None:
        return "weights: none, training from scratch"
    path = fetch(file.url, file.path, name) if file.url else file.path
    chosen, said = _choose(read_state_dict(path), model, name, path, classes, head)
    model.load_state_dict(chosen, strict=False)
    return said


def check_file(
    path: Path, model: nn.Module, name: str, classes: tuple[str, ...] | None = None, head: str = "auto"
) -> str:
    """Whether a file of weights fits a model, which may be on the meta device: `load_weights` by names and shapes alone.

    Returns:
        what `load_weights` would say.

    Raises:
        ValueError: as `load_weights`.
    """
    return _choose(read_state_dict(path, shapes_only=True), model, name, path, classes, head)[1]


def read_origin(path: Path) -> Origin:
    """What a file says of its weights; nothing, where it is no .safetensors file.

    Raises:
        ValueError: it says what cannot be, or is damaged.
    """
    if path.suffix != ".safetensors":
        return Origin()
    try:
        with safe_open(path, framework="pt") as file:
            words = file.metadata() or {}
        said = {key: parse_json(words[key]) for key in ("classes", "mean", "std") if key in words}
        shapes = {"classes": [str], "mean": [float] * 3, "std": [float] * 3}
        problem = misfit(said, {key: shapes[key] for key in said})
    except (SafetensorError, ValueError, OSError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"Cannot read the weights file {path} ({problem}). Restore a copy.")
    return Origin(words.get("model"), **{key: tuple(values) for key, values in said.items()})


def fetch(url: str, path: Path, model: str) -> Path:
    """Download a file of weights to `path` unless it is there; its name ends in the first digits of its SHA-256.

    Raises:
        ConnectionError: saying where to place the file by hand.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = path.stem.rpartition("-")[2]
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the SHA-256 does not fit
        raise ConnectionError(
            f"Cannot download the weights of {model} ({error}). Download {path.name} from {url} elsewhere and place it at "
            f"{path}, or train from scratch with --model.weights none."
        ) from error
    return path


def _choose(
    found: dict[str, torch.Tensor], model: nn.Module, name: str, path: Path, classes: tuple[str, ...] | None, head: str
) -> tuple[dict[str, torch.Tensor], str]:
    """Which tensors of a file a model takes, and what `load_weights` says of them."""
    origin = read_origin(path)
    if origin.model not in (None, name):
        raise ValueError(
            f"The weights file {path} says that it is of {origin.model}, and 'model.name' is {name}. Name that model, or, if the "
            f"two are the same network, write the file anew: python -m harness.model.convert {path} --like {name} OUT.safetensors"
        )
    wanted, layer = model.state_dict(), find_head(model)
    chosen = {name: found[name] for name in wanted if name in found and found[name].shape == wanted[name].shape}
    of_head = [name for name in wanted if name.startswith(f"{layer}.")]
    names = [name for name in wanted if name not in of_head]
    # Old files have no num_batches_tracked.
    wrong = [name for name in names if name not in chosen and not name.endswith("num_batches_tracked")]
    if wrong:
        shapes = [
            f"{name} is {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}" if name in found else name
            for name in wrong
        ]
        raise ValueError(
            f"The weights file {path} does not fit {type(model).__name__}: {len(wrong)} of {len(names)} tensors are missing "
            f"or have another shape: {_first(shapes)}. Give weights of the same model."
        )
    if surplus := surplus_layers(found, wanted, layer):
        raise ValueError(
            f"The weights file {path} is of a larger network than 'model.name' {name}: it has {len(surplus)} more layers "
            f"({_first(surplus)}). Name the model that it is of."
        )
    other = _why_other(found, wanted, of_head, origin.classes, classes)
    if head == "keep" and other:
        raise ValueError(
            f"'model.head' is keep, but the last layer of {path} {other}. Set 'model.head' to new, or give other weights or data."
        )
    if other or head == "new":
        chosen = {name: tensor for name, tensor in chosen.items() if name not in of_head}
    missing, unexpected = [name for name in wanted if name not in chosen], sorted(set(found) - set(wanted))
    fresh = (
        f"; a new head{f', since the one of the file {other}' if other else ''}" if set(missing) & set(of_head) else ""
    )
    return chosen, (
        f"weights: {path}, {len(chosen)} tensors matched, {len(missing)} missing{_listed(missing)}, "
        f"{len(unexpected)} unexpected{_listed(unexpected)}{fresh}"
    )


def surplus_layers(found: Iterable[str], wanted: Iterable[str], head: str) -> list[str]:
    """Layers that a file has and a model lacks, in a part of the network that both have: those of a deeper model.

    Parts that the model lacks as a whole are allowed: auxiliary heads, and layers between the network and its old head.

    Args:
        found, wanted: names of the tensors of the file and of the model. head: the model's last layer.
    """
    names = set(wanted)
    parts = {name.partition(".")[0] for name in names} - {head.partition(".")[0]}
    layers = [name.removesuffix(".weight") for name in found if name not in names and name.endswith(".weight")]
    return [layer for layer in layers if layer.partition(".")[0] in parts]


def _why_other(
    found: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    of_head: list[str],
    theirs: tuple[str, ...] | None,
    ours: tuple[str, ...] | None,
) -> str | None:
    """Why the last layer of a file is none of ours, as the end of a sentence that begins with it; None if it may be."""
    for name in of_head:
        if name not in found:
            return f"is not there ({name})"
        if found[name].shape != wanted[name].shape:
            return f"has another size ({name} is {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)})"
    if theirs and ours and theirs != ours:
        return f"is of other classes ({_first(list(theirs))} instead of {_first(list(ours))})"
    return None


def read_state_dict(path: Path, inside: tuple[str, ...] = (), shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file, by name; runs no pickled code.

    Args:
        inside: names under which a checkpoint may hold them. shapes_only: on the meta device, without reading the numbers.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if path.suffix == ".safetensors":
            found = _shapes(path) if shapes_only else load_file(path)
        else:
            device, mapped = ("meta", is_zipfile(path)) if shapes_only else ("cpu", False)
            found = torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except Exception as error:  # safetensors, zipfile and pickle raise their own kinds
        raise ValueError(
            f"Cannot read the weights file {path} ({error}). Give a .safetensors or .pth state dict."
        ) from error
    for name in inside:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} is not a state dict (tensors by name). Save `model.state_dict()` and give that file.")
    return found


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _listed(names: list[str]) -> str:
    return f" ({_first(names)})" if names else ""
