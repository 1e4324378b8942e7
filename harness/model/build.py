"""A torchvision (or timm) classifier with a head for our classes.

In: a model's name, the number of classes. Out: a module with fresh weights. Invariants: its last layer has an output for
each class; what is asked for and the model does not have is refused.
"""

from typing import Literal

import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

TIMM = "timm/"  # before the names of timm's models
# Without their auxiliary heads, which return more than logits; they bring ImageNet's normalisation to their own themselves.
WITHOUT_AUXILIARY = {"aux_logits": False, "transform_input": True, "init_weights": True}
OPTIONS = {"inception_v3": WITHOUT_AUXILIARY, "googlenet": WITHOUT_AUXILIARY}


DropPath = float | Literal["auto"]


def build_model(name: str, n_classes: int, drop_path: DropPath = "auto") -> nn.Module:
    """A torchvision classification model, or timm's by `timm/NAME`, freshly initialised, with `n_classes` outputs.

    Args:
        drop_path: highest probability that a residual branch is left out in training, which rises linearly with depth
            (stochastic depth; Huang et al., 2016); auto: the model's own. It changes no weight.

    Raises:
        ValueError: no such model, or one whose head cannot be replaced, or that has no such branches, or timm is not installed.
    """
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), n_classes, drop_path)
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(
            f"The 'model.name' setting must be a torchvision classifier, such as {_near(name, known)}. Got {name!r}."
        )
    asked = {} if drop_path == "auto" else {"stochastic_depth_prob": drop_path}
    try:
        model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {}), **asked)
    except TypeError as error:  # the model's own function says which argument it does not know
        raise _no_drop_path(name, drop_path) from error
    if asked and not any(isinstance(module, StochasticDepth) for module in model.modules()):
        raise _no_drop_path(name, drop_path)  # MobileNetV3 takes the argument and has no use for it
    head = find_head(model)
    parent, _, attribute = head.rpartition(".")
    old = model.get_submodule(head)
    if isinstance(old, nn.Conv2d):  # SqueezeNet
        size = (old.kernel_size[0], old.kernel_size[1])
        new = nn.Conv2d(old.in_channels, n_classes, size, dtype=old.weight.dtype)
    elif isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, n_classes, dtype=old.weight.dtype)
    else:
        raise AssertionError(f"find_head gave {head}, a {type(old).__name__}")
    setattr(model.get_submodule(parent), attribute, new)
    return model


def _no_drop_path(name: str, drop_path: DropPath) -> ValueError:
    return ValueError(
        f"'model.drop_path' is {drop_path}, but {name} has no drop path that can be set. Set it to auto, or use a ConvNeXt or an "
        "EfficientNet of torchvision, or most models of timm (timm/resnet50, timm/swin_tiny_patch4_window7_224)."
    )


def _build_timm(name: str, n_classes: int, drop_path: DropPath) -> nn.Module:
    try:
        import timm  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ValueError(
            f"'model.name' {TIMM}{name} needs the timm package: pip install -e \".[timm]\". Or name a torchvision model."
        ) from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name[:6]}*")[:4] or ["resnet50", "convnext_tiny", "efficientnet_b0"]
        raise ValueError(f"timm has no model {name!r}. It has {', '.join(TIMM + found for found in near)}, ...")
    if drop_path == "auto":
        return timm.create_model(name, pretrained=False, num_classes=n_classes)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=n_classes, drop_path_rate=drop_path)
    except TypeError as error:
        raise _no_drop_path(f"{TIMM}{name}", drop_path) from error
    if drop_path and not any(type(module).__name__ == "DropPath" for module in model.modules()):
        raise _no_drop_path(f"{TIMM}{name}", drop_path)
    return model


def outline(name: str, n_classes: int, drop_path: DropPath = "auto") -> nn.Module:
    """A model to ask for shapes and sizes: on torch's meta device, without memory, where the model allows it.

    Raises:
        ValueError: as `build_model`.
    """
    try:
        with torch.device("meta"):
            return build_model(name, n_classes, drop_path)
    except RuntimeError:  # RegNets compute their widths with tensors
        return build_model(name, n_classes, drop_path)


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


def _near(name: str, known: list[str]) -> str:
    family = [other for other in known if other[:4] == name[:4]]
    return ", ".join((family or ["resnet18", "resnet50", "efficientnet_v2_s", "convnext_tiny"])[:4])
