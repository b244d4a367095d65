"""Blending of tiles in Triton: each pixel gathers from the tiles that cover it and is written once.

A program has a piece of one row, in all channels. Which tiles can cover a pixel follows from its
place, see `_cover`; of the rows of tiles a program branches past those that do not. Tiles are read
by their strides, so they may lie in memory as they like. Offsets along a row of the grid are 32
bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.tables import Config, Plan, find_config, shape_key
from hcf_kernels.tile_blend import tile_starts


@triton.jit
def _cover(x, WHICH: tl.constexpr, count, size, tile, overlap):  # type: ignore[no-untyped-def]
    """Of the three tiles that can cover x along a side, tile WHICH: (k, place in it, weight)

    Starts are a stride of half a tile or more apart: x is covered by tile q = x // stride, by the
    one before, and by the last, which stands off the stride. The weight is 0 where it is not.
    """
    if WHICH == 2:
        k = x * 0 + (count - 1)
        p = x - (size - tile)
        known = (p >= 0) & (p < tile)
    else:
        stride = tile - overlap
        k = x // stride - WHICH
        p = x - k * stride
        known = (k >= 0) & (k < count - 1) & (p < tile)
    fade = tl.maximum(overlap, 1).to(tl.float32)
    weight = tl.where((k > 0) & (p < overlap), (p + 0.5) / fade, 1.0)
    down = (k < count - 1) & (p >= tile - overlap)
    weight = tl.where(down, weight * ((tile - p - 0.5) / fade), weight)
    return k, p, tl.where(known, weight, 0.0)


@triton.jit
def tile_blend_kernel(  # type: ignore[no-untyped-def]
    tiles_ptr, y_ptr, height, width, channels, rows, columns, tile_h, tile_w, overlap, plane,
    stride_n, stride_c, stride_h, stride_w, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (piece, row) of y (C, height, width); plane is height * width."""
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    size_h, size_w = tl.maximum(height, tile_h), tl.maximum(width, tile_w)
    column_0, p_0, w_0 = _cover(x, 0, columns, size_w, tile_w, overlap)
    column_1, p_1, w_1 = _cover(x, 1, columns, size_w, tile_w, overlap)
    column_2, p_2, w_2 = _cover(x, 2, columns, size_w, tile_w, overlap)
    at_0 = column_0 * stride_n + p_0 * stride_w
    at_1 = column_1 * stride_n + p_1 * stride_w
    at_2 = column_2 * stride_n + p_2 * stride_w
    inside = x < width
    there_0, there_1, there_2 = inside & (w_0 > 0.0), inside & (w_1 > 0.0), inside & (w_2 > 0.0)
    # beyond the image no tile need be
    weight_w = tl.where(inside, w_0 + w_1 + w_2, 1.0)
    y_ptr += y.to(tl.int64) * width
    for _ in range(channels):
        total = tl.zeros((BLOCK,), tl.float32)
        weight_h = 0.0
        for i in tl.static_range(3):
            row, p, w = _cover(y, i, rows, size_h, tile_h, overlap)
            weight_h += w
            if w > 0.0:
                first = tiles_ptr + (row * columns).to(tl.int64) * stride_n
                first += p.to(tl.int64) * stride_h
                line = w_0 * tl.load(first + at_0, mask=there_0, other=0.0).to(tl.float32)
                line += w_1 * tl.load(first + at_1, mask=there_1, other=0.0).to(tl.float32)
                line += w_2 * tl.load(first + at_2, mask=there_2, other=0.0).to(tl.float32)
                total += w * line
        out = total / (weight_h * weight_w)
        tl.store(y_ptr + x, out.to(y_ptr.dtype.element_ty), mask=inside)
        tiles_ptr += stride_c
        y_ptr += plane


def default_config(width: int) -> Config:
    """A row in pieces of at most 512 pixels, 4 a thread: it keeps nine pointers for each."""
    block = min(512, max(32, triton.next_power_of_2(width)))
    return {"block": block, "num_warps": max(1, block // 128)}


def candidates(width: int) -> list[Config]:
    """What a tuner tries; the default is the first."""
    found = [default_config(width)]
    for block in (64, 128, 256, 512, 1024):
        for warps in (1, 2, 4, 8):
            if 32 <= block // warps <= 128:
                found.append({"block": block, "num_warps": warps})
    return [config for i, config in enumerate(found) if config not in found[:i]]


def launch(
    tiles: Tensor, height: int, width: int, overlap: int, config: Config | None = None
) -> Tensor:
    """Runs the kernel for `hcf::tile_blend`; arguments as there."""
    _, channels, tile_h, tile_w = tiles.shape
    rows = len(tile_starts(height, tile_h, overlap))
    columns = len(tile_starts(width, tile_w, overlap))
    if columns * tiles.stride(0) >= 2**31 or height >= 2**16:
        raise ValueError(
            f"{columns} tiles of {tuple(tiles.shape[1:])} in a row, a height of {height}: 2**31 "
            "values and 65535 at most; blend fewer images at once"
        )
    y = tiles.new_empty(channels, height, width)
    key = _key(tiles, height, width, overlap)
    config = config or find_config("tile_blend", key, default_config(width), tiles.device)
    with torch.cuda.device_of(tiles):
        tile_blend_kernel[(triton.cdiv(width, config["block"]), height)](
            tiles, y, height, width, channels, rows, columns, tile_h, tile_w, overlap,
            height * width, *tiles.stride(),
            BLOCK=config["block"], num_warps=config["num_warps"],
        )  # fmt: skip
    return y


def _key(tiles: Tensor, height: int, width: int, overlap: int) -> str:
    return shape_key(tuple(tiles.shape), (height, width), overlap, tiles.dtype)


def plan(tiles: Tensor, height: int, width: int, overlap: int) -> Plan:
    """How `hcf::tile_blend` can run; arguments as there."""
    return Plan(
        _key(tiles, height, width, overlap),
        candidates(width),
        lambda config: launch(tiles, height, width, overlap, config),
    )


PLANS = {"tile_blend": plan}


def _variant(name: str, kind: str, channels_last: bool) -> Variant:
    pointers = {"tiles_ptr": kind, "y_ptr": kind}
    sizes = {n: "i32" for n in ("height", "width", "channels", "rows", "columns", "tile_h",
                                "tile_w", "overlap", "plane", "stride_n", "stride_c",
                                "stride_h")}  # fmt: skip
    inner = {"stride_w": "i32" if channels_last else "constexpr"}
    constants: dict[str, Any] = {} if channels_last else {"stride_w": 1}
    return Variant(
        f"tile_blend.{name}", tile_blend_kernel,
        pointers | sizes | inner | {"BLOCK": "constexpr"}, constants | {"BLOCK": 512},
        ("tiles_ptr", "y_ptr", "width", "tile_w", "overlap", "plane", "stride_n"),
    )  # fmt: skip


VARIANTS = [
    _variant("nchw_bf16", "*bf16", channels_last=False),
    _variant("nhwc_bf16", "*bf16", channels_last=True),
    _variant("nchw_fp32", "*fp32", channels_last=False),
]
