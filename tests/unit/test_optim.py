"""The learning rate is a function of the step; decoupled decay spares biases and norms; EMA and bytes are as computed."""

import pytest
import torch
from torch import nn

from harness.config import Optim
from harness.model.optim import EMA, build_optimizer, checkpoint_bytes, lr_at


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


def test_the_average_of_weights_equals_the_formula_and_takes_buffers():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    average, expected = EMA(model, 0.5), None
    for step in range(1, 12):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        weight = model[0].weight.detach().clone()
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        assert torch.allclose(average.model[0].weight, expected, atol=1e-6)
    assert not torch.equal(average.model[1].running_mean, model[1].running_mean)
    average.copy_buffers(model)
    assert torch.equal(average.model[1].running_mean, model[1].running_mean)


def test_an_average_goes_on_from_restored_weights():
    model = nn.Linear(3, 2)
    whole = EMA(model, 0.9)
    whole.update(1)
    half = EMA(model, 0.9)
    half.model.load_state_dict(whole.model.state_dict())
    half.mark_restored()
    with torch.no_grad():
        model.weight.add_(1)
    whole.update(2)
    half.update(2)
    assert torch.equal(whole.model.weight, half.model.weight)
    assert not torch.equal(whole.model.weight, model.weight)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_has_the_bytes_that_were_foretold(name, ema):
    model, optim = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50)), Optim(name=name, ema=ema)
    optimizer = build_optimizer(model, optim)
    model(torch.randn(4, 100)).sum().backward()
    optimizer.step()
    saved = [*model.state_dict().values(), *(EMA(model, ema).model.state_dict().values() if ema else ())]
    saved += [value for state in optimizer.state.values() for value in state.values()]
    foretold = checkpoint_bytes(model.to("meta"), optim)
    assert 0.95 * foretold < sum(tensor.nbytes for tensor in saved) <= foretold


def test_foretelling_bytes_takes_no_random_number():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    checkpoint_bytes(nn.ParameterList([torch.zeros(3)]), Optim())
    assert torch.equal(torch.rand(2), expected)
