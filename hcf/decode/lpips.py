"""LPIPS (Zhang et al., arXiv 1801.03924) on AlexNet, its weights from a safetensors file.

The file holds AlexNet's convolutions under torchvision's names,
`features.{0,3,6,8,10}.{weight,bias}`, and `lin{0..4}.weight` (1, C, 1, 1) of LPIPS 0.1. Nothing is
downloaded.
N images, H W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hcf.errors import InvalidArtifact, MissingDependency

# (in, out, kernel, stride, padding), its number among torchvision's layers, max-pooled before?
CONVOLUTIONS = (
    (3, 64, 11, 4, 2, 0, False),
    (64, 192, 5, 1, 2, 3, True),
    (192, 384, 3, 1, 1, 6, True),
    (384, 256, 3, 1, 1, 8, False),
    (256, 256, 3, 1, 1, 10, False),
)
# of the inputs in [-1, 1]: LPIPS' own form of ImageNet's mean and deviation
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 64  # pixels a side: below, the last layers see padding alone


class Lpips(nn.Module):
    """Perceptual distance of image pairs. Build with `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                str(number): nn.Conv2d(inner, outer, kernel, stride, padding)
                for inner, outer, kernel, stride, padding, number, _ in CONVOLUTIONS
            }
        )
        for i, (_, outer, *_rest) in enumerate(CONVOLUTIONS):
            self.add_module(f"lin{i}", nn.Conv2d(outer, 1, 1, bias=False))

    @classmethod
    def open(cls, weights: Path | None) -> Lpips:
        """Raises MissingDependency without a file, InvalidArtifact for one of other tensors."""
        if weights is None or not weights.is_file():
            raise MissingDependency(
                f"LPIPS needs AlexNet's weights, and there is {weights or 'no file of them'}",
                fix="give a safetensors file of AlexNet's features.* and LPIPS' lin0..4.weight",
            )
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        network = cls()
        try:
            network.load_state_dict(load_file(str(weights)))
        except (SafetensorError, RuntimeError) as error:
            raise InvalidArtifact(
                f"{weights} does not hold LPIPS on AlexNet: {error}",
                fix="save torchvision's AlexNet features.* with LPIPS' lin0..4.weight",
            ) from error
        return network.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """first, second (N, 3, H, W) in [-1, 1] -> distances (N,)"""
        total = first.new_zeros(len(first))
        for i, (a, b) in enumerate(zip(self._layers(first), self._layers(second), strict=True)):
            weighted = self.get_submodule(f"lin{i}")((_unit(a) - _unit(b)).square())
            total += weighted.mean((1, 2, 3))
        return total

    def _layers(self, image: Tensor) -> list[Tensor]:
        shift, scale = (image.new_tensor(t)[None, :, None, None] for t in (SHIFT, SCALE))
        x = (image - shift) / scale
        found = []
        for *_, number, pooled in CONVOLUTIONS:
            if pooled:
                x = nn.functional.max_pool2d(x, 3, 2)
            x = nn.functional.relu(self.features[str(number)](x))
            found.append(x)
        return found


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
