"""Memory and model FLOP utilisation: known numbers, and nothing where they are not known."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.models import ResNet50_Weights, ViT_B_16_Weights

from harness.config import Config, Data
from harness.training.efficiency import PEAKS, describe_mfu, mfu, peak_flops, training_flops


@pytest.mark.parametrize(("name", "weights"), [("resnet50", ResNet50_Weights), ("vit_b_16", ViT_B_16_Weights)])
def test_an_image_costs_three_forward_passes_of_what_torchvision_publishes(name, weights):
    published = weights.IMAGENET1K_V1.meta["_ops"] * 1e9  # multiplications
    assert training_flops(name, 1000, 224) == pytest.approx(3 * 2 * published, rel=0.05)


def test_peaks_are_of_the_card_the_precision_and_tf32():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16", True) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16", True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32", True) == 156e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "fp32", False) == 19.5e12
    assert peak_flops("Tesla P100-PCIE-16GB", "fp32", True) == 9.3e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 NVL", "NVIDIA L40", "NVIDIA A10G", "GeForce RTX 4090", "CPU"],
)
def test_a_card_that_is_not_listed_or_divided_has_no_known_peak(name):
    assert peak_flops(name, "bf16", True) is None


def test_no_card_is_taken_for_another():
    for name in PEAKS:
        assert sum(other in name for other in PEAKS) == 1


def test_utilisation_is_the_models_arithmetic_over_that_of_all_gpus(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card.name)
    config, world = Config(data=Data()), SimpleNamespace(device=torch.device("cuda"), precision="bf16", size=2)
    share = mfu(config, world, 7, images_per_s=4000.0)
    assert share == pytest.approx(4000 * training_flops("resnet50", 7, 224) / (2 * 989.4e12))
    assert describe_mfu(config, world, 7, 4000.0) == f"; {share:.0%} of the peak arithmetic of NVIDIA H100 80GB HBM3"
    card.name = "NVIDIA GeForce RTX 4090"
    assert mfu(config, world, 7, 4000.0) is None
    assert describe_mfu(config, world, 7, 4000.0) == ""
    assert mfu(config, SimpleNamespace(device=torch.device("cpu")), 7, 4000.0) is None
