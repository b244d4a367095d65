"""A function of images over overlapping tiles, blended by Gaussian weights.

Applied to a denoiser at every step, all tiles share one noise field and agree where they overlap
(Jimenez, "Mixture of Diffusers", arXiv 2302.02412). Memory is one tile's. The weights fall to zero
at a tile's border: at any other value the blend would jump there by that share of what two tiles
disagree on.

B batch, C channels, H W.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SPREAD = 0.2  # standard deviation of the weight, as a share of the tile


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First cells of tiles that cover `length`; the last tile ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def tile_weight(height: int, width: int) -> Tensor:
    """(H, W) Gaussian less its value at the border, above 0 in every cell"""
    border = math.exp(-0.5 * (0.5 / SPREAD) ** 2)
    sides = []
    for length in (height, width):
        x = (torch.arange(length) + 0.5) / length - 0.5
        sides.append((-0.5 * (x / SPREAD) ** 2).exp() - border)
    return sides[0][:, None] * sides[1][None, :]


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int = 1
) -> Tensor:
    """x (B, C, H, W) -> (B, C', factor H, factor W); `function` maps a tile likewise.

    Raises ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap={overlap} must be at least 0 and below tile={tile}")
    height, width = x.shape[-2:]
    rows, columns = min(tile, height), min(tile, width)
    weight = tile_weight(rows * factor, columns * factor).to(x.device, torch.float32)
    total, weights = None, torch.zeros(height * factor, width * factor, device=x.device)
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = function(x[..., top : top + rows, left : left + columns])
            if total is None:
                shape = (*part.shape[:2], *weights.shape)
                total = torch.zeros(shape, device=x.device)
            across = slice(left * factor, (left + columns) * factor)
            down = slice(top * factor, (top + rows) * factor)
            total[..., down, across] += part.float() * weight
            weights[down, across] += weight
    assert total is not None
    return (total / weights).to(x.dtype)
