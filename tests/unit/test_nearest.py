"""A training image is most like itself, by features that are kept beside the weights."""

import numpy as np
import torch

from harness.distributed.world import World
from harness.evaluation.nearest import find_nearest, training_features
from shards.reader import SplitReader


def colours(pooled: int) -> torch.nn.Sequential:
    """A model whose last layer is given the colours of a grid of cells."""
    return torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(pooled), torch.nn.Flatten(), torch.nn.Linear(3 * pooled**2, 7)
    )


def test_every_training_image_is_most_like_itself(dataset, tiny_config, tmp_path):
    train, world, model = SplitReader(dataset, "train"), World("fp32"), colours(8)
    known = training_features(model, train, tmp_path / "f.npy", tiny_config, world)
    assert known.shape == (sum(train.shard_sizes), 3 * 8 * 8)
    assert np.allclose(np.linalg.norm(known, axis=1), 1, atol=1e-2)
    found = find_nearest(model, train, known, tiny_config, world, 3)
    assert [near[0].place for near in found] == list(range(len(known)))
    for near in found:
        assert near[0].similarity > 0.999
        assert near[0].similarity >= near[1].similarity >= near[2].similarity


def test_features_of_another_number_of_images_are_made_anew(dataset, tiny_config, tmp_path):
    train, world, model = SplitReader(dataset, "train"), World("fp32"), colours(2)
    np.save(tmp_path / "f.npy", np.zeros((3, 12), np.float16))
    known = training_features(model, train, tmp_path / "f.npy", tiny_config, world)
    assert len(known) == sum(train.shard_sizes)
    assert np.array_equal(known, training_features(model, train, tmp_path / "f.npy", tiny_config, world))
    kept = np.zeros_like(known, np.float16)
    np.save(tmp_path / "f.npy", kept)
    assert not training_features(model, train, tmp_path / "f.npy", tiny_config, world).any()  # it is read, not made
