"""The learning rate is a function of the step; decoupled decay spares biases and norms."""

import pytest
import torch
from torch import nn

from harness.config import Optim
from harness.optim import build_optimizer, losses, lr_at


def test_golden_values_of_the_cosine_with_warm_up():
    optim = Optim(lr=1.0, schedule="cosine", warmup_epochs=1)
    rates = [lr_at(step, optim, 4, 3) for step in range(12)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.5)
    assert rates[11] == pytest.approx(0.0380602, abs=1e-6)
    assert lr_at(12, optim, 4, 3) == pytest.approx(0)


def test_a_constant_rate_without_warm_up_is_constant():
    optim = Optim(lr=0.1, schedule="constant", warmup_epochs=0)
    assert {lr_at(step, optim, 4, 3) for step in range(12)} == {0.1}


def test_adamw_spares_biases_and_norms_and_adam_does_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decays = {
        tuple(p.shape): g["weight_decay"] for g in build_optimizer(model, Optim()).param_groups for p in g["params"]
    }
    assert decays == {(4, 3, 3, 3): 0.05, (2, 4): 0.05, (4,): 0.0, (2,): 0.0}
    adam = build_optimizer(model, Optim(name="adam", weight_decay=1e-4))
    assert [group["weight_decay"] for group in adam.param_groups] == [1e-4]
    sgd = build_optimizer(model, Optim(name="sgd", momentum=0.8))
    assert sgd.param_groups[0]["momentum"] == 0.8


def test_the_loss_is_a_sum_so_that_shares_add_up():
    logits, labels = torch.randn(10, 7), torch.randint(0, 7, (10,))
    parts = sum(
        losses(logits[cut], labels[cut], Optim(label_smoothing=0.1)).sum() for cut in (slice(0, 3), slice(3, 10))
    )
    assert torch.allclose(parts, losses(logits, labels, Optim(label_smoothing=0.1)).sum())
