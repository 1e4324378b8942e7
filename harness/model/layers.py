"""How deep each weight of a model lies: its blocks, counted from the images to the head.

In: a model as built. Out: a layer's number for each parameter, the head's weights. Invariants: every parameter has one layer; the head is
the last; a model whose blocks are not known is refused.
"""

from typing import Any

from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock

from harness.model.build import find_head

BLOCKS = (BasicBlock, Bottleneck, CNBlock, MBConv, FusedMBConv, EncoderBlock, SwinTransformerBlock)


def number_layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, by name: 0 for the stem, then one for each residual block, the last for the head.

    timm's models say it themselves (`group_matcher`, as in timm's `param_groups_layer_decay`). In torchvision's ResNet, ConvNeXt,
    EfficientNet, ViT and Swin, what stands between two blocks (a downsampling) belongs to the second, and what follows the last one (a
    norm, a convolution) to that, up to the module that holds the head: `classifier`, `fc`, `heads`.

    Raises:
        ValueError: neither.
    """
    names = [name for name, _ in model.named_parameters()]
    if callable(matcher := getattr(model, "group_matcher", None)):
        from timm.models import group_parameters  # pyright: ignore[reportMissingImports] - an extra

        groups: Any = group_parameters(model, matcher(coarse=False), reverse=True)
        return {name: groups.get(name, max(groups.values())) for name in names}
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that are known, by which layers are counted. Set 'optim.layer_decay' to 1, or use a "
            "ResNet, ConvNeXt, EfficientNet, ViT or Swin of torchvision, or a model of timm."
        )
    layers: dict[str, int] = {}
    head, begun = find_head(model).split(".")[0], 0  # begun: blocks so far
    for name in names:
        inside = next((number for number, block in enumerate(blocks, start=1) if name.startswith(block)), None)
        if inside is not None:
            layers[name] = begun = inside
        elif name.startswith(f"{head}."):
            layers[name] = len(blocks) + 1
        else:
            layers[name] = min(begun + 1, len(blocks)) if begun else 0
    return layers


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the last layer, which are trained alone while the others are frozen.

    Raises:
        ValueError: the model has several heads, or nothing beside its head.
    """
    heads = getattr(model, "default_cfg", {}).get("classifier")
    if isinstance(heads, tuple | list):
        raise ValueError(
            f"{type(model).__name__} has several heads ({', '.join(heads)}), and 'optim.freeze_epochs' trains one. Set it to 0, or use "
            "another model."
        )
    weights = list(model.get_submodule(find_head(model)).parameters())
    if len(weights) == len(list(model.parameters())):
        raise ValueError(f"{type(model).__name__} has no weights but its head's: set 'optim.freeze_epochs' to 0.")
    return weights
