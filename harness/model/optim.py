"""Optimizer, learning rate and EMA: what turns gradients into weights.

In: the `Optim` settings. Out: an optimizer, and functions of a step. Invariants: the learning rate and the EMA's decay
are functions of the step number, so resuming needs no scheduler state.
"""

import copy
from dataclasses import replace
from math import cos, pi

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from harness.config import Optim
from harness.model.layers import number_layers

SCALE = "lr_scale"  # of a group's learning rate, by timm's name; 1 where a group has none


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over all weights of a model, at the peak learning rate.

    Decoupled decay (adamw) spares biases and norms; adam and sgd decay everything, as their papers and the notebook do.

    Raises:
        ValueError: 'optim.layer_decay' for a model whose layers are not known.
    """
    groups = _groups(model, optim)
    # fused: ResNet50's AdamW step takes 13 ms on 2 CPU cores, 33 in a loop over its tensors, 41 with foreach.
    if optim.name == "adam":
        return torch.optim.Adam(groups, lr=optim.lr, fused=True)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=optim.lr, fused=True)


def _groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Weights with their decay and, under 'optim.layer_decay', the scale of their rate, the deepest layer first.

    The rate of a layer is multiplied by the decay once for each layer between it and the output (BEiT; Bao et al., 2022).
    """
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if optim.layer_decay == 1:
        return _by_decay([weight for _, weight in named], optim)
    layers, groups = number_layers(model), []
    deepest = max(layers.values())
    for layer in range(deepest, -1, -1):
        weights = [weight for name, weight in named if layers[name] == layer]
        scale = optim.layer_decay ** (deepest - layer)
        groups += [group | {SCALE: scale} for group in _by_decay(weights, optim) if group["params"]]
    return groups


def _by_decay(weights: list[nn.Parameter], optim: Optim) -> list[dict]:
    """One group, or two where some are spared."""
    if optim.name != "adamw":
        return [{"params": weights, "weight_decay": optim.weight_decay}]
    return [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of a step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(SCALE, 1.0)


def lr_at(step: int, optim: Optim, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of a step: linear warm-up to the peak, then constant or half a cosine to zero.

    Args:
        step: counted from 0, as if all epochs had `steps_per_epoch`.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1.0, steps_per_epoch * epochs - warmup)
    return optim.lr * 0.5 * (1 + cos(pi * min(1.0, done)))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, as they are saved. The model may be on the meta device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def checkpoint_bytes(model: nn.Module, optim: Optim) -> int:
    """Bytes of a checkpoint to resume from: weights, optimizer state, EMA weights where they are kept.

    What the optimizer keeps for each weight is measured on one with a single weight, so that a new optimizer needs no
    entry here. Buffers are counted as if they were weights (0.2 % of ResNet50, 1 % of DenseNet121).

    Args:
        model: may be on the meta device.
    """
    single = nn.ParameterList([torch.zeros(2, 2, device="cpu")])  # zeros: no random number is taken
    optimizer = build_optimizer(single, replace(optim, layer_decay=1.0))
    single[0].grad = torch.zeros_like(single[0])
    optimizer.step()
    state = [value for value in optimizer.state[single[0]].values() if torch.is_tensor(value)]
    kept = sum(value.shape == single[0].shape for value in state)  # Adam 2, SGD with momentum 1; step counters are not
    return weight_bytes(model) * (1 + kept + (optim.ema > 0))


class EMA:
    """Exponential moving average of the weights, by torch.optim.swa_utils.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. Not
    `AveragedModel`: that one asks the device for a counter in each step, and waits for the answer.
    """

    def __init__(self, model: nn.Module, decay: float):
        """Copy a model that is not wrapped yet; its weights are taken over at the first update."""
        self.model, self._decay, self._fresh = copy.deepcopy(model), decay, True
        # Listed once: twice in each step took 0.27 ms for ResNet50.
        self._averaged: list[torch.Tensor] = list(self.model.parameters())
        self._current: list[torch.Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the model's weights after a step, counted from 1."""
        decay = 0.0 if self._fresh else min(self._decay, (1 + step) / (10 + step))
        self._fresh = False
        get_ema_multi_avg_fn(decay)(self._averaged, self._current, None)

    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the model's buffers (statistics of batch normalisation), before the EMA is evaluated or saved."""
        for averaged, current in zip(self.model.buffers(), model.buffers(), strict=True):
            averaged.copy_(current)

    def mark_restored(self) -> None:
        """The weights have been restored: the next update mixes into them."""
        self._fresh = False
