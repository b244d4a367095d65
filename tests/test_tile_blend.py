"""Blending of tiles: as `hcf.decode` blends, the Triton kernel in the interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcf.decode.tiles import blend_tiles
from hcf_kernels.gpu.tile_blend import candidates, default_config, launch
from hcf_kernels.testing import assert_as_close_as_torch
from hcf_kernels.tile_blend import tile_blend, tile_blend_ref, tile_starts

# (C, h, w), image, overlap: one tile; no overlap; odd; primes, with three tiles over a column; one
# side shorter than a tile; half a tile of overlap
CASES = [
    ((1, 1, 1), (1, 1), 0),
    ((3, 4, 4), (4, 12), 0),
    ((2, 5, 7), (7, 15), 2),
    ((1, 7, 13), (11, 34), 3),
    ((3, 8, 8), (5, 21), 3),
    ((2, 4, 6), (9, 16), 2),
]


def arguments(
    tile: tuple[int, ...], size: tuple[int, int], overlap: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    rows, columns = (tile_starts(size[i], tile[i + 1], overlap) for i in (0, 1))
    count = len(rows) * len(columns)
    tiles = torch.randn(count, *tile, generator=torch.Generator().manual_seed(0))
    return tiles.to(dtype), *size, overlap


@pytest.mark.parametrize(("tile", "size", "overlap"), CASES, ids=str)
def test_triton_kernel_in_the_interpreter(
    tile: tuple[int, ...], size: tuple[int, int], overlap: int
) -> None:
    for dtype in (torch.float32, torch.float16):
        made = arguments(tile, size, overlap, dtype)
        for found in (launch(*made), launch(*made, config={"block": 8, "num_warps": 1})):
            assert found.is_contiguous()
            assert_as_close_as_torch(found, tile_blend_ref, *made)


def test_every_pixel_weighs_one() -> None:
    # tiles of a constant: its blend is that constant whatever covers a pixel
    for size in range(1, 40):
        tiles = arguments((1, 8, 8), (1, size), 3, torch.float32)[0].fill_(2.5)
        for found in (launch(tiles, 1, size, 3), tile_blend(tiles, 1, size, 3)):
            torch.testing.assert_close(found, torch.full((1, 1, size), 2.5))


@pytest.mark.parametrize(("height", "width", "overlap"), [(12, 19, 3), (6, 21, 4), (9, 10, 0)])
def test_it_blends_as_tiled_decoding_does(height: int, width: int, overlap: int) -> None:
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    tile, factor = 8, 2
    parts: list[Tensor] = []

    def run(z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(parts))
        parts.append(torch.randn(2, 3, tile * factor, tile * factor, generator=generator))
        return parts[-1]

    wanted = blend_tiles(run, latents, tile, overlap)
    stack = torch.stack(parts).flatten(1, 2)
    size = (height * factor, width * factor, overlap * factor)
    for found in (launch(stack, *size), tile_blend(stack, *size)):
        image = found.view(2, 3, *found.shape[1:])
        torch.testing.assert_close(image, wanted, rtol=1e-5, atol=1e-6)


def test_strided_tiles_are_taken_as_they_are_seen() -> None:
    tiles, *rest = arguments((4, 6, 8), (10, 13), 3, torch.float32)
    wide = torch.cat([tiles, tiles], dim=3)[..., ::2]
    last = tiles.to(memory_format=torch.channels_last)
    for view in (last, wide, tiles.transpose(2, 3).contiguous().transpose(2, 3)):
        for found in (launch(view, *rest), tile_blend(view, *rest)):
            assert found.is_contiguous()
            assert_as_close_as_torch(found, tile_blend_ref, view, *rest)


def test_three_tiles_can_cover_a_pixel() -> None:
    covered = [[k for k in tile_starts(34, 13, 3) if k <= x < k + 13] for x in range(34)]
    assert max(map(len, covered)) == 3 and covered[22] == [10, 20, 21]


def test_every_candidate_runs() -> None:
    made = arguments((1, 4, 16), (2, 40), 2, torch.float32)
    found = candidates(40)
    assert found[0] == default_config(40) and 6 <= len(found) <= 30
    for config in found:
        assert_as_close_as_torch(launch(*made, config=config), tile_blend_ref, *made)
    assert default_config(1024) == {"block": 512, "num_warps": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator(dtype: torch.dtype) -> None:
    tiles, *rest = arguments((3, 6, 8), (10, 13), 3, dtype)
    assert_as_close_as_torch(tile_blend(tiles, *rest), tile_blend_ref, tiles, *rest)
    for view in (tiles, tiles.to(memory_format=torch.channels_last)):
        torch.library.opcheck(tile_blend, (view, *rest))
    one = arguments((1, 4, 4), (4, 4), 0, dtype)
    torch.library.opcheck(tile_blend, one)


def test_it_compiles_without_a_graph_break() -> None:
    tiles, *rest = arguments((3, 6, 8), (10, 13), 3, torch.float32)

    def call(tiles: Tensor) -> Tensor:
        return tile_blend(tiles * 2, *rest) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tiles), call(tiles))


def test_what_does_not_fit_is_refused_with_its_shape() -> None:
    tiles, height, width, overlap = arguments((3, 6, 8), (10, 13), 3, torch.float32)
    with pytest.raises(ValueError, match="4 tiles of 6x8: .* 10x30 .* has 3 rows of 6"):
        tile_blend(tiles[:4], height, 30, overlap)
    with pytest.raises(ValueError, match="overlap by 4, .* half a tile"):
        tile_blend(tiles, height, width, 4)
    with pytest.raises(ValueError, match=r"float64 of \(\d+, 3, 6, 8\)"):
        tile_blend(tiles.double(), height, width, overlap)
    with pytest.raises(ValueError, match="of an image of 0x13"):
        tile_blend(tiles, 0, width, overlap)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for tile, size, overlap in [*CASES, ((3, 512, 512), (1024, 1024), 128),
                                ((6, 512, 512), (1536, 1080), 64)]:  # fmt: skip
        tiles, *rest = arguments(tile, size, overlap, dtype)
        for view in (tiles.cuda(), tiles.cuda().to(memory_format=torch.channels_last)):
            assert_as_close_as_torch(tile_blend(view, *rest), tile_blend_ref, view, *rest)
