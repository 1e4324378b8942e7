"""Layers are counted from the images to the head, and each has the rate that follows by hand."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import StochasticDepth

from harness.config import Optim, read_config
from harness.model.build import build_model, outline
from harness.model.layers import head_weights, number_layers
from harness.model.optim import build_optimizer, checkpoint_bytes, set_rate
from harness.run.checkpoint import restore, save_step
from harness.run.folder import provenance
from harness.run.progress import Progress
from harness.run.provenance import read_checkpoint
from harness.training.preflight import check_parts, check_settings


def tiny() -> ResNet:
    """A stem, four blocks of one convolution each stage, a head: six layers."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)


def rates(model: nn.Module, optim: Optim, lr: float) -> dict[str, float]:
    optimizer = build_optimizer(model, optim)
    set_rate(optimizer, lr)
    of_weight = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    return {name: of_weight[id(weight)] for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_each_block_has_its_rate(name):
    found = rates(tiny(), Optim(name=name, layer_decay=0.5), 0.64)
    by_hand = {"conv1": 0.02, "bn1": 0.02, "layer1": 0.04, "layer2": 0.08, "layer3": 0.16, "layer4": 0.32, "fc": 0.64}
    assert len(found) == len(list(tiny().parameters()))
    for weight, rate in found.items():
        assert rate == pytest.approx(by_hand[weight.split(".")[0]], rel=1e-12), weight


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_without_decay_of_rates_every_weight_has_the_same_to_the_bit(name):
    assert set(rates(tiny(), Optim(name=name), 0.1).values()) == {0.1}


def test_biases_and_norms_are_spared_in_each_layer_as_without_layers():
    model = tiny()
    for optim in (Optim(), Optim(layer_decay=0.7)):
        decays = {id(w): g["weight_decay"] for g in build_optimizer(model, optim).param_groups for w in g["params"]}
        assert [decays[id(w)] for w in model.parameters()] == [0.05 if w.ndim > 1 else 0.0 for w in model.parameters()]


@pytest.mark.parametrize(
    ("name", "n_blocks", "places"),
    [
        ("resnet50", 16, {"bn1.bias": 0, "layer2.0.downsample.0.weight": 4, "layer4.2.bn3.bias": 16, "fc.bias": 17}),
        # The downsampling in front of a stage belongs to its first block, the norm behind the last to the head.
        ("convnext_tiny", 18, {"features.0.0.weight": 0, "features.2.1.weight": 4, "classifier.0.weight": 19}),
        (
            "efficientnet_b0",
            16,
            {"features.0.1.bias": 0, "features.1.0.block.0.0.weight": 1, "features.8.0.weight": 16},
        ),
        ("vit_b_32", 12, {"class_token": 0, "encoder.pos_embedding": 0, "encoder.ln.bias": 12, "heads.head.bias": 13}),
        ("swin_t", 12, {"features.2.reduction.weight": 3, "norm.weight": 12, "head.weight": 13}),
    ],
)
def test_blocks_are_counted_in_each_family(name, n_blocks, places):
    layers = number_layers(outline(name, 7))
    assert sorted(set(layers.values())) == list(range(n_blocks + 2))
    assert {weight: layers[weight] for weight in places} == places
    assert list(layers.values()) == sorted(layers.values())


def test_a_model_without_blocks_is_refused():
    for name in ("vgg11", "shufflenet_v2_x0_5"):
        with pytest.raises(ValueError, match=r"Set 'optim\.layer_decay' to 1"):
            number_layers(outline(name, 7))


@pytest.mark.slow  # .ci/run installs timm for these
def test_layers_of_timm_are_those_of_its_own_groups():
    from timm.optim import param_groups_layer_decay

    model = build_model("timm/resnet18d", 7)
    theirs = param_groups_layer_decay(model, 0.05, layer_decay=0.75)
    expected = {id(w): (g["lr_scale"], g["weight_decay"]) for g in theirs for w in g["params"]}
    groups = build_optimizer(model, Optim(layer_decay=0.75)).param_groups
    assert {id(w): (g["lr_scale"], g["weight_decay"]) for g in groups for w in g["params"]} == expected


def test_the_bytes_of_a_checkpoint_are_foretold_under_layer_decay():
    assert checkpoint_bytes(tiny(), Optim(layer_decay=0.7)) == checkpoint_bytes(tiny(), Optim())


def stepped(optim: Optim) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny()
    optimizer = build_optimizer(model, optim)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_settings_that_changed_since_a_checkpoint_count_and_other_groups_are_refused(tiny_config, dataset, tmp_path):
    model, optimizer = stepped(Optim(layer_decay=0.5, weight_decay=0.1))
    save_step(tmp_path, Progress(step=1), provenance(tiny_config, dataset), model, optimizer, None, 1)
    saved = read_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    changed = Optim(layer_decay=0.9, weight_decay=0.3)
    fresh, later = tiny(), None
    later = build_optimizer(fresh, changed)
    restore(saved, fresh, later, None)
    assert later.param_groups[0]["weight_decay"] == 0.3
    assert later.param_groups[-1]["lr_scale"] == pytest.approx(0.9**5)
    states = zip(optimizer.state.values(), later.state.values(), strict=True)
    assert all(torch.equal(one["exp_avg"], other["exp_avg"]) for one, other in states)
    with pytest.raises(ValueError, match=r"'optim\.layer_decay' was another"):
        restore(saved, fresh, build_optimizer(fresh, Optim()), None)


@pytest.mark.parametrize(("before", "now"), [("sgd", "adam"), ("adam", "sgd")])
def test_the_state_of_another_optimizer_is_refused_as_such(tiny_config, dataset, tmp_path, before, now):
    model, optimizer = stepped(Optim(name=before))
    save_step(tmp_path, Progress(step=1), provenance(tiny_config, dataset), model, optimizer, None, 1)
    saved = read_checkpoint(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(ValueError, match=r"is of another optimizer: 'optim\.name'"):
        restore(saved, model, build_optimizer(model, Optim(name=now)), None)


def drops(model: nn.Module) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


def test_drop_path_rises_to_what_was_asked_and_is_refused_where_there_is_none():
    assert drops(outline("convnext_tiny", 7, 0.3)) == pytest.approx([0.3 * block / 17 for block in range(18)])
    assert drops(outline("convnext_tiny", 7)) == drops(outline("convnext_tiny", 7, 0.1))  # its own
    assert max(drops(outline("efficientnet_b0", 7, 0.0))) == 0
    for name in ("resnet18", "mobilenet_v3_small", "swin_t"):  # the second takes the argument and does nothing
        with pytest.raises(ValueError, match=rf"'model\.drop_path' is 0\.2, but {name} has no drop path"):
            outline(name, 7, 0.2)


@pytest.mark.slow  # .ci/run installs timm for these
def test_drop_path_of_timm_is_set_and_refused():
    model = outline("timm/resnet18d", 7, 0.2)
    assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in model.modules()) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="timm/vgg11 has no drop path"):
        outline("timm/vgg11", 7, 0.2)


def test_a_head_is_found_or_refused():
    assert [tuple(weight.shape) for weight in head_weights(tiny())] == [(7, 512), (7,)]
    with pytest.raises(ValueError, match="no weights but its head's"):
        head_weights(nn.Sequential(nn.Flatten(), nn.Linear(12, 7)))


@pytest.mark.slow  # .ci/run installs timm for these
def test_a_model_with_two_heads_is_refused():
    with pytest.raises(ValueError, match=r"several heads \(head, head_dist\)"):
        head_weights(outline("timm/deit_tiny_distilled_patch16_224", 7))


def test_what_the_settings_do_not_allow_is_refused_before_the_start(tiny, capsys):
    def read(*words: str):
        return read_config(["--config", str(tiny), *words], tiny)

    for words, said in [
        (("--optim.layer_decay", "0"), "'optim.layer_decay' setting must be above 0"),
        (("--optim.freeze_epochs", "-1"), "'optim.freeze_epochs' setting must be at least 0"),
        (("--optim.freeze_epochs", "4"), "'optim.freeze_epochs' (4) must not exceed 'run.epochs' (3)"),
        (("--model.drop_path", "1"), "'model.drop_path' setting must be auto"),
        (("--model.head", "old"), "'model.head' setting must be one of auto, keep, new"),
    ]:
        with pytest.raises(SystemExit):
            read(*words)
        assert said in capsys.readouterr().err
    shufflenet = outline("shufflenet_v2_x0_5", 7)
    with pytest.raises(ValueError, match=r"Set 'optim\.layer_decay' to 1"):
        check_parts(read("--optim.layer_decay", "0.7"), shufflenet)
    (found,) = check_parts(read("--optim.freeze_epochs", "1"), shufflenet)
    assert (found.level, "without trained weights" in found.message) == ("warn", True)
    assert check_parts(read("--optim.freeze_epochs", "1", "--model.weights", "w.pth"), shufflenet) == []
    with pytest.raises(ValueError, match=r"'run\.compile'"):
        check_settings(read("--optim.freeze_epochs", "1", "--run.compile", "true"), torch.device("cpu"))
