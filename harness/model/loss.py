"""Targets of a batch, plain or mixed, and the loss of each image.

In: (B, C) logits and `Targets`. Out: (B,) float32 losses. Invariants: the loss is of each image, so that sums over any
shares of a batch add up to the batch's; an image with the label -1 is ignored: its loss is 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from harness.config import Optim


@dataclass(frozen=True)
class Targets:
    """Targets of a batch; label -1 is ignored.

    labels: (B,) int64. partners: (B,) int64, labels of the images that they were mixed with. shares: (B,) float32, how
    much of each image is its own. Partners and shares are None where nothing was mixed.
    """

    labels: torch.Tensor
    partners: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def split(self, parts: int) -> list["Targets"]:
        """Cut into parts, as `tensor_split` does."""
        labels = self.labels.tensor_split(parts)
        if self.partners is None or self.shares is None:
            return [Targets(part) for part in labels]
        partners, shares = self.partners.tensor_split(parts), self.shares.tensor_split(parts)
        return [Targets(*part) for part in zip(labels, partners, shares, strict=True)]

    def dominant_label(self) -> torch.Tensor:
        """The label of the larger part of each image, (B,) int64."""
        if self.partners is None or self.shares is None:
            return self.labels
        return torch.where(self.shares >= 0.5, self.labels, self.partners)


def mixed_targets(labels: torch.Tensor, shares: torch.Tensor) -> Targets:
    """Targets of images that were mixed with their neighbours; a pair with an ignored image is ignored.

    Args:
        labels: (B,) int64, pairs beside each other. shares: (B,) float32, as `augment.mix` gives them.
    """
    pairs = labels.view(-1, 2)  # (B/2, 2)
    labels = torch.where((pairs < 0).any(1, keepdim=True), -1, pairs)
    return Targets(labels.flatten(), labels.flip(1).flatten(), shares)


class Loss:
    """Cross-entropy of each image, with whatever the settings do for rare classes.

    `weights` multiplies a class's losses by N / (classes n_c), which is 1 on average over the training images.
    `logit-adjust` adds the logarithm of the class's share of training to its logit (Menon et al., 2021).
    """

    def __init__(self, optim: Optim, counts: dict[str, int], device: torch.device):
        """Set up for these numbers of training images by class, in the order of the labels."""
        images = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)  # (C,)
        present = images > 0
        self._smoothing, self._weights, self._offset = optim.label_smoothing, None, None
        if optim.balance == "weights":
            self._weights = torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0)
        if optim.balance == "logit-adjust":
            self._offset = (images.clamp(min=1) / images.sum()).log()

    def __call__(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """(B, C) logits to (B,) float32; an ignored image has the loss 0."""
        if self._offset is not None:
            logits = logits + self._offset
        own = self._cross_entropy(logits, targets.labels)
        if targets.partners is None or targets.shares is None:
            return own
        return targets.shares * own + (1 - targets.shares) * self._cross_entropy(logits, targets.partners)

    def _cross_entropy(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Weighed by class where asked: (B,)."""
        found = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1, label_smoothing=self._smoothing)
        return found if self._weights is None else found * self._weights[labels.clamp(min=0)]
