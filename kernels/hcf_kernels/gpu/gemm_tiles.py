"""Tiles of a product y (M, N) = a (M, K) b (N, K)^T: stated defaults, and what a tuner tries.

A configuration:

    block_m, block_n, block_k    tile of y, and the step in K: 128 bytes of a row for wgmma, one
                                 swizzled line; 64 before, for want of registers
    num_warps, num_stages
    group_m                      tiles of y that share columns of b are taken this many rows at once
    persistent                   programs a multiprocessor that go over all tiles; 0: one a tile
    tma                          operands and y through tensor descriptors; else through pointers
    splits                       parts of K, added up in order by a second kernel
    strips                       parts of the tile's columns that are finished one after the other
    max_num_imprecise_acc        FP8 on Hopper: see `hcf_kernels.fp8_gemm`

A descriptor made on the device costs a program about a microsecond, so it goes with persistent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from hcf_kernels.tables import Config

SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
# (block_m, block_n, num_warps): share of the largest tile's rate, an estimate until it is measured
TILES = {(128, 256, 8): 1.0, (128, 128, 8): 0.85, (64, 128, 4): 0.65, (64, 64, 4): 0.45}
SMALL = (64, 64, 4)
SPLITS = (1, 2, 3, 4, 6, 8)
# products of 16 bits that a multiprocessor makes while it moves a byte to or from the L2 cache, and
# while the second kernel of a split product starts
PRODUCTS_A_BYTE = 85
PRODUCTS_A_LAUNCH = 8_000_000


@dataclass(frozen=True)
class Shape:
    """y (M, N) = a (M, K) b (N, K)^T on a GPU; of GEGLU b is (2N, K).

    aligned: rows of a, b and y begin at multiples of 16 values, and so of 16 bytes: copies without
    registers in between, and descriptors, need that. sm: compute capability, 90.
    """

    m: int
    n: int
    k: int
    operand: torch.dtype
    aligned: bool = True
    geglu: bool = False
    sm: int = 90
    multiprocessors: int = 132

    @property
    def descriptors(self) -> bool:
        """Whether the GPU is of those with large shared memory that read by descriptors."""
        return 90 <= self.sm < 120

    @property
    def products(self) -> int:
        """Columns of the product for one of y."""
        return 2 if self.geglu else 1


def default_config(shape: Shape) -> Config:
    """The tile and parts of K that should take least time, by waves of programs and bytes moved."""
    if shape.operand == torch.float32:
        return _without_tensor_cores(shape)
    tiles = TILES if shape.aligned else {SMALL: TILES[SMALL]}
    found = [
        (_cost(shape, *tile[:2], rate, splits), tile, splits)
        for tile, rate in tiles.items()
        for splits in SPLITS
    ]
    _, (block_m, block_n, warps), splits = min(found)
    return _config(shape, block_m, block_n, warps, splits)


def candidates(shape: Shape) -> list[Config]:
    """What a tuner tries; the default is the first."""
    default = default_config(shape)
    found = [default]
    if shape.operand == torch.float32:
        sizes = [(32, 32), (32, 64), (64, 64)]
        tried = [
            {**default, "block_m": m, "block_n": n // shape.products, "splits": splits}
            for m, n in sizes
            for splits in (1, 4)
        ]
        return found + [config for config in tried if config not in found]
    splits = default["splits"]
    tried = [{**default, "num_stages": max(2, default["num_stages"] - 1)}]
    tried += [{**default, "group_m": rows} for rows in (4, 16)]
    if not shape.aligned:
        return found + tried
    tried.append({**default, "tma": shape.descriptors and not default["tma"]})
    for tile in [*TILES, (128, 128, 4), (256, 128, 8), (64, 256, 4)]:
        made = _config(shape, *tile, splits)
        tried += [made, {**made, "persistent": 0, "tma": False}, _config(shape, *tile, 1)]
    tried.append(_config(shape, 128, 128, 4, splits, programs=2))
    if shape.operand == torch.float8_e4m3fn:
        exact = _config(shape, 128, 128, 8, splits)
        tried.append({**exact, "strips": 4, "max_num_imprecise_acc": 128})
    for config in tried:
        found += [config] if config not in found else []
    return found


def fitted(config: Config, shape: Shape) -> Config:
    """`config` through pointers where descriptors cannot read the operands or write y."""
    return config if shape.aligned and shape.descriptors else {**config, "tma": False}


def _cost(shape: Shape, block_m: int, block_n: int, rate: float, splits: int) -> float:
    """Products that one multiprocessor has time for until all is done."""
    columns = shape.n * shape.products
    tiles = triton.cdiv(shape.m, block_m) * triton.cdiv(columns, block_n)
    steps = triton.cdiv(shape.k, splits)
    waves = triton.cdiv(tiles * splits, shape.multiprocessors)
    time = waves * block_m * block_n * (steps + 64) / rate
    if splits > 1:
        moved = 8 * splits * shape.m * columns / shape.multiprocessors
        time += (PRODUCTS_A_LAUNCH + PRODUCTS_A_BYTE * moved) * 2 / shape.operand.itemsize
    return time


def _config(
    shape: Shape, block_m: int, block_n: int, warps: int, splits: int, programs: int = 1
) -> Config:
    """`block_n` counts columns of the product: of GEGLU half of them are of y.

    `programs` a multiprocessor share its memory, where there is more than one tile for each.
    """
    columns = shape.n * shape.products
    tiles = triton.cdiv(shape.m, block_m) * triton.cdiv(columns, block_n) * splits
    wgmma = shape.aligned and shape.descriptors
    persistent = wgmma and tiles > shape.multiprocessors * programs
    large = block_m * block_n >= 128 * 32 * warps  # 128 sums a thread
    strips = max(1, block_n // shape.products // 32) if wgmma else 8 if large else 1
    width = shape.k * shape.operand.itemsize
    row = 128 if wgmma and (width % 128 == 0 or width > 1024) else 64  # bytes
    budget = SHARED_BYTES.get(shape.sm, 99) * 1024 // programs
    if persistent:  # strips of y and of the residual stay beside the operands of the next tile
        budget -= 8 * block_m * block_n // (strips * shape.products) + 1024
    buffers = budget // (row * (block_m + block_n))
    return {
        "block_m": block_m,
        "block_n": block_n // shape.products,
        "block_k": row // shape.operand.itemsize,
        "num_warps": warps,
        # one stage of a product without wgmma is in registers
        "num_stages": max(2, min(4, buffers if wgmma else buffers + 1)),
        "group_m": 8,
        "persistent": programs if persistent else 0,
        "tma": persistent,
        "splits": splits,
        "strips": strips,
        "max_num_imprecise_acc": None,
    }


def _without_tensor_cores(shape: Shape) -> Config:
    """float32 as torch takes it, without TF32: tiles that leave registers for both operands."""
    config = _config(replace(shape, aligned=False), 64, 64, 4, 1)
    return {**config, "block_k": 32, "num_stages": 2, "persistent": 0}
