"""Optimizer, learning rate, loss, average of weights: what turns gradients into weights.

In: the `Optim` settings. Out: an optimizer, and functions of a step. What stays true: learning rate and the average's decay
are functions of the step number, so resuming needs no scheduler state.
"""

import copy
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from harness.config import Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over all weights of a model.

    Decoupled decay (adamw) spares biases and norms; adam and sgd decay everything, as their papers and the notebook do.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # fused: ResNet50's AdamW step takes 13 ms on 2 CPU cores, 33 in a loop over its tensors, 41 with foreach.
    if optim.name == "adam":
        return torch.optim.Adam(weights, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    if optim.name == "sgd":
        momentum, decay = optim.momentum, optim.weight_decay
        return torch.optim.SGD(weights, lr=optim.lr, momentum=momentum, weight_decay=decay, fused=True)
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def lr_at(step: int, optim: Optim, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then constant or half a cosine down to zero."""
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1.0, steps_per_epoch * epochs - warmup)
    return optim.lr * 0.5 * (1 + cos(pi * min(1.0, done)))


@dataclass(frozen=True)
class Targets:
    """What the pictures of a batch show; -1 counts for nothing.

    labels: (B,) int64. partners: (B,) int64, labels of the pictures that they were mixed with. shares: (B,) float32,
    how much of each picture is its own. Both are None where nothing was mixed.
    """

    labels: torch.Tensor
    partners: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    def split(self, parts: int) -> list["Targets"]:
        """Cut into parts, as `tensor_split` does."""
        if self.partners is None:
            return [Targets(labels) for labels in self.labels.tensor_split(parts)]
        return [Targets(*cut) for cut in zip(*(x.tensor_split(parts) for x in vars(self).values()), strict=True)]

    def dominant_label(self) -> torch.Tensor:
        """The label of the larger part of each picture, (B,) int64."""
        return self.labels if self.partners is None else torch.where(self.shares >= 0.5, self.labels, self.partners)


def mixed_targets(labels: torch.Tensor, shares: torch.Tensor) -> Targets:
    """The truth of pictures that were mixed with their neighbours; a pair with a picture that counts for nothing does, too."""
    pairs = labels.view(-1, 2)
    labels = torch.where((pairs < 0).any(1, keepdim=True), -1, pairs)
    return Targets(labels.flatten(), labels.flip(1).flatten(), shares)


class Loss:
    """Cross-entropy of each picture, with whatever the settings do for rare classes.

    `weights` multiplies a class's losses by N / (classes n_c), which is 1 on average over the training images.
    `logit-adjust` adds the logarithm of the class's share of training to its logit (Menon et al., 2021).
    """

    def __init__(self, optim: Optim, counts: dict[str, int], device: torch.device):
        """For training images of these counts, by class."""
        images = torch.tensor(list(counts.values()), dtype=torch.float32, device=device)
        present = images > 0
        self._smoothing, self._weights, self._offset = optim.label_smoothing, None, None
        if optim.balance == "weights":
            self._weights = torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0)
        if optim.balance == "logit-adjust":
            self._offset = (images.clamp(min=1) / images.sum()).log()

    def __call__(self, logits: torch.Tensor, truth: Targets) -> torch.Tensor:
        """(B, C) logits to (B,) float32; a picture without a label has the loss 0."""
        if self._offset is not None:
            logits = logits + self._offset
        if truth.partners is None:
            return self._one(logits, truth.labels)
        own, other = self._one(logits, truth.labels), self._one(logits, truth.partners)
        return truth.shares * own + (1 - truth.shares) * other

    def _one(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1, label_smoothing=self._smoothing)
        return found if self._weights is None else found * self._weights[labels.clamp(min=0)]


class EMA:
    """Exponential moving average of weights, by torch.optim.swa_utils.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. Not
    `AveragedModel`: that one asks the device for a counter in each step, and waits for the answer.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Copy a model that is not wrapped yet; its weights are taken over at the first update."""
        self.model, self._decay, self._fresh = copy.deepcopy(model), decay, True

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        decay = 0.0 if self._fresh else min(self._decay, (1 + step) / (10 + step))
        self._fresh = False
        get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), None)

    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the model's buffers (statistics of batch normalisation), before the average is judged or saved."""
        for averaged, current in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)

    def mark_restored(self) -> None:
        """The weights have been restored: the next update mixes into them."""
        self._fresh = False
