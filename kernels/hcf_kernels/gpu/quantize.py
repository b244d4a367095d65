"""Rounding to 8 bits in Triton: elementwise with a known scale, and a scale found for each row.

    quantize_kernel     x as rows of memory, whatever its format: a scale belongs to all of x, to a
                        column (tokens and channels_last), or to a row modulo n (NCHW)
    per_token_kernel    a program holds several whole rows: x is read once

A tile starts at an offset of 64 bits; inside it offsets are 32 bits. M rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu.quantized import to_codes
from hcf_kernels.quantize import empty_tokens
from hcf_kernels.tables import Config, Plan, find_config, shape_key

LARGEST_WIDTH = 16384  # of a padded row: 32 values a thread in 16 warps; twice that spills
TILE_VALUES = 4096
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
ONE_SCALE, OF_COLUMN, OF_ROW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, scale_ptr, rows, columns, channels, column_tiles,
    SCALE: tl.constexpr, INT8: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program: a tile of x (rows, columns); scale (), (columns,) or (channels,) of rows % channels

    Programs along a row of tiles come one after the other: there may be more than 65535 of either.
    """
    row_0 = (tl.program_id(0) // column_tiles) * BLOCK_R
    column_0 = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_C
    r = tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    there = c < columns - column_0
    inside = (r < rows - row_0) & there
    start = row_0.to(tl.int64) * columns + column_0
    offsets = r * columns + c
    v = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
    if SCALE == OF_COLUMN:
        scale = tl.load(scale_ptr + column_0 + c, mask=there, other=1.0)
    elif SCALE == OF_ROW:
        scale = tl.load(scale_ptr + (row_0 + r) % channels)
    else:
        scale = tl.load(scale_ptr)
    tl.store(y_ptr + start + offsets, to_codes(v / scale.to(tl.float32), INT8), mask=inside)


@triton.jit
def token_codes(v, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
    """v (rows, width) float32, 0 where there is nothing -> codes (rows, width), scale (rows,)"""
    amax = tl.max(tl.abs(v), axis=1)
    scale = tl.where(amax > 0.0, amax / (127.0 if INT8 else 448.0), 1.0)
    return to_codes(v / scale[:, None], INT8), scale


@triton.jit
def per_token_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, scale_ptr, M, D, x_m,
    INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M rows of x (M, D), x_m apart -> y (M, D), scale (M,)"""
    row_0 = tl.program_id(0) * BLOCK_M
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    there = r < M - row_0
    inside = there[:, None] & (d < D)
    x_ptr += row_0.to(tl.int64) * x_m
    v = tl.load(x_ptr + r[:, None] * x_m + d, mask=inside, other=0.0).to(tl.float32)
    codes, scale = token_codes(v, INT8)
    y_ptr += row_0.to(tl.int64) * D
    tl.store(y_ptr + r[:, None] * D + d, codes, mask=inside)
    tl.store(scale_ptr + row_0 + r, scale, mask=there)


@dataclass(frozen=True)
class Tiling:
    """x as it lies in memory: rows of columns, and what a scale belongs to.

    `channels`: of the axis that has a scale each.
    """

    rows: int
    columns: int
    scale: int
    channels: int


def tiling(x: Tensor, scale: Tensor, axis: int) -> Tiling:
    """Of a dense x, in any order of its axes."""
    size = x.shape[axis] if scale.ndim else 1
    if size == 1:
        return Tiling(1, x.numel(), ONE_SCALE.value, 1)
    inner = x.stride(axis)
    if inner == 1:
        return Tiling(x.numel() // size, size, OF_COLUMN.value, size)
    return Tiling(x.numel() // inner, inner, OF_ROW.value, size)


def default_config(shape: Tiling) -> Config:
    """TILE_VALUES in 8 warps, 16 a thread; columns that need no mask where 64 or more divide."""
    return _config(shape, TILE_VALUES, 8)


def candidates(shape: Tiling) -> list[Config]:
    """What a tuner tries; the default is the first."""
    found = [default_config(shape)]
    for values in (1024, 2048, 4096, 8192):
        found += [_config(shape, values, warps) for warps in (2, 4, 8) if values >= 256 * warps]
    return [config for i, config in enumerate(found) if config not in found[:i]]


def _config(shape: Tiling, values: int, num_warps: int) -> Config:
    exact = shape.columns & -shape.columns
    block_c = triton.next_power_of_2(min(shape.columns, values))
    if 64 <= exact and shape.columns <= values:
        block_c = exact
    block_r = max(1, min(values // block_c, triton.next_power_of_2(shape.rows)))
    return {"block_r": block_r, "block_c": block_c, "num_warps": num_warps}


def launch(
    x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1, config: Config | None = None
) -> Tensor:
    """Runs the kernel for `hcf::quantize`; x that has gaps in memory is copied first."""
    require_capability(x, dtype)
    y = torch.empty_like(x, dtype=dtype)
    if y.numel() == 0:
        return y
    source = x if x.stride() == y.stride() else torch.empty_like(x).copy_(x)
    shape = tiling(source, scale, axis)
    config = config or find_config("quantize", _key(x, shape), default_config(shape), x.device)
    column_tiles = triton.cdiv(shape.columns, config["block_c"])
    grid = (triton.cdiv(shape.rows, config["block_r"]) * column_tiles,)
    with torch.cuda.device_of(x):
        quantize_kernel[grid](
            source, y, scale.contiguous(), shape.rows, shape.columns, shape.channels, column_tiles,
            SCALE=shape.scale, INT8=dtype == torch.int8,
            BLOCK_R=config["block_r"], BLOCK_C=config["block_c"], num_warps=config["num_warps"],
        )  # fmt: skip
    return y


def default_row_config(rows: int, width: int) -> Config:
    """TILE_VALUES a program, 32 a thread; fewer rows where they would leave the GPU idle."""
    padded = triton.next_power_of_2(width)
    spread = 1 << (max(1, rows // PROGRAMS).bit_length() - 1)
    block_m = max(1, min(TILE_VALUES // padded, spread))
    return {"block_m": block_m, "num_warps": max(1, min(16, block_m * padded // 1024))}


def row_candidates(rows: int, width: int) -> list[Config]:
    """What a tuner tries for kernels whose programs hold whole rows; the default is the first."""
    found = [default_row_config(rows, width)]
    padded = triton.next_power_of_2(width)
    for block_m in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16):
            values = block_m * padded / (32 * warps)
            if 4 <= values <= 64 and block_m <= rows:
                found.append({"block_m": block_m, "num_warps": warps})
    return [config for i, config in enumerate(found) if config not in found[:i]]


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) -> (M, D) of equally spaced rows; a view where there is one"""
    rows = x.reshape(-1, x.shape[-1])
    if x.shape[-1] > LARGEST_WIDTH:
        raise ValueError(f"a row of {x.shape[-1]} values does not fit on chip: {LARGEST_WIDTH} do")
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def launch_per_token(
    x: Tensor, dtype: torch.dtype, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Runs the kernel for `hcf::quantize_per_token`."""
    require_capability(x, dtype)
    rows = as_rows(x)
    y, scale = empty_tokens(x, dtype)
    if y.numel() == 0:
        return y, scale
    m, d = rows.shape
    default = default_row_config(m, d)
    config = config or find_config("quantize_per_token", shape_key((m, d), x.dtype), default,
                                   x.device)  # fmt: skip
    with torch.cuda.device_of(x):
        per_token_kernel[(triton.cdiv(m, config["block_m"]),)](
            rows, y, scale, m, d, rows.stride(0),
            INT8=dtype == torch.int8, BLOCK_M=config["block_m"],
            BLOCK_D=triton.next_power_of_2(d), num_warps=config["num_warps"],
        )  # fmt: skip
    return y, scale


def require_capability(x: Tensor, dtype: torch.dtype) -> None:
    """RuntimeError where the GPU that holds x has no e4m3."""
    if dtype != torch.float8_e4m3fn or not x.is_cuda:
        return
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) < (8, 9):
        raise RuntimeError(f"e4m3 needs compute capability 8.9, found {major}.{minor}: use int8")


def _key(x: Tensor, shape: Tiling) -> str:
    return shape_key((shape.rows, shape.columns), ("one", "column", "row")[shape.scale], x.dtype)


def plan(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1) -> Plan:
    """How `hcf::quantize` can run; arguments as there."""
    shape = tiling(torch.empty_like(x), scale, axis)
    return Plan(_key(x, shape), candidates(shape), partial(_run, x, scale, dtype, axis))


def _run(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int, config: Config) -> Tensor:
    return launch(x, scale, dtype, axis, config)


def plan_per_token(x: Tensor, dtype: torch.dtype) -> Plan:
    """How `hcf::quantize_per_token` can run; arguments as there."""
    m, d = as_rows(x).shape
    return Plan(
        shape_key((m, d), x.dtype),
        row_candidates(m, d),
        lambda config: launch_per_token(x, dtype, config),
    )


PLANS = {"quantize": plan, "quantize_per_token": plan_per_token}


def _variants() -> list[Variant]:
    found = []
    for int8, suffix, out, archs in (
        (True, "int8", "*i8", (80, 90)),
        (False, "e4m3", "*fp8e4nv", (90,)),
    ):
        pointers = {"x_ptr": "*bf16", "y_ptr": out, "scale_ptr": "*fp32"}
        for name, scale, block in (("tensor", 0, (1, 4096)), ("column", 1, (64, 64)),
                                   ("row", 2, (1, 4096))):  # fmt: skip
            sizes = {n: "i32" for n in ("rows", "columns", "channels", "column_tiles")}
            constants = {"SCALE": scale, "INT8": int8, "BLOCK_R": block[0], "BLOCK_C": block[1]}
            found.append(
                Variant(
                    f"quantize.{name}_{suffix}", quantize_kernel,
                    pointers | sizes | {n: "constexpr" for n in constants}, constants,
                    ("x_ptr", "y_ptr", "scale_ptr", "rows", "columns", "channels"), num_warps=8,
                    architectures=archs,
                )
            )  # fmt: skip
        for block_m, block_d, warps in ((4, 1024, 4), (1, 8192, 8), (1, LARGEST_WIDTH, 16)):
            constants = {"INT8": int8, "BLOCK_M": block_m, "BLOCK_D": block_d}
            sizes = {n: "i32" for n in ("M", "D", "x_m")}
            found.append(
                Variant(
                    f"quantize.per_token_{block_d}_{suffix}", per_token_kernel,
                    pointers | sizes | {n: "constexpr" for n in constants}, constants,
                    ("x_ptr", "y_ptr", "scale_ptr", "M", "D", "x_m"), num_warps=warps,
                    architectures=archs,
                )
            )  # fmt: skip
    return found


VARIANTS = _variants()
