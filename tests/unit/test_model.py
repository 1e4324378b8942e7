"""Weights fit or are refused by name; whatever cannot be downloaded says where to place it."""

import hashlib
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from harness.config import Config, Optim
from harness.distributed.world import World
from harness.model.build import build_model, check_input_size, find_head, outline
from harness.model.convert import convert
from harness.model.loss import Loss, Targets
from harness.model.optim import build_optimizer
from harness.model.weights import check_file, fetch, load_weights, locate_weights
from harness.run.console import LOGGER
from harness.training.state import TrainState
from harness.training.step import STRIDES, backward_parts, layout_explained, optimizer_step

SMALL = "shufflenet_v2_x0_5"


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("efficientnet_b0", "classifier.1"),
        ("convnext_tiny", "classifier.2"),
        ("vit_b_32", "heads.head"),
    ],
)
def test_the_head_of_each_family_is_replaced(name, head):
    model = build_model(name, 7)
    assert find_head(model) == head
    assert model.get_submodule(head).out_features == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("resnet18", 32), ("resnext50_32x4d", 32), ("wide_resnet50_2", 32), ("densenet121", 32), ("vgg11_bn", 32)),
        *(("mobilenet_v3_small", 32), ("efficientnet_v2_s", 32), ("convnext_tiny", 32), ("regnet_y_400mf", 32)),
        *(
            ("shufflenet_v2_x0_5", 32),
            ("squeezenet1_1", 32),
            ("mnasnet0_5", 32),
            ("swin_t", 32),
            ("vit_b_32", 224),
            ("maxvit_t", 224),
            ("inception_v3", 80),
            ("googlenet", 32),
        ),
    ],
)
def test_each_family_of_torchvision_trains_a_step_and_evaluates(name, size):
    check_input_size(outline(name, 7), name, size)
    one_step(build_model(name, 7), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvisions_own_weights_of_models_with_other_heads_give_its_own_logits(name, tmp_path):
    """Their files hold the auxiliary heads, too, which are left out; what comes out is what torchvision's model says."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, weights=None, aux_logits=True, transform_input=True, init_weights=True)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = build_model(name, 1000)
    assert "unexpected" in load_weights(ours, name, str(tmp_path / "theirs.safetensors"))
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def one_step(model, size):
    """A training step lowers the loss of its own batch, and the model predicts one image as it predicts four."""
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 6])
    optimizer, config = build_optimizer(model, Optim(lr=1e-4)), Config()
    loss_fn = Loss(Optim(), dict.fromkeys("abcdefg", 1), torch.device("cpu"))
    state = TrainState(model=model.train(), ddp_model=model, optimizer=optimizer, loss_fn=loss_fn)
    before = [weight.detach().clone() for weight in model.parameters()]
    config = replace(config, data=replace(config.data, global_batch_size=4))
    sums, _ = optimizer_step(config, World("fp32"), state, images, Targets(labels), 1e-4)
    assert 0.5 < sums[0] / 4 < 10
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with torch.inference_mode():
        logits = model.eval()(images)
        assert logits.shape == (4, 7)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-3, atol=1e-4)


def masks_of(seed: int, step: int, rank: int, micro_batch: int = 0) -> torch.Tensor:
    """What dropout lets through of 4 images, (4, 3 * 4 * 4) of 0 or 2, in a step of one of two ranks."""
    seen, config, world = [], Config(), World("fp32")
    config = replace(config, data=replace(config.data, global_batch_size=8), run=replace(config.run, seed=seed))
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 7))
    model[1].register_forward_hook(lambda module, images, dropped: seen.append(dropped.detach()))
    optimizer, loss_fn = (
        build_optimizer(model, Optim()),
        Loss(Optim(), dict.fromkeys("abcdefg", 1), torch.device("cpu")),
    )
    state = TrainState(model=model, ddp_model=model, optimizer=optimizer, loss_fn=loss_fn)
    world.rank, world.size = rank, 2
    views, targets = torch.ones(4, 3, 4, 4), Targets(torch.zeros(4, dtype=torch.int64))
    for _ in backward_parts(config, world, state, views, targets, step, micro_batch):
        pass
    return torch.cat(seen)


def test_dropout_differs_between_ranks_seeds_steps_and_micro_batches_and_repeats_at_a_resume():
    first = masks_of(seed=0, step=6, rank=0)
    assert torch.equal(first, masks_of(seed=0, step=6, rank=0))
    for other in (masks_of(0, 6, rank=1), masks_of(0, 7, rank=0), masks_of(1, 6, rank=0), masks_of(1, 5, rank=0)):
        assert not torch.equal(first, other)
    halves = masks_of(0, 6, 0, micro_batch=2)
    assert not torch.equal(halves[:2], halves[2:])


@pytest.mark.slow  # .ci/run installs timm for these
def test_a_model_of_timm_is_built_trained_and_takes_timms_weights(tmp_path):
    timm = pytest.importorskip("timm", reason='needs pip install -e ".[timm]"')
    model = build_model("timm/resnet18d", 7)
    one_step(model, 32)
    torch.save(timm.create_model("resnet18d", pretrained=False).state_dict(), tmp_path / "weights.pth")
    assert "tensors matched, 2 missing (fc.weight, fc.bias), 0 unexpected; a new head" in load_weights(
        model, "timm/resnet18d", str(tmp_path / "weights.pth")
    )
    with pytest.raises(ValueError, match="timm has no model 'resnet18z'"):
        build_model("timm/resnet18z", 7)
    with pytest.raises(ValueError, match=r"belong to torchvision, but 'model\.name' is timm/resnet18d"):
        load_weights(model, "timm/resnet18d", "imagenet1k_v2")


def test_a_model_of_timm_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install -e \"\.\[timm\]\""):
        build_model("timm/resnet18d", 7)


@pytest.mark.parametrize("name", ["resnet51", "fcn_resnet50"])
def test_a_model_that_is_no_classifier_of_ours_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.name"):
        build_model(name, 7)


def test_a_model_that_cannot_take_the_image_size_is_refused():
    check_input_size(outline("resnet18", 7), "resnet18", 64)
    for name in ("vit_b_16", "alexnet"):
        with pytest.raises(ValueError, match=r"cannot take images of 32 pixels .'data\.image_size'"):
            check_input_size(outline(name, 7), name, 32)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_of_weights_fills_everything_but_a_head_of_other_size(tmp_path, ending):
    donor = build_model(SMALL, 1000)
    path = tmp_path / f"weights.{ending}"
    (torch.save if ending == "pth" else save_file)(donor.state_dict(), path)
    model = build_model(SMALL, 7)
    before = model.fc.weight.clone()
    said = load_weights(model, SMALL, str(path))
    assert "a new head" in said
    assert torch.equal(model.fc.weight, before)
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, donor.state_dict()[name])
    whole = build_model(SMALL, 1000)
    assert "a new head" not in load_weights(whole, SMALL, str(path))
    assert torch.equal(whole.fc.weight, donor.fc.weight)


def test_weights_of_another_model_are_refused_with_names(tmp_path):
    torch.save(build_model("resnet18", 7).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"does not fit ShuffleNetV2.*conv1\.0\.weight"):
        load_weights(build_model(SMALL, 7), SMALL, str(tmp_path / "other.pth"))


def test_weights_of_a_deeper_network_of_the_same_names_are_refused(tmp_path):
    path = tmp_path / "deeper.pth"
    torch.save(build_model("resnet34", 7).state_dict(), path)
    for check in (
        lambda: load_weights(build_model("resnet18", 7), "resnet18", str(path)),
        lambda: check_file(path, outline("resnet18", 7), "resnet18"),
    ):
        with pytest.raises(
            ValueError, match=r"larger network than 'model\.name' resnet18: it has 32 more layers .layer1\.2\.conv1"
        ):
            check()
    with pytest.raises(ValueError, match=r"of a larger network, with 32 more layers, layer1\.2\.conv1 the first"):
        convert(path, "resnet18", tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_a_file_is_checked_by_names_and_shapes_as_it_is_loaded(tmp_path, kind):
    path = tmp_path / f"weights.{kind.split()[-1]}"
    found = build_model(SMALL, 1000).state_dict()
    if kind == "safetensors":
        save_file(found, path)
    else:
        torch.save(found, path, _use_new_zipfile_serialization=kind == "pth")
    assert check_file(path, outline(SMALL, 7), SMALL) == load_weights(build_model(SMALL, 7), SMALL, str(path))


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path):
    found = build_model(SMALL, 7).state_dict()
    found["conv1.0.weight"] = torch.zeros(24, 1, 3, 3)
    torch.save(found, tmp_path / "grey.pth")
    with pytest.raises(ValueError, match=r"1 of .* conv1\.0\.weight is \(24, 1, 3, 3\) instead of \(24, 3, 3, 3\)"):
        load_weights(build_model(SMALL, 7), SMALL, str(tmp_path / "grey.pth"))


def test_a_file_that_runs_code_when_unpickled_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="Cannot read the weights file"):
        load_weights(build_model(SMALL, 7), SMALL, str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_bad_files_and_names_are_refused(tmp_path):
    model = build_model(SMALL, 7)
    with pytest.raises(FileNotFoundError, match="imagenet1k_v1, imagenet1k_v2, none, or a file"):
        load_weights(model, SMALL, "imagenet")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="Cannot read the weights file"):
        load_weights(model, SMALL, str(tmp_path / "bad.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="is not a state dict"):
        load_weights(model, SMALL, str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match="one of imagenet1k_v1, none, or a file"):
        load_weights(model, SMALL, "imagenet1k_v2")


def test_locating_weights_says_where_they_are_or_will_be_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert locate_weights(SMALL, "none") is None
    (tmp_path / "mine.pth").write_bytes(b"")
    assert locate_weights(SMALL, str(tmp_path / "mine.pth")).path == tmp_path / "mine.pth"
    assert locate_weights("timm/resnet18d", str(tmp_path / "mine.pth")).url is None
    found = locate_weights("resnet50", "imagenet1k_v2")
    assert found.path.parent == tmp_path / "hub" / "checkpoints"
    assert found.url.startswith("https://")
    assert found.url.endswith(found.path.name)
    assert not (tmp_path / "hub").exists()
    with pytest.raises(ValueError, match="belong to torchvision"):
        locate_weights("timm/resnet18d", "imagenet1k_v1")


def test_training_from_scratch_changes_nothing():
    model = build_model(SMALL, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "from scratch" in load_weights(model, SMALL, "none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture
def server(tmp_path):
    """A local HTTP server that offers the weights of SMALL under a name that ends in their SHA-256's start."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(build_model(SMALL, 1000).state_dict(), folder / "weights.pth")
    data = (folder / "weights.pth").read_bytes()
    (folder / f"small-{hashlib.sha256(data).hexdigest()[:8]}.pth").write_bytes(data)
    (folder / "small-00000000.pth").write_bytes(data)
    served = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served, folder
    served.shutdown()


def test_weights_are_downloaded_once_and_checked(server, tmp_path):
    served, folder = server
    name = next(path.name for path in folder.glob("small-*") if "00000000" not in path.name)
    url = f"http://127.0.0.1:{served.server_port}/{name}"
    path = fetch(url, tmp_path / "cache" / name, SMALL)
    assert path.read_bytes() == (folder / "weights.pth").read_bytes()
    (folder / name).unlink()
    assert fetch(url, path, SMALL) == path  # from the cache
    wrong = tmp_path / "cache" / "small-00000000.pth"
    with pytest.raises(ConnectionError, match="place it at"):
        fetch(f"http://127.0.0.1:{served.server_port}/small-00000000.pth", wrong, SMALL)
    assert not wrong.exists()


def test_weights_that_cannot_be_downloaded_say_where_to_place_them(server, tmp_path, monkeypatch):
    import torchvision

    served, _ = server
    url = f"http://127.0.0.1:{served.server_port}/gone-12345678.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    entry = torchvision.models.get_model_weights(SMALL).IMAGENET1K_V1
    monkeypatch.setattr(entry, "_value_", torchvision.models.Weights(url, None, {}))
    with pytest.raises(ConnectionError) as caught:
        load_weights(build_model(SMALL, 7), SMALL, "imagenet1k_v1")
    assert f"{tmp_path / 'hub' / 'checkpoints' / 'gone-12345678.pth'}" in str(caught.value)
    assert "--model.weights none" in str(caught.value)


def test_gradients_in_another_layout_become_advice_and_other_warnings_stay(caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)

    def first_step() -> None:
        with layout_explained(is_first=True):
            warnings.warn(f"{STRIDES}. This may indicate grad was not created according to", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        first_step()
    assert "try --run.channels_last off" in caplog.text
    assert STRIDES not in caplog.text


def test_the_words_of_torchs_warning_are_those_of_this_torch():
    """They stand in its library, not in Python."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    python = library.with_name("libtorch_python.so")
    assert any(STRIDES.encode() in file.read_bytes() for file in (library, python) if file.is_file())
