"""The feature map that is explained is the last one that says where; a model without one is refused by name."""

import sys

import pytest
import torch

from harness.config import Augment
from harness.model.build import build_model
from harness.report.heat_maps import check_heat_maps, draw_heat_maps, find_feature_map


@pytest.mark.parametrize(
    ("name", "size", "side"),
    [
        ("resnet18", 128, 4),
        ("resnet18", 64, 4),
        ("shufflenet_v2_x0_5", 128, 4),
        ("squeezenet1_1", 128, 4),
        ("mobilenet_v3_small", 128, 4),
    ],
)
def test_the_last_feature_map_that_says_where_is_found(name, size, side):
    model = build_model(name, 3)
    layer, shapes = find_feature_map(model, size), []
    assert layer is not None
    hook = layer.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(torch.zeros(2, 3, size, size))
    hook.remove()
    assert shapes[0][2] >= side
    assert shapes[0][2] < 3 * side


def test_a_model_that_sees_no_places_is_refused(monkeypatch):
    model = build_model("vit_b_32", 3)
    assert find_feature_map(model, 224) is None
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", sys)
    with pytest.raises(ValueError, match="vit_b_32 has none near its end"):
        check_heat_maps(model, "vit_b_32", 224)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[explain\]"'):
        check_heat_maps(model, "vit_b_32", 224)


@pytest.mark.slow  # .ci/run installs grad-cam for these
def test_a_model_that_looks_at_one_corner_is_seen_to_do_so():
    pytest.importorskip("pytorch_grad_cam")

    class Corner(torch.nn.Module):
        """Class 1 where the upper left quarter is bright."""

        def __init__(self):
            super().__init__()
            self.conv, self.look = torch.nn.Conv2d(3, 1, 8, stride=8), torch.nn.ReLU()
            torch.nn.init.ones_(self.conv.weight)
            self.head = torch.nn.Linear(64, 2)
            weight = torch.zeros(2, 8, 8)
            weight[1, :4, :4] = 1.0
            self.head.weight.data = weight.flatten(1)

        def forward(self, images):
            return self.head(self.look(self.conv(images)).flatten(1))

    import io

    import numpy as np
    from PIL import Image

    model, views = Corner().eval(), torch.zeros(1, 3, 64, 64)
    views[:, :, :32, :32] = 1.0
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    (heat,) = draw_heat_maps(model, views, [1], Augment())
    pixels = np.asarray(Image.open(io.BytesIO(heat))).astype(int)
    warmth = pixels[..., 0] - pixels[..., 2]  # red minus blue
    half = len(pixels) // 2
    assert warmth[:half, :half].mean() > warmth[half:, half:].mean() + 60
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
