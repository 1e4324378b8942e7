"""The losses of a tiny float64 run, step by step: a refactor leaves them as they are.

Order of samples, augmentation, loss, learning rate and optimizer take part; images and first weights are formulas. A
change that means to move them runs `python tests/unit/test_golden.py` and says so in its commit message.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness.config import Config
from harness.data.augment import training_view
from harness.distributed.world import World
from harness.model.loss import Loss, Targets
from harness.model.optim import build_optimizer, lr_at
from harness.training.state import TrainState
from harness.training.step import optimizer_step
from shards.plan import Plan
from support.processes import ROOT

GOLDEN = ROOT / "tests" / "golden" / "losses.json"
# Views are float32, so another processor's sines and fused products may differ in their last bits.
TOLERANCE = 1e-6
PLAN = Plan((10, 7, 10, 10, 6), 6, 5, 2, 2)
EPOCHS = 3


def synthetic_images(keys: torch.Tensor) -> torch.Tensor:
    """(B, 3, 20, 28) uint8: slopes that differ from key to key."""
    key, c = keys[:, None, None, None], torch.arange(3)[:, None, None]
    y, x = torch.arange(20)[:, None], torch.arange(28)
    return ((key * 37 + c * 85 + x * (key % 5 + 1) * 3 + y * (key % 3 + 1) * 5) % 256).to(torch.uint8)


def model() -> nn.Module:
    """Convolution, batch normalisation, linear head, in float64; weights are sines of their index."""
    built = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).double()
    with torch.no_grad():
        for number, (name, weight) in enumerate(built.named_parameters(), start=1):
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim > 1:
                weight.copy_(torch.sin(torch.arange(weight.numel()) * number + 1.0).view_as(weight) / 5)
    return built


def losses(name: str) -> list[float]:
    """The mean loss of each step."""
    base = Config()
    config = replace(
        base,
        data=replace(base.data, global_batch_size=PLAN.global_batch),
        optim=replace(base.optim, name=name, lr=0.02, label_smoothing=0.1, micro_batch=4, warmup_epochs=0.5),
    )
    world, network, found = World("fp32"), model(), []
    optimizer = build_optimizer(network, config.optim)
    loss_fn = Loss(config.optim, dict.fromkeys("abcd", 1), world.device)
    state = TrainState(model=network, ddp_model=network, optimizer=optimizer, loss_fn=loss_fn)
    for epoch in range(EPOCHS):
        for number in range(PLAN.n_batches):
            positions = torch.arange(number * PLAN.global_batch, (number + 1) * PLAN.global_batch)
            shards, rows = PLAN.locate(epoch, positions.numpy())
            keys = torch.from_numpy(shards * 100 + rows)
            views = training_view(synthetic_images(keys), positions, epoch, 5, config.augment, 16).double()
            lr = lr_at(len(found), config.optim, PLAN.n_batches, EPOCHS)
            sums, _ = optimizer_step(config, world, state, views, Targets(keys % 3), lr)
            found.append((sums[0] / sums[2]).item())
    return found


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_losses_of_a_fixed_run_are_what_they_were(name):
    golden = json.loads(GOLDEN.read_text())
    assert len(golden[name]) == EPOCHS * PLAN.n_batches
    assert losses(name) == pytest.approx(golden[name], rel=TOLERANCE)


def test_the_fixed_run_learns():
    golden = json.loads(GOLDEN.read_text())
    for name, found in golden.items():
        assert sum(found[-7:]) < 0.9 * sum(found[:7]), name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: losses(name) for name in ("sgd", "adam", "adamw")}, indent=1) + "\n")
