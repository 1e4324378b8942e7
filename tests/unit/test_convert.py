"""Weights of another implementation become ours tensor by tensor, or are refused with the first that does not fit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from harness.config import Config, Model
from harness.config.sections import MEAN
from harness.model.build import build_model
from harness.model.convert import convert, main, match_tensors
from harness.model.normalization import with_normalization
from harness.model.weights import Origin, load_weights, read_origin

SMALL = "shufflenet_v2_x0_5"


class Theirs(nn.Module):
    """A tiny network as somebody else wrote it: other names, more classes, attributes in the order of use."""

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(4)
        self._depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self._bn1 = nn.BatchNorm2d(4)
        self._fc = nn.Linear(4, 11)

    def forward(self, images):
        maps = self._bn1(self._depthwise(self._bn0(self._conv_stem(images)).relu()))
        return self._fc(maps.mean((2, 3)))


def ours() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    block = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 11))


def trained(model: nn.Module) -> nn.Module:
    """Statistics and weights that are not those of a fresh model, each of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(9))
    return model.eval()


def test_a_network_with_other_names_gives_the_same_outputs():
    theirs, mine = trained(Theirs()), ours().eval()
    found, wanted = theirs.state_dict(), mine.state_dict()
    pairs = match_tensors(found, wanted, "4")
    assert pairs["1.1.running_var"] == "_bn1.running_var"
    mine.load_state_dict({name: found[other] for name, other in pairs.items()})
    images = torch.randn(3, 3, 16, 16)
    assert torch.equal(mine(images), theirs(images))


def test_the_head_may_have_other_classes_or_be_missing_and_counters_may_be_missing():
    found, wanted = Theirs().state_dict(), ours().state_dict()
    wanted["4.weight"], wanted["4.bias"] = torch.zeros(7, 4), torch.zeros(7)
    assert match_tensors(found, wanted, "4")["4.bias"] == "_fc.bias"
    old = {name: tensor for name, tensor in found.items() if not name.endswith("num_batches_tracked")}
    assert len(match_tensors(old, wanted, "4")) == len(old)
    headless = {name: tensor for name, tensor in found.items() if not name.startswith("_fc")}
    assert "4.weight" not in match_tensors(headless, wanted, "4")
    assert len(match_tensors(headless, wanted, "4")) == len(headless)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda found: found | {"_bn0.bias": torch.zeros(5)},
            r"_bn0\.bias is \(5,\), and 0\.1\.bias of the model is \(4,\)",
        ),
        (lambda found: dict(sorted(found.items())), r"_bn0\.bias is \(4,\), and 0\.0\.weight"),
        (lambda found: found | {"extra.weight": torch.zeros(2)}, r"15 tensors, and the model 14.*is extra\.weight"),
        (lambda found: dict(list(found.items())[:-4]), r"9 tensors, and the model 12.*1\.1\.running_var"),
        (lambda found: found | {"_fc.weight": torch.zeros(11, 5)}, r"_fc\.weight is \(11, 5\), and 4\.weight"),
    ],
)
def test_the_first_tensor_that_differs_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        match_tensors(change(Theirs().state_dict()), ours().state_dict(), "4")


def test_names_that_contradict_the_order_are_refused():
    """Two modules of the same shapes, exchanged: by the order alone each would get the other's weights."""
    wanted = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "fc": nn.Linear(2, 3)}).state_dict()
    found = {"b.weight": wanted["b.weight"], "b.bias": wanted["b.bias"], "c.weight": wanted["a.weight"]}
    found |= {"c.bias": wanted["a.bias"], "fc.weight": wanted["fc.weight"], "fc.bias": wanted["fc.bias"]}
    with pytest.raises(ValueError, match=r"b\.weight stands where the model has a\.weight, and one of the two names"):
        match_tensors(found, wanted, "fc")
    swapped = {
        name.replace("weight", "x").replace("bias", "weight").replace("x", "bias"): t for name, t in found.items()
    }
    with pytest.raises(ValueError, match=r"b\.bias stands where|is \(2, 2\)"):
        match_tensors(swapped, wanted, "fc")


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"their_{name}": tensor for name, tensor in model.state_dict().items()}


def test_a_converted_file_is_taken_as_weights_and_says_what_it_is(tmp_path, capsys):
    donor = build_model(SMALL, 1000)
    torch.save({"epoch": 3, "state_dict": renamed(donor)}, tmp_path / "theirs.pth")
    out = tmp_path / "ours.safetensors"
    assert main([str(tmp_path / "theirs.pth"), "--like", SMALL, str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "their_conv1.0.weight -> conv1.0.weight (24, 3, 3, 3)" in lines
    assert "tensors by order and shape; mean [0.485, 0.456, 0.406]" in lines[-1]
    written = load_file(out)
    assert all(torch.equal(tensor, written[name]) for name, tensor in donor.state_dict().items())
    assert read_origin(out).model == SMALL
    with safe_open(out, framework="pt") as file:
        assert len(file.metadata()["source_sha256"]) == 64
    assert "a new head" in load_weights(build_model(SMALL, 7), SMALL, str(out))
    with pytest.raises(ValueError, match=rf"is of {SMALL}, and 'model\.name' is shufflenet_v2_x1_0"):
        load_weights(build_model("shufflenet_v2_x1_0", 7), "shufflenet_v2_x1_0", str(out))


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path, capsys):
    torch.save(renamed(build_model("resnet18", 7)), tmp_path / "other.pth")
    save_file(renamed(build_model(SMALL, 7)), tmp_path / "sorted.safetensors")
    out = str(tmp_path / "out.safetensors")
    for words, said in [
        (("other.pth", "--like", SMALL), r"does not fit shufflenet_v2_x0_5: their_conv1.weight is (64, 3, 7, 7)"),
        (("sorted.safetensors", "--like", SMALL), "its order tells nothing, as .safetensors files are sorted"),
        (("nowhere.pth", "--like", SMALL), "Cannot read the weights file"),
        (("other.pth", "--like", "resnet51"), "must be a torchvision classifier"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / words[0]), *words[1:], out])
        assert caught.value.code == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        convert(tmp_path / "other.pth", "resnet18", tmp_path / "out.pth")
    convert(tmp_path / "other.pth", "resnet18", tmp_path / "out.safetensors")
    with pytest.raises(FileExistsError, match="Name another"):
        convert(tmp_path / "other.pth", "resnet18", tmp_path / "out.safetensors")


def test_a_file_that_runs_code_when_unpickled_is_not_converted(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": {"weight": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="Cannot read the weights file"):
        convert(tmp_path / "evil.pth", SMALL, tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()


def test_the_mean_and_deviation_of_a_file_are_those_of_its_images(tmp_path):
    model = build_model(SMALL, 7)
    words = {"model": SMALL, "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.5, 0.5]"}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata=words)
    config = Config(model=Model(name=SMALL, weights=str(tmp_path / "w.safetensors")))
    assert with_normalization(config).augment.normalization == ((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert read_origin(tmp_path / "w.safetensors") == Origin()
    assert with_normalization(config).augment.normalization[0] == MEAN
    for mean in ("[1, 2]", "{", '["a", 1, 1]', "null"):
        save_file(model.state_dict(), tmp_path / "w.safetensors", metadata={"mean": mean})
        with pytest.raises(ValueError, match="Cannot read the weights file"):
            with_normalization(config)


def test_a_head_is_kept_only_where_it_is_of_the_same_classes(tmp_path):
    donor, classes = build_model(SMALL, 3), ("mel", "nv", "bcc")
    path = tmp_path / "w.safetensors"
    save_file(donor.state_dict(), path, metadata={"classes": json.dumps(classes)})

    def load(wanted: tuple[str, ...], head: str) -> tuple[str, bool]:
        model = build_model(SMALL, len(wanted))
        said = load_weights(model, SMALL, str(path), wanted, head)
        return said, torch.equal(model.fc.weight, donor.fc.weight)

    for head in ("auto", "keep"):
        said, kept = load(classes, head)
        assert kept
        assert "new head" not in said
    said, kept = load(classes, "new")
    assert said.endswith("; a new head")
    assert not kept
    said, kept = load(("nv", "mel", "bcc"), "auto")  # as many, in another order
    assert "a new head, since the one of the file is of other classes (mel, nv, bcc instead of nv, mel, bcc)" in said
    assert not kept
    with pytest.raises(ValueError, match=r"'model\.head' is keep, but .* is of other classes"):
        load(("nv", "mel", "bcc"), "keep")
    with pytest.raises(ValueError, match=r"has another size \(fc\.weight is \(3, 1024\) instead of \(7, 1024\)\)"):
        load(tuple("abcdefg"), "keep")
    save_file(dict(list(donor.state_dict().items())[:-2]), path)
    with pytest.raises(ValueError, match=r"is not there \(fc\.weight\)"):
        load(classes, "keep")


@pytest.mark.slow  # .ci/run installs timm for these
def test_a_model_of_timm_takes_a_converted_file_with_its_own_mean(tmp_path):
    name = "timm/tf_efficientnet_lite0"
    donor = build_model(name, 1000)
    torch.save(renamed(donor), tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", name, tmp_path / "w.safetensors")
    assert read_origin(tmp_path / "w.safetensors").mean == (0.5, 0.5, 0.5)
    model = build_model(name, 1000)
    load_weights(model, name, str(tmp_path / "w.safetensors"), head="keep")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), donor.eval()(images))
    with pytest.raises(
        ValueError, match=r"says that it is of timm/tf_efficientnet_lite0"
    ):  # same tensors, other padding
        load_weights(
            build_model("timm/efficientnet_lite0", 7), "timm/efficientnet_lite0", str(tmp_path / "w.safetensors")
        )
