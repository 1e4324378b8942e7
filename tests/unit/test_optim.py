"""The learning rate is a function of the step; decoupled decay spares biases and norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.config import Optim
from harness.model.optim import EMA, Loss, Targets, build_optimizer, lr_at, mixed_targets


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
    loss = Loss(Optim(label_smoothing=0.1), dict.fromkeys("abcdefg", 1), torch.device("cpu"))
    parts = sum(loss(logits[cut], Targets(labels[cut])).sum() for cut in (slice(0, 3), slice(3, 10)))
    assert torch.allclose(parts, loss(logits, Targets(labels)).sum())


COUNTS = {"mel": 10, "nv": 80, "bcc": 10, "df": 0}


def loss(balance: str) -> Loss:
    return Loss(Optim(balance=balance), COUNTS, torch.device("cpu"))


def test_class_weights_are_1_on_average_over_the_training_images():
    logits, labels = torch.randn(100, 4), torch.tensor([0] * 10 + [1] * 80 + [2] * 10)
    plain, weighted = loss("none")(logits, Targets(labels)), loss("weights")(logits, Targets(labels))
    weights = weighted / plain
    assert weights[0] == pytest.approx(100 / (3 * 10))
    assert weights[10] == pytest.approx(100 / (3 * 80))
    assert weights.mean() == pytest.approx(1.0)


def test_adjusted_logits_at_the_prior_are_as_sure_as_the_class_is_frequent():
    equal = torch.zeros(3, 4)
    found = loss("logit-adjust")(equal, Targets(torch.tensor([0, 1, -1])))
    assert (-found).exp()[:2].tolist() == pytest.approx([10 / 101, 80 / 101], rel=1e-5)  # the absent class counts as 1
    assert found[2] == 0


def test_the_loss_of_a_mixed_picture_is_shared_between_its_labels():
    logits, labels, shares = torch.randn(4, 4), torch.tensor([0, 1, 2, 2]), torch.tensor([0.3, 0.3, 1.0, 1.0])
    truth = mixed_targets(labels, shares)
    assert truth.partners.tolist() == [1, 0, 2, 2]
    assert truth.dominant_label().tolist() == [1, 0, 2, 2]
    own, other = (F.cross_entropy(logits, which, reduction="none") for which in (labels, truth.partners))
    assert torch.allclose(loss("none")(logits, truth), shares * own + (1 - shares) * other)
    for parts in (1, 2, 3):
        pieces = zip(logits.tensor_split(parts), truth.split(parts), strict=True)
        assert torch.allclose(torch.cat([loss("none")(*piece) for piece in pieces]), loss("none")(logits, truth))


def test_a_pair_with_a_picture_that_could_not_be_decoded_counts_for_nothing():
    truth = mixed_targets(torch.tensor([3, -1, 0, 1]), torch.tensor([0.7, 0.7, 0.7, 0.7]))
    found = loss("none")(torch.randn(4, 4), truth)
    assert found[:2].tolist() == [0, 0]
    assert (truth.dominant_label() >= 0).tolist() == [False, False, True, True]


def test_the_average_of_weights_equals_the_formula_and_takes_buffers():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
    average, expected = EMA(model, 0.5), None
    for step in range(1, 12):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        average.update(model, step)
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
    whole.update(model, 1)
    half = EMA(model, 0.9)
    half.model.load_state_dict(whole.model.state_dict())
    half.mark_restored()
    with torch.no_grad():
        model.weight.add_(1)
    whole.update(model, 2)
    half.update(model, 2)
    assert torch.equal(whole.model.weight, half.model.weight)
    assert not torch.equal(whole.model.weight, model.weight)
