"""Optimizer, learning rate, loss: what turns gradients into weights.

In: the `Optim` settings. Out: an optimizer, and pure functions of a step. What stays true: the learning rate is a
function of the step number, so resuming needs no scheduler state.
"""

from math import cos, pi

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from harness.config import Config, Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over all weights of a model.

    Decoupled decay (adamw) spares biases and norms; adam and sgd decay everything, as their papers and the notebook do.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
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


def effective_prior(config: Config, counts: dict[str, int]) -> np.ndarray:
    """Share of each class that a trained model's probabilities take for granted, (C,): as frequent as in training."""
    found = np.array(list(counts.values()), float)
    return found / found.sum()


def lr_at(step: int, optim: Optim, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then constant or half a cosine down to zero."""
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1.0, steps_per_epoch * epochs - warmup)
    return optim.lr * 0.5 * (1 + cos(pi * min(1.0, done)))


def losses(logits: torch.Tensor, labels: torch.Tensor, optim: Optim) -> torch.Tensor:
    """Cross-entropy of each image: (B, C) float32 and (B,) int64 to (B,); label -1 counts for nothing."""
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=-1, label_smoothing=optim.label_smoothing)
