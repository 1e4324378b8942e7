"""Losses are of each image and add up; rare classes count as the settings say; mixed images have two labels."""

import pytest
import torch
import torch.nn.functional as F

from harness.config import Optim
from harness.model.loss import Loss, Targets, mixed_targets

COUNTS = {"mel": 10, "nv": 80, "bcc": 10, "df": 0}


def loss(balance: str) -> Loss:
    return Loss(Optim(balance=balance), COUNTS, torch.device("cpu"))


def test_the_loss_is_a_sum_so_that_shares_add_up():
    logits, labels = torch.randn(10, 7), torch.randint(0, 7, (10,))
    loss = Loss(Optim(label_smoothing=0.1), dict.fromkeys("abcdefg", 1), torch.device("cpu"))
    parts = sum(loss(logits[cut], Targets(labels[cut])).sum() for cut in (slice(0, 3), slice(3, 10)))
    assert torch.allclose(parts, loss(logits, Targets(labels)).sum())


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


def test_the_loss_of_a_mixed_image_is_shared_between_its_labels():
    logits, labels, shares = torch.randn(4, 4), torch.tensor([0, 1, 2, 2]), torch.tensor([0.3, 0.3, 1.0, 1.0])
    targets = mixed_targets(labels, shares)
    assert targets.partners.tolist() == [1, 0, 2, 2]
    assert targets.dominant_label().tolist() == [1, 0, 2, 2]
    own, other = (F.cross_entropy(logits, which, reduction="none") for which in (labels, targets.partners))
    assert torch.allclose(loss("none")(logits, targets), shares * own + (1 - shares) * other)
    for parts in (1, 2, 3):
        pieces = zip(logits.tensor_split(parts), targets.split(parts), strict=True)
        assert torch.allclose(torch.cat([loss("none")(*piece) for piece in pieces]), loss("none")(logits, targets))


def test_a_pair_with_an_image_that_could_not_be_decoded_counts_for_nothing():
    targets = mixed_targets(torch.tensor([3, -1, 0, 1]), torch.tensor([0.7, 0.7, 0.7, 0.7]))
    found = loss("none")(torch.randn(4, 4), targets)
    assert found[:2].tolist() == [0, 0]
    assert (targets.dominant_label() >= 0).tolist() == [False, False, True, True]
