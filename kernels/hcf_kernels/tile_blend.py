"""An image from tiles that overlap and fade into each other, in one pass.

    y = sum w v / sum w      over the tiles that cover a pixel; w = (row weight) (column weight)

Along a side of length n tiles of length t start at min(k (t - overlap), n - t), k = 0, 1, ...: all
whole, the last at the end of the side. A tile's weight rises as (p + 1/2) / overlap over its first
`overlap` pixels where a tile stands before it, falls likewise over its last ones where one follows,
and is 1 elsewhere. So the last two may overlap by more than they fade, and dividing by the sum of
weights is what makes them add to 1. At most three tiles of a side cover a pixel (one of them the
last), two as a rule: the overlap is at most half a tile.

Bytes that must move: tiles once, y once.

N tiles, rows and then columns of the grid; C channels, of all images; h w a tile, H W the image.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tile_blend_ref(tiles: Tensor, height: int, width: int, overlap: int) -> Tensor:
    """tiles (N, C, h, w) -> (C, H, W), summed in float32 or better"""
    h, w = tiles.shape[-2:]
    kind = torch.promote_types(tiles.dtype, torch.float32)
    total = tiles.new_zeros(tiles.shape[1], max(height, h), max(width, w), dtype=kind)
    weight = torch.zeros_like(total[0])
    places = product(tile_starts(height, h, overlap), tile_starts(width, w, overlap))
    for tile, (top, left) in zip(tiles, places, strict=True):
        rows, columns = _ramp(top, height, h, overlap), _ramp(left, width, w, overlap)
        mask = (rows[:, None] * columns).to(total)
        total[:, top : top + h, left : left + w] += tile * mask
        weight[top : top + h, left : left + w] += mask
    return (total / weight)[:, :height, :width].to(tiles.dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles along a side begin: the first at 0; the last ends at `size`, or is the first."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(start: int, size: int, tile: int, overlap: int) -> Tensor:
    """Weights (tile,) float64 along one side."""
    weights = torch.ones(tile, dtype=torch.float64)
    up = (torch.arange(overlap) + 0.5).double() / max(1, overlap)
    if start > 0:
        weights[:overlap] *= up
    if start + tile < size:
        weights[tile - overlap :] *= up.flip(0)
    return weights


@torch.library.custom_op("hcf::tile_blend", mutates_args=())
def tile_blend(tiles: Tensor, height: int, width: int, overlap: int) -> Tensor:
    """tiles (N, C, h, w) of a grid, row by row -> (C, height, width) in their dtype, contiguous

    A side shorter than a tile has one tile, whose rest is left out. Of several images at once C is
    B * C. Raises ValueError for a number of tiles or an overlap that does not fit.
    """
    _check(tiles, height, width, overlap)
    return tile_blend_ref(tiles, height, width, overlap).contiguous()


@tile_blend.register_fake
def _(tiles: Tensor, height: int, width: int, overlap: int) -> Tensor:
    _check(tiles, height, width, overlap)
    return tiles.new_empty(tiles.shape[1], height, width)


@tile_blend.register_kernel("cuda")
def _(tiles: Tensor, height: int, width: int, overlap: int) -> Tensor:
    from hcf_kernels.gpu.tile_blend import launch

    _check(tiles, height, width, overlap)
    return launch(tiles, height, width, overlap)


def _check(tiles: Tensor, height: int, width: int, overlap: int) -> None:
    if tiles.ndim != 4 or min(tiles.shape) < 1 or tiles.dtype not in DTYPES:
        raise ValueError(
            "tile_blend takes float32, float16 or bfloat16 of (N, C, h, w), not "
            f"{tiles.dtype} of {tuple(tiles.shape)}"
        )
    count, _, h, w = tiles.shape
    if height < 1 or width < 1 or not 0 <= overlap <= min(h, w) // 2:
        raise ValueError(
            f"tiles of {h}x{w} that overlap by {overlap}, of an image of {height}x{width}: "
            "an overlap of 0 to half a tile, an image of 1x1 or more"
        )
    rows, columns = (len(tile_starts(*side, overlap)) for side in ((height, h), (width, w)))
    if count != rows * columns:
        raise ValueError(
            f"{count} tiles of {h}x{w}: an image of {height}x{width} with an overlap of {overlap} "
            f"has {rows} rows of {columns}"
        )
