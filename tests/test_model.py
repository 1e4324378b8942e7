"""Weights fit or are refused by name; whatever cannot be downloaded says where to place it."""

import hashlib
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import torch
from safetensors.torch import save_file

from harness.model import build_model, check_model, fetch, find_head, load_weights

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


@pytest.mark.parametrize("name", ["resnet51", "inception_v3", "fcn_resnet50"])
def test_a_model_that_is_no_classifier_of_ours_is_refused(name):
    with pytest.raises(ValueError, match=r"model\.name"):
        build_model(name, 7)


def test_a_model_that_cannot_take_the_picture_size_is_refused():
    check_model("resnet18", 7, 64)
    for name in ("vit_b_16", "alexnet"):
        with pytest.raises(ValueError, match=r"cannot take pictures of 32 pixels .'data\.image_size'"):
            check_model(name, 7, 32)


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
    with pytest.raises(ValueError, match="is no state dict"):
        load_weights(model, SMALL, str(tmp_path / "list.pth"))
    with pytest.raises(ValueError, match="It has: imagenet1k_v1"):
        load_weights(model, SMALL, "imagenet1k_v2")


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
