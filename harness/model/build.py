"""A torchvision (or timm) classifier with a head for our classes, and where its weights come from.

In: a model's name, a source of weights, the number of classes. Out: a module. Invariants: weights either fit
(everything but the head) or are refused with the names that do not; no pickle is executed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

TIMM = "timm/"  # before the names of timm's models
IMAGENET = "imagenet1k_"  # before the names of torchvision's weights
# Without their auxiliary heads, which return more than logits; they bring ImageNet's normalisation to their own themselves.
WITHOUT_AUXILIARY = {"aux_logits": False, "transform_input": True, "init_weights": True}
OPTIONS = {"inception_v3": WITHOUT_AUXILIARY, "googlenet": WITHOUT_AUXILIARY}


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights: where it is, or where it is kept once it has been downloaded from `url`.

    `url` is None for the user's own file.
    """

    path: Path
    url: str | None = None


def build_model(name: str, n_classes: int) -> nn.Module:
    """A torchvision classification model, or timm's by `timm/NAME`, freshly initialised, with `n_classes` outputs.

    Raises:
        ValueError: no such model, or one whose head cannot be replaced, or timm is not installed.
    """
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), n_classes)
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(
            f"The 'model.name' setting must be a torchvision classifier, such as {_near(name, known)}. Got {name!r}."
        )
    model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}))
    head = find_head(model)
    parent, _, attribute = head.rpartition(".")
    old = model.get_submodule(head)
    if isinstance(old, nn.Conv2d):  # SqueezeNet
        new = nn.Conv2d(old.in_channels, n_classes, (old.kernel_size[0], old.kernel_size[1]))
    elif isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, n_classes)
    else:
        raise AssertionError(f"find_head gave {head}, a {type(old).__name__}")
    setattr(model.get_submodule(parent), attribute, new)
    return model


def _build_timm(name: str, n_classes: int) -> nn.Module:
    try:
        import timm  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ValueError(
            f"'model.name' {TIMM}{name} needs the timm package: pip install -e \".[timm]\". Or name a torchvision model."
        ) from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:4] or ["resnet50", "convnext_tiny", "efficientnet_b0"]
        raise ValueError(f"timm has no model {name!r}. It has {', '.join(TIMM + found for found in near)}, ...")
    return timm.create_model(name, pretrained=False, num_classes=n_classes)


def outline(name: str, n_classes: int) -> nn.Module:
    """A model to ask for shapes and sizes: on torch's meta device, without memory, where the model allows it.

    Raises:
        ValueError: as `build_model`.
    """
    try:
        with torch.device("meta"):
            return build_model(name, n_classes)
    except RuntimeError:  # RegNets compute their widths with tensors
        return build_model(name, n_classes)


def check_input_size(model: nn.Module, name: str, size: int, setting: str = "data.image_size") -> None:
    """Refuse a model that cannot take (B, 3, size, size) images; costs no memory on the meta device.

    Args:
        model: as from `outline`; left in evaluation mode. name: its name. setting: where the size comes from.

    Raises:
        ValueError: naming both.
    """
    model.eval()
    with torch.device(next(model.parameters()).device), torch.no_grad():
        try:
            model(torch.zeros(2, 3, size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"The model {name} cannot take images of {size} pixels ('{setting}'): {error}. Most take 224 and up."
            ) from error


def find_head(model: nn.Module) -> str:
    """Dotted name of the classifier's last layer: a linear one, or (SqueezeNet) a convolution where there is none.

    timm's models say it themselves.

    Raises:
        ValueError: neither.
    """
    if isinstance(named := getattr(model, "default_cfg", {}).get("classifier"), str):
        return named
    for kind in (nn.Linear, nn.Conv2d):
        if layers := [name for name, module in model.named_modules() if isinstance(module, kind)]:
            return layers[-1]
    raise ValueError(
        f"{type(model).__name__} ends in no linear layer, so its head cannot be replaced. Use another model."
    )


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


def load_weights(model: nn.Module, name: str, weights: str) -> str:
    """Fill a model built by `build_model`, but for a head of other size; downloads the weights if needed.

    Args:
        model: changed in place. name, weights: as in `locate_weights`. A file holds the model's own tensor names:
            torchvision's, timm's, or a checkpoint's `model.safetensors`.

    Returns:
        one line that says how many tensors matched, are missing, and were not expected, with the first names.

    Raises:
        ValueError: weights that do not fit, with the names; weights that torchvision does not have.
        FileNotFoundError: no such file.
        ConnectionError: weights that cannot be downloaded.
    """
    file = locate_weights(name, weights)
    if file is None:
        return "weights: none, training from scratch"
    return _fill(model, fetch(file.url, file.path, name) if file.url else file.path)


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


def _fill(model: nn.Module, path: Path) -> str:
    """Copy the tensors of a file into a model; what `load_weights` returns."""
    found, wanted, head = _read_state_dict(path), model.state_dict(), find_head(model)
    chosen = {name: found[name] for name in wanted if name in found and found[name].shape == wanted[name].shape}
    names = [name for name in wanted if not name.startswith(f"{head}.")]  # another number of classes has a new head
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
    model.load_state_dict(chosen, strict=False)
    missing, unexpected = [name for name in wanted if name not in chosen], sorted(set(found) - set(wanted))
    fresh = any(name.startswith(f"{head}.") for name in missing)
    return (
        f"weights: {path}, {len(chosen)} tensors matched, {len(missing)} missing{_listed(missing)}, "
        f"{len(unexpected)} unexpected{_listed(unexpected)}" + ("; a new head" if fresh else "")
    )


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .pth file, by name; runs no pickled code."""
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle raise their own kinds
        raise ValueError(
            f"Cannot read the weights file {path} ({error}). Give a .safetensors or .pth state dict."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} is not a state dict (tensors by name). Save `model.state_dict()` and give that file.")
    return found


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _listed(names: list[str]) -> str:
    return f" ({_first(names)})" if names else ""


def _near(name: str, known: list[str]) -> str:
    family = [other for other in known if other[:4] == name[:4]]
    return ", ".join((family or ["resnet18", "resnet50", "efficientnet_v2_s", "convnext_tiny"])[:4])
