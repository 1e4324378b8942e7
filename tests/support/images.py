"""Images for tests of views."""

import torch


def smooth_images(n: int = 4, height: int = 48, width: int = 64) -> torch.Tensor:
    """(n, 3, height, width) uint8, the same each time: smooth, so that interpolation changes little."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand((n, 3, height // 8, width // 8), generator=generator)
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8)
