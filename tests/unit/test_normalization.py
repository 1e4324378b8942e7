"""Images are normalised as the model's weights expect, wherever they are seen, and a checkpoint says how."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from harness.config import Augment, Config, Model, Run, flat, load_config, read_config, to_yaml
from harness.config.sections import MEAN, STD
from harness.data.augment import evaluation_views, plain_view, training_view
from harness.model.normalization import with_normalization
from harness.report.gallery import augmented_rows
from harness.run import checkpoint
from harness.run.folder import provenance
from harness.run.progress import Progress
from harness.run.provenance import read_checkpoint
from support.images import smooth_images

HALF = (0.5, 0.5, 0.5)


def in_colours(view: torch.Tensor, augment: Augment) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in augment.normalization)
    return view * std + mean


@pytest.mark.parametrize("kind", ["none", "dihedral8", "spins:2"])
def test_every_view_is_normalised_by_the_settings(kind):
    images, places = smooth_images(), torch.arange(4)
    usual, own = Augment(), Augment(mean=HALF, std=(0.25, 0.5, 1.0))
    views = [list(evaluation_views(kind, images, places, 0, augment, 32)) for augment in (usual, own)]
    for augment, found in zip((usual, own), views, strict=True):
        found += [plain_view(images, augment, 32), training_view(images, places, 0, 0, augment, 32)]
    for one, other in zip(*views, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(in_colours(one, usual), in_colours(other, own))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--augment.mean", "[0.5,0.5]"], "mean"),
        (["--augment.mean", "[128,128,128]"], "from 0 to 1"),
        (["--augment.std", "[0,1,1]"], "above 0"),
        (["--augment.std", "half"], "std"),
    ],
)
def test_a_mean_and_deviation_that_are_none_are_refused(tiny, capsys, words, refused):
    with pytest.raises(SystemExit):
        read_config(["--config", str(tiny), *words], tiny)
    assert refused in capsys.readouterr().err


def test_named_numbers_are_kept_in_the_settings_file(tiny, tmp_path):
    config = read_config(["--config", str(tiny), "--augment.mean", "[0.5,0.5,0.5]"], tiny)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert flat(load_config(tmp_path / "saved.yaml")) == flat(config)
    assert load_config(tmp_path / "saved.yaml").augment.normalization == (HALF, STD)


def test_a_models_own_numbers_stand_where_nothing_is_named(monkeypatch):
    monkeypatch.setattr("harness.model.normalization.normalization_of", lambda name, weights: (HALF, HALF))
    assert with_normalization(Config()).augment.normalization == (HALF, HALF)
    named = Config(augment=Augment(mean=(0.1, 0.2, 0.3)))
    assert with_normalization(named).augment.normalization == ((0.1, 0.2, 0.3), HALF)


def test_torchvisions_models_and_unknown_ones_leave_the_settings_as_they_are():
    for name in ("resnet50", "timm/there_is_none", "nonsense"):
        config = Config()
        config = replace(config, model=replace(config.model, name=name))
        assert with_normalization(config) == config


def test_torchvisions_weights_say_their_own():
    config = Config(model=Model(name="efficientnet_v2_l", weights="imagenet1k_v1"))
    assert with_normalization(config).augment.normalization == (HALF, HALF)


def test_a_run_that_continues_keeps_its_numbers_without_its_file_of_weights(tmp_path):
    torch.save({}, weights := tmp_path / "gone.pth")
    run = tmp_path / "run"
    config = Config(model=Model(weights=str(weights)), run=Run(folder=str(run)))
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(replace(config, augment=Augment(mean=HALF, std=HALF))))
    weights.unlink()
    assert with_normalization(config).augment.normalization == (HALF, HALF)
    for other in (replace(config.model, weights="none"), replace(config.model, name="resnet18")):
        assert with_normalization(replace(config, model=other)).augment.normalization == (MEAN, STD)
    (run / "config.yaml").write_text("damaged: [")
    assert with_normalization(config).augment.normalization == (MEAN, STD)


def test_mixed_pairs_are_shown_as_they_are_mixed(tiny_config, dataset):
    shown = {}
    for prob in (0.0, 1.0):
        config = replace(tiny_config, augment=replace(tiny_config.augment, mixup_prob=0.0, cutmix_prob=prob))
        shown[prob] = augmented_rows(dataset, config, 2)
    for (_, alone), (_, mixed) in zip(shown[0.0], shown[1.0], strict=True):
        assert np.array_equal(alone[0], mixed[0])  # the plain view
        assert any((one != other).any() for one, other in zip(alone[1:], mixed[1:], strict=True))


@pytest.mark.slow  # .ci/run installs timm for these
def test_timms_models_say_their_own():
    config = Config()
    config = replace(config, model=replace(config.model, name="timm/tf_efficientnet_lite0"))
    assert with_normalization(config).augment.normalization == (HALF, HALF)


def test_a_checkpoint_says_how_and_one_of_before_means_imagenets(tiny_config, dataset, tmp_path):
    config = replace(tiny_config, augment=replace(tiny_config.augment, mean=HALF))
    origin = provenance(config, dataset)
    assert (origin.mean, origin.std) == (HALF, STD)
    model = torch.nn.Linear(2, 2)
    checkpoint.save_best(tmp_path, Progress(), origin, model)
    folder = next((tmp_path / "checkpoints").iterdir())
    assert read_checkpoint(folder).provenance.mean == HALF
    content = json.loads((folder / "progress.json").read_text())
    del content["provenance"]["mean"], content["provenance"]["std"]
    (folder / "progress.json").write_text(json.dumps(content))
    assert read_checkpoint(folder).provenance.mean == MEAN


def test_a_page_shows_the_same_colours_whatever_the_normalisation(tiny_config, dataset):
    shown = []
    for mean in ("auto", HALF):
        config = replace(tiny_config, augment=replace(tiny_config.augment, mean=mean))
        shown.append(augmented_rows(dataset, config, 2))
    for (_, one), (_, other) in zip(*shown, strict=True):
        assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(one, other, strict=True))
