"""Tile sizes of the convolution kernels: the default of a shape, and what a tuner should try.

B images, C channels, O output channels, P Q positions of the output that one kernel covers (those
of one parity where a folded weight writes four), k kernel size.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import triton

from hcf_kernels.tables import Config

MULTIPROCESSORS = 132  # of an H100; 108 of an A100
# (positions, output channels): (num_warps, num_stages). Those of 128 x 128 and less leave room for
# two programs a multiprocessor. wgmma takes at most 256 columns: of positions from boxes, where
# weights are its rows, else of output channels
TILES = {
    "boxes": {(256, 128): (8, 4), (128, 128): (8, 3), (128, 64): (4, 4), (64, 64): (4, 4)},
    "gather": {(128, 256): (8, 4), (128, 128): (8, 3), (128, 64): (4, 4), (64, 64): (4, 4)},
}
FLOAT32_TILES = {(64, 64): (4, 3), (32, 32): (4, 3)}  # without tensor cores
# masks over channels take registers too: the largest tile would spill on sm_80
LARGEST_MASKED = 128 * 128
LINE = 128  # bytes of K in a step: a line of shared memory
# of a multiprocessor of an H100 in a clock: products in 16 bits, bytes from the L2 cache; of the
# card in a clock: bytes of memory; clocks of one more launch. Taken from data sheets, not measured
PRODUCTS, L2_BYTES, MEMORY_BYTES, LAUNCH = 2048, 40, 1900, 3000


@dataclass(frozen=True)
class Shape:
    """`boxes`: whether x can be read as boxes by the tensor memory accelerator."""

    images: int
    channels: int
    outputs: int
    height: int
    width: int
    kernel: int
    parities: int
    element_bytes: int
    boxes: bool

    @property
    def positions(self) -> int:
        return self.images * self.height * self.width


def tiles_of(variant: str, element_bytes: int) -> dict[tuple[int, int], tuple[int, int]]:
    return FLOAT32_TILES if element_bytes == 4 else TILES[variant]


@functools.cache
def default_config(shape: Shape) -> Config:
    """Boxes wherever they can be read; the tile and split over K of the least `estimate`."""
    return _best(shape, "boxes" if shape.boxes else "gather")[0]


def candidates(shape: Shape) -> list[Config]:
    """What a tuner tries; the default is the first.

    Of each variant and tile: the split that the estimate prefers, also with a stage less, and none.
    """
    found = [default_config(shape)]
    for variant in ("boxes", "gather") if shape.boxes else ("gather",):
        best = _best(shape, variant)
        for tile in dict.fromkeys((c["block_m"], c["block_n"]) for c in best):
            split = next(c for c in best if (c["block_m"], c["block_n"]) == tile)
            shallow = {**split, "num_stages": split["num_stages"] - 1}
            for config in (split, shallow, {**split, "splits": 1}):
                found += [config] if config not in found else []
    return found


def _best(shape: Shape, variant: str) -> list[Config]:
    """Every tile and split of a variant, the least estimate first."""
    step = _step(shape)
    masked = variant == "gather" and shape.channels % step != 0
    tiles = {
        tile: how
        for tile, how in tiles_of(variant, shape.element_bytes).items()
        if not masked or tile[0] * tile[1] <= LARGEST_MASKED
    }
    choices = itertools.product(tiles, range(1, largest_split(shape) + 1))
    return [
        {
            "variant": variant,
            "block_m": tile[0],
            "block_n": tile[1],
            "block_k": step,
            "group": 8,
            "splits": splits,
            "num_warps": tiles[tile][0],
            "num_stages": tiles[tile][1],
        }
        for tile, splits in sorted(choices, key=lambda choice: estimate(shape, *choice))
    ]


def estimate(shape: Shape, tile: tuple[int, int], splits: int) -> float:
    """Clocks on an H100: products or loads from L2, whichever take longer, and partial sums."""
    block_m, block_n = tile
    tiles = shape.parities * triton.cdiv(shape.positions, block_m)
    programs = tiles * triton.cdiv(shape.outputs, block_n) * splits
    depth = triton.cdiv(shape.kernel**2 * shape.channels, splits) * shape.element_bytes
    per_byte = max(block_m * block_n / (2 * PRODUCTS), (block_m + block_n) / L2_BYTES)
    clocks = triton.cdiv(programs, MULTIPROCESSORS) * depth * per_byte
    if splits == 1:
        return clocks
    sums = 8 * splits * shape.parities * shape.positions * shape.outputs
    return clocks + LAUNCH + sums / MEMORY_BYTES


def largest_split(shape: Shape) -> int:
    """As many parts as leave each eight steps over K; none above 32."""
    steps = shape.kernel**2 * triton.cdiv(shape.channels, _step(shape))
    return max(1, min(32, steps // 8))


def box(block_m: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """(images, rows, columns) of a box of block_m positions: the fewest, then the squarest."""
    powers = [2**i for i in range(block_m.bit_length())]
    shapes = [
        (block_m // (rows * columns), rows, columns)
        for rows in powers
        for columns in powers
        if rows * columns <= block_m
    ]
    sizes = (images, height, width)

    def cost(size: tuple[int, int, int]) -> tuple[int, int, int]:
        boxes = 1
        for whole, part in zip(sizes, size, strict=True):
            boxes *= triton.cdiv(whole, part)
        return boxes, size[0], abs(size[1] - size[2])

    return min(shapes, key=cost)


def _step(shape: Shape) -> int:
    """Values of K in a step: a line or half a line where that divides C, else a padded one."""
    line = LINE // shape.element_bytes
    for step in (line, line // 2):
        if shape.channels % step == 0:
            return step
    least = 32 if shape.element_bytes == 1 else 16
    return max(least, min(line, triton.next_power_of_2(shape.channels)))
