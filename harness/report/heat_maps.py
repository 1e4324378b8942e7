"""Where a model looks: Grad-CAM (Selvaraju et al., 2017) of its last feature map, by the grad-cam package.

In: a model, images as it sees them, classes. Out: JPEGs, the image with the map laid over it. Invariants: the model's weights
and gradients are as before; a model without a feature map near its end (a plain ViT) is refused by name.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import nn

from harness.config import Augment

BATCH = 8
SIDE = 220  # of the JPEGs, in pixels
STRENGTH = 0.45  # of the colours over the image
SMALLEST = 4  # side of a feature map that says where; below it, the one before is taken
LATE = 0.4  # share of the model's layers that run before its last feature map, at least


def check_heat_maps(model: nn.Module, name: str, size: int) -> None:
    """Refuse what cannot be explained, before anything is computed.

    Raises:
        ValueError: no grad-cam package, or a model without a feature map near its end.
    """
    try:
        import pytorch_grad_cam  # noqa: F401 - an extra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError('--explain needs the grad-cam package: pip install -e ".[explain]"') from error
    if find_feature_map(model, size) is None:
        raise ValueError(
            f"--explain needs a feature map, and {name} has none near its end. Leave it out, or use a convolutional model."
        )


def find_feature_map(model: nn.Module, size: int) -> nn.Module | None:
    """The last module that gives (B, C, h, h) with h of at least `SMALLEST`; None where that is early in the model, or nowhere.

    Args:
        size: side of the model's input, in pixels.
    """
    found: list[tuple[int, nn.Module]] = []
    ran = [0]

    def look(module: nn.Module, inputs: tuple, output: object) -> None:
        ran[0] += 1
        is_map = (
            isinstance(output, torch.Tensor) and output.ndim == 4 and SMALLEST <= output.shape[2] == output.shape[3]
        )
        if is_map and module is not model:
            found.append((ran[0], module))

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(2, 3, size, size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1][1] if found and found[-1][0] > LATE * ran[0] else None


def draw_heat_maps(model: nn.Module, views: torch.Tensor, labels: Sequence[int], augment: Augment) -> list[bytes]:
    """A JPEG for each image: warm where a higher activation would make its class more probable.

    Args:
        model: on the device of views; `check_heat_maps` passed. views: (N, 3, S, S) float32, as the model sees them. labels: N class
            numbers, what is explained. augment: how the views were normalised.
    """
    from matplotlib import colormaps  # slow to import, used once
    from pytorch_grad_cam import GradCAM  # pyright: ignore[reportMissingImports]
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # pyright: ignore[reportMissingImports]

    layer = find_feature_map(model, views.shape[-1])
    drawn = []
    with GradCAM(model=model, target_layers=[layer]) as cam:
        for start in range(0, len(views), BATCH):
            part = views[start : start + BATCH].contiguous()
            targets = [ClassifierOutputTarget(label) for label in labels[start : start + BATCH]]
            with torch.enable_grad():
                maps = cam(input_tensor=part, targets=targets)  # (b, S, S), 0 to 1
            for view, heat in zip(part, maps, strict=True):
                drawn.append(_overlay(view, colormaps["turbo"](heat)[..., :3], augment))
    model.zero_grad(set_to_none=True)
    return drawn


def _overlay(view: torch.Tensor, colours: np.ndarray, augment: Augment) -> bytes:
    mean, std = (np.array(values)[:, None, None] for values in augment.normalization)
    seen = (view.detach().cpu().numpy() * std + mean).clip(0, 1).transpose(1, 2, 0)  # (S, S, 3)
    mixed = ((1 - STRENGTH) * seen + STRENGTH * colours).clip(0, 1)
    buffer = io.BytesIO()
    image = Image.fromarray((255 * mixed).round().astype(np.uint8))
    image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
