"""A linear probe is scikit-learn's logistic regression, written into the head of the network that gave the features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from harness.config import Config
from harness.distributed.world import World
from harness.evaluation.features import split_features
from harness.evaluation.nearest import training_features
from harness.model.build import build_model
from harness.training.probe import MAX_ITERATIONS, NEVER, STRENGTHS, fit_head
from shards.reader import SplitReader

CLASSES = ("a", "b", "c")


def config(balance: str = "none", monitor: str = "balanced_accuracy") -> Config:
    default = Config()
    return replace(default, optim=replace(default.optim, balance=balance), run=replace(default.run, monitor=monitor))


def clouds(n: int, seed: int, n_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Features of overlapping classes, of other scales and places in each of 5 dimensions; class 0 is the commonest."""
    chance = np.random.default_rng(seed)
    labels = chance.choice(n_classes, n, p=[0.7, *[0.3 / (n_classes - 1)] * (n_classes - 1)])
    centres = np.random.default_rng(9).normal(size=(n_classes, 5)) * 1.2
    return ((centres[labels] + chance.normal(size=(n, 5))) * [1, 10, 100, 0.1, 1] + [0, 5, -50, 1, 2]).astype(
        np.float32
    ), labels


TRAIN, VAL = clouds(400, 0), clouds(200, 1)


def logits(fitted, features) -> np.ndarray:
    return features @ fitted.weight.T + fitted.bias


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_head_gives_scikit_learns_probabilities_of_features_as_they_are(n_classes):
    (features, labels), (val, val_labels) = clouds(400, 0, n_classes), clouds(200, 1, n_classes)
    fitted = fit_head(features, labels, val, val_labels, CLASSES[:n_classes], config())
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    own = LogisticRegression(C=fitted.c, max_iter=MAX_ITERATIONS).fit((features - mean) / deviation, labels)
    assert softmax(logits(fitted, val)) == pytest.approx(own.predict_proba((val - mean) / deviation), abs=5e-3)


def test_the_penalty_is_the_one_of_the_best_validation_score():
    fitted = fit_head(*TRAIN, *VAL, CLASSES, config())
    assert [c for c, _ in fitted.tried] == list(STRENGTHS)
    assert (fitted.c, fitted.score) == max(fitted.tried, key=lambda one: one[1])
    by_loss = fit_head(*TRAIN, *VAL, CLASSES, config(monitor="loss"))
    assert by_loss.score == min(score for _, score in by_loss.tried)


def test_the_order_of_the_images_does_not_matter():
    order = np.random.default_rng(3).permutation(len(TRAIN[0]))
    one, other = (
        fit_head(features, labels, *VAL, CLASSES, config())
        for features, labels in (TRAIN, (TRAIN[0][order], TRAIN[1][order]))
    )
    assert one.c == other.c
    assert logits(one, VAL[0]) == pytest.approx(logits(other, VAL[0]), abs=2e-2)


def test_logit_adjustment_takes_the_training_frequencies_out_of_the_head():
    plain, adjusted = (fit_head(*TRAIN, *VAL, CLASSES, config(balance, "loss")) for balance in ("none", "logit-adjust"))
    shares = np.bincount(TRAIN[1]) / len(TRAIN[1])
    at = plain.tried.index
    c = [c for c, _ in plain.tried]
    assert c == [c for c, _ in adjusted.tried]
    if plain.c == adjusted.c:
        assert plain.bias - adjusted.bias == pytest.approx(np.log(shares), abs=1e-5)
    recall = [np.mean(logits(one, VAL[0])[VAL[1] == 2].argmax(1) == 2) for one in (plain, adjusted)]
    assert recall[1] > recall[0]
    assert at(plain.tried[0]) == 0


def test_weights_find_more_of_rare_classes():
    recall = [
        np.mean(logits(fit_head(*TRAIN, *VAL, CLASSES, config(balance)), VAL[0])[VAL[1] == 1].argmax(1) == 1)
        for balance in ("none", "weights")
    ]
    assert recall[1] > recall[0]


def test_a_class_without_training_images_is_never_predicted():
    fitted = fit_head(*TRAIN, *VAL, (*CLASSES, "d"), config())
    assert fitted.bias[3] == NEVER
    assert (softmax(logits(fitted, VAL[0]))[:, 3] < 1e-6).all()


def test_one_class_alone_is_refused():
    with pytest.raises(ValueError, match=r"of one class \(b\)"):
        fit_head(TRAIN[0], np.ones_like(TRAIN[1]), *VAL, CLASSES, config())


def test_features_of_a_split_are_in_the_order_of_its_keys_with_their_labels(dataset, tiny_config, tmp_path):
    world = World("fp32")
    torch.manual_seed(0)
    model, train = build_model("shufflenet_v2_x0_5", 7), SplitReader(dataset, "train")
    features, labels = split_features(model, train, tiny_config, world)
    assert features.shape == (sum(train.shard_sizes), 1024)
    assert labels.tolist() == [label for shard in range(len(train.shards)) for label in train.table(shard).label]
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    assert training_features(model, train, tmp_path / "f.npy", tiny_config, world) == pytest.approx(unit, abs=1e-3)
