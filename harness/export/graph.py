"""The graph that is exported: from images to probabilities.

In: a trained model, and how its images were made. Out: a module, and the same as a `torch.export` program. Invariants: on
stored images it gives what the harness gives for the center view; the central square is taken by the weights that
`plain_view` itself has, so a change there cannot pass by this file.
"""

from dataclasses import replace

import torch
from torch import nn

from harness.config import Augment
from harness.data.augment import plain_view
from harness.export.resize import fit_levels

INPUT, OUTPUT = "images", "probabilities"
AT_ONCE = 16  # images of one lit column whose view is taken together: bounds memory


class Preprocessing(nn.Module):
    """From any image to the model's view: (N, H, W, 3) uint8 RGB to (N, 3, S, S) float32, normalised.

    Args:
        stored: (width, height) of the dataset. fit: cover, contain or squeeze. augment: of the run, with its mean and std.
        size: S in pixels.
    """

    def __init__(self, stored: tuple[int, int], fit: str, augment: Augment, size: int):
        super().__init__()
        self.stored, self.fit = stored, fit
        across, down = central_square(stored, augment, size)
        self.columns, self.rows = _used(across), _used(down)
        across, down = across[:, self.columns].contiguous(), down[:, self.rows].contiguous()
        mean, std = augment.normalization
        self.register_buffer("across", across)
        self.register_buffer("down", down)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize as packing does, take the central square, normalise."""
        pixels = images.permute(0, 3, 1, 2).double()
        levels = fit_levels(pixels, self.stored, self.fit, self.columns, self.rows).float()
        square = self.get_buffer("down") @ (levels @ self.get_buffer("across").T)
        return (square / 255 - self.get_buffer("mean")) / self.get_buffer("std")


class Classifier(nn.Module):
    """From images (`preprocessing` inside) or normalised views (None) to probabilities, (N, C) float32.

    Args:
        model: to logits (N, C). temperature: that they are divided by.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing | None, temperature: float):
        super().__init__()
        self.preprocessing, self.model, self.temperature = preprocessing, model, temperature

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities of a batch."""
        views = images if self.preprocessing is None else self.preprocessing(images)
        return (self.model(views).float() / self.temperature).softmax(1)


@torch.inference_mode()
def central_square(stored: tuple[int, int], augment: Augment, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights by which `plain_view` makes its square of columns, (S, W), and of rows, (S, H), as float32.

    The view is linear, without a rotation, and its axes are independent. So it is found by showing it images with one lit
    column each: the middle row of what comes out is that column's weight; in the middle, weights sum to 1.
    """
    plain = replace(augment, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    weights = []
    for axis, length in ((3, stored[0]), (2, stored[1])):
        parts = []
        for first in range(0, length, AT_ONCE):
            lit = torch.arange(first, min(first + AT_ONCE, length))
            images = torch.zeros(len(lit), 3, stored[1], stored[0], dtype=torch.uint8)
            for place, number in enumerate(lit.tolist()):
                images[place].select(axis - 1, number).fill_(255)
            view = plain_view(images, plain, size)[:, 0]  # (n, S, S)
            parts.append(view[:, size // 2] if axis == 3 else view[:, :, size // 2])
        weights.append(torch.cat(parts).T.contiguous())
    across, down = (found.clone() for found in weights)
    return across, down


def _used(weights: torch.Tensor) -> slice:
    """The pixels of n that any of S rows weighs; weights: (S, n)."""
    places = weights.any(0).nonzero()
    return slice(int(places[0]), int(places[-1]) + 1)


def trace(classifier: Classifier, example: torch.Tensor, name: str) -> torch.export.ExportedProgram:
    """The classifier as a program of torch.export, with a dynamic batch, and height and width if it takes any image.

    Args:
        example: two images or views. name: of the model.

    Raises:
        ValueError: the model cannot be traced, with what torch says.
    """
    shape = {0: torch.export.Dim("batch")}
    if classifier.preprocessing is not None:
        shape |= {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    try:
        with torch.no_grad():
            return torch.export.export(classifier.eval(), (example,), dynamic_shapes=(shape,), strict=False)
    except Exception as error:  # torch._dynamo raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"torch.export cannot trace {name} with a dynamic batch ({type(error).__name__}: {reason}). "
            "Export its weights with --format safetensors."
        ) from error
