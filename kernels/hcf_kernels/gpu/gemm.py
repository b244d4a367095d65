"""Matrix product of 8 or 16 bits with its epilogue in Triton.

    y = activation(scale_a * scale_b * (a b^T) + bias) + residual

Work item: (part of K, tile of y). One program an item, or as many programs as the GPU holds, each
taking every n-th item. Without parts the tile is finished in registers; with them, sums of each
part go to memory in int32 or float32 and a second kernel adds them in order: the result does not
depend on which program ends first. a (M, K), b (N, K), y (M, N).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu import cuda_gemm
from hcf_kernels.gpu.gemm_tiles import Shape, candidates, default_config, fitted
from hcf_kernels.tables import Config, find_config, shape_key

__all__ = ["Shape", "VARIANTS", "candidates", "default_config", "launch"]

ACTIVATION = {"none": 0, "silu": 1, "gelu": 2}
ADD_M, ADD_N = 8, 128  # tile of the kernel that adds the parts of K


@triton.jit
def tile_of(item, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row and column of a tile: GROUP_M tiles down, then one to the right, and so on."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = item // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    row = first + (item % in_group) % height
    return row * BLOCK_M, (item % in_group) // height * BLOCK_N


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    source, row_0, k_0, rows, K, stride,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(BLOCK_R, BLOCK_K) of a matrix (rows, K), zero past its last column.

    Past its last row that row comes again: what is made of it is not stored.
    """
    if TMA:
        tile = source.load([row_0, k_0])
    else:
        r = tl.minimum(tl.arange(0, BLOCK_R), rows - 1 - row_0)[:, None]
        k = tl.arange(0, BLOCK_K)[None, :]
        pointers = source + row_0.to(tl.int64) * stride + k_0 + (r * stride + k)
        if EVEN_K:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=k < K - k_0, other=0.0)
    return tile


@triton.jit
def gelu(v):  # type: ignore[no-untyped-def]
    """v Phi(v), torch's exact form, to 4e-8.

    As max(v, 0) - a Phi(-a), a = |v|. log2(2 Phi(-a)) is a polynomial in a without a constant,
    fitted for the least largest error of Phi(-a): half the instructions of the error function.
    Past 6 that product is below 1e-8.
    """
    a = tl.minimum(tl.abs(v), 6.0, propagate_nan=tl.PropagateNan.ALL)
    h = a * -2.83505739e-06 + 3.93791444e-05
    h = h * a - 1.86185962e-04
    h = h * a - 1.36925110e-04
    h = h * a + 7.06340841e-03
    h = h * a - 5.24961721e-02
    h = h * a - 4.59208198e-01
    h = h * a - 1.15110521
    return tl.maximum(v, 0.0) - 0.5 * a * tl.exp2(h * a)


@triton.jit
def scaled(  # type: ignore[no-untyped-def]
    v, scale_a_ptr, scale_b_ptr, bias_ptr, rows, columns, M, last,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of sums -> scale_a * scale_b * v + bias in float32.

    SCALE 0: there is none; 1: of shape (); 2: a vector.
    """
    v = v.to(tl.float32)
    if SCALE_A == 1:
        v *= tl.load(scale_a_ptr)
    if SCALE_A == 2:
        v *= tl.load(scale_a_ptr + rows, mask=rows < M, other=0.0)[:, None]
    if SCALE_B == 1:
        v *= tl.load(scale_b_ptr)
    if SCALE_B == 2:
        v *= tl.load(scale_b_ptr + columns, mask=columns < last, other=0.0)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < last, other=0.0).to(tl.float32)
        v += bias[None, :]
    return v


@triton.jit
def finished(  # type: ignore[no-untyped-def]
    v, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m, row_0, column_0, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of sums -> of y in float32."""
    r = tl.arange(0, BLOCK_M)
    columns = column_0 + tl.arange(0, BLOCK_N)
    v = scaled(v, scale_a_ptr, scale_b_ptr, bias_ptr, row_0 + r, columns, M, N,
               SCALE_A, SCALE_B, BIAS)  # fmt: skip
    if ACTIVATION == 1:
        v *= tl.sigmoid(v)
    if ACTIVATION == 2:
        v = gelu(v)
    if RESIDUAL:
        there = (r < M - row_0)[:, None] & (columns < N)[None, :]
        offsets = r[:, None] * residual_m + columns[None, :]
        residual = residual_ptr + row_0.to(tl.int64) * residual_m + offsets
        v += tl.load(residual, mask=there, other=0.0).to(tl.float32)
    return v


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    target, v, row_0, column_0, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_M)[:, None]
    columns = column_0 + tl.arange(0, BLOCK_N)[None, :]
    pointers = target + row_0.to(tl.int64) * stride + (r * stride + columns)
    tl.store(pointers, v.to(target.dtype.element_ty), mask=(r < M - row_0) & (columns < N))


@triton.jit
def halves(v, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """v (BLOCK_M, BLOCK_N) -> its left and its right half, without moving between threads."""
    return v.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sums, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
    row_0, column_0, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, TMA: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finishes and stores a tile, in strips: the whole of it leaves no registers for that."""
    if STRIPS == 1:
        v = finished(sums, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
                     row_0, column_0, M, N, SCALE_A, SCALE_B, BIAS, RESIDUAL, ACTIVATION,
                     BLOCK_M, BLOCK_N)  # fmt: skip
        if TMA:
            y.store([row_0, column_0], v.to(y_ptr.dtype.element_ty))
        else:
            store_tile(y_ptr, v, row_0, column_0, M, N, N, BLOCK_M, BLOCK_N)
    else:
        left, right = halves(sums, BLOCK_M, BLOCK_N)
        _finish(left, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
                row_0, column_0, M, N, SCALE_A, SCALE_B, BIAS, RESIDUAL, ACTIVATION, TMA,
                STRIPS // 2, BLOCK_M, BLOCK_N // 2)  # fmt: skip
        _finish(right, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
                row_0, column_0 + BLOCK_N // 2, M, N, SCALE_A, SCALE_B, BIAS, RESIDUAL, ACTIVATION,
                TMA, STRIPS // 2, BLOCK_M, BLOCK_N // 2)  # fmt: skip


@triton.jit
def _item(  # type: ignore[no-untyped-def]
    item, a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr,
    M, N, K, a_m, b_n, residual_m, split_k,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SUM: tl.constexpr, IMPRECISE: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    part = item // tiles
    row_0, column_0 = tile_of(item % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    sums = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    k_first, k_last = 0, K  # the same for all items: loops over them and over K become one
    if SPLITS > 1:
        k_first, k_last = part * split_k, tl.minimum((part + 1) * split_k, K)
    for k_0 in range(k_first, k_last, BLOCK_K):
        rows = load_tile(a, row_0, k_0, M, K, a_m, TMA, EVEN_K, BLOCK_M, BLOCK_K)
        columns = load_tile(b, column_0, k_0, N, K, b_n, TMA, EVEN_K, BLOCK_N, BLOCK_K)
        sums = tl.dot(rows, columns.T, sums, input_precision="ieee",
                      max_num_imprecise_acc=IMPRECISE, out_dtype=SUM)  # fmt: skip
    if SPLITS == 1:
        _finish(sums, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
                row_0, column_0, M, N, SCALE_A, SCALE_B, BIAS, RESIDUAL, ACTIVATION, TMA, STRIPS,
                BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        of_part = y_ptr + part.to(tl.int64) * M * N
        store_tile(of_part, sums, row_0, column_0, M, N, N, BLOCK_M, BLOCK_N)


@triton.jit
def gemm_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr,
    M, N, K, a_m, b_n, residual_m, split_k,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SUM: tl.constexpr, IMPRECISE: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """SUM: int32 or float32. With SPLITS > 1 y is the sums (SPLITS, M, N) of the parts of K."""
    if TMA:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [a_m, 1], [BLOCK_M, BLOCK_K])
        b = tl.make_tensor_descriptor(b_ptr, [N, K], [b_n, 1], [BLOCK_N, BLOCK_K])
        if SPLITS == 1:
            y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N // STRIPS])
        else:
            y = y_ptr
    else:
        a, b, y = a_ptr, b_ptr, y_ptr
    if PERSISTENT:
        tl.assume(K > 0)  # else the loops do not become one without a second copy of the epilogue
        items = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * SPLITS
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=True):
            _item(item, a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr,
                  M, N, K, a_m, b_n, residual_m, split_k, SCALE_A, SCALE_B, BIAS, RESIDUAL,
                  ACTIVATION, SUM, IMPRECISE, TMA, EVEN_K, SPLITS, STRIPS,
                  BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # fmt: skip
    else:
        _item(tl.program_id(0), a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr,
              M, N, K, a_m, b_n, residual_m, split_k, SCALE_A, SCALE_B, BIAS, RESIDUAL,
              ACTIVATION, SUM, IMPRECISE, TMA, EVEN_K, SPLITS, STRIPS,
              BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # fmt: skip


@triton.jit
def add_parts_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr,
    M, N, residual_m,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums (SPLITS, M, N), added in order -> y (M, N)"""
    row_0 = tl.program_id(0) * BLOCK_M
    column_0 = tl.program_id(1) * BLOCK_N
    v = add_parts(sums_ptr, row_0, column_0, N, M, N, SPLITS, BLOCK_M, BLOCK_N)
    v = finished(v, scale_a_ptr, scale_b_ptr, bias_ptr, residual_ptr, residual_m,
                 row_0, column_0, M, N, SCALE_A, SCALE_B, BIAS, RESIDUAL, ACTIVATION,
                 BLOCK_M, BLOCK_N)  # fmt: skip
    store_tile(y_ptr, v, row_0, column_0, M, N, N, BLOCK_M, BLOCK_N)


@triton.jit
def add_parts(  # type: ignore[no-untyped-def]
    sums_ptr, row_0, column_0, last, M, stride,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of sums (SPLITS, M, stride), of its columns before `last`, added over SPLITS."""
    r = tl.arange(0, BLOCK_M)[:, None]
    columns = column_0 + tl.arange(0, BLOCK_N)[None, :]
    there = (r < M - row_0) & (columns < last)
    pointers = sums_ptr + row_0.to(tl.int64) * stride + (r * stride + columns)
    v = tl.load(pointers, mask=there, other=0)
    for part in tl.static_range(1, SPLITS):
        v += tl.load(pointers + tl.cast(part, tl.int64) * M * stride, mask=there, other=0)
    return v


def launch(
    a: Tensor, b: Tensor, scale_a: Tensor | None = None, scale_b: Tensor | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernels for `hcf::int8_gemm` and `hcf::fp8_gemm`; arguments as there.

    Also takes float16, bfloat16 and float32 operands, and no scales. A configuration with tensor
    descriptors runs through pointers where they cannot read the operands (`fitted`).
    """
    a, b = (t if t.stride(1) == 1 else t.contiguous() for t in (a, b))
    y = a.new_empty(a.shape[0], b.shape[0], dtype=dtype)
    if y.numel() == 0:
        return y
    shape = shape_of(a, b, y)
    op = {torch.int8: "int8_gemm", torch.float8_e4m3fn: "fp8_gemm"}.get(a.dtype, "gemm")
    key = key_of(shape, dtype)
    config = config or find_config(op, key, default_config(shape), a.device)
    if config.get("variant") == "cuda":
        return cuda_gemm.launch(a, b, scale_a, scale_b, bias, residual, activation, dtype, config)
    config = fitted(config, shape)
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    operands = (
        *(y if t is None else t.contiguous() for t in (scale_a, scale_b, bias)),
        y if residual is None else residual,
    )
    flags = {
        **scale_flags(scale_a, scale_b, bias),
        "RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATION[activation],
    }
    residual_m = 0 if residual is None else residual.stride(0)
    splits, split_k = parts_of(shape.k, config)
    target = y if splits == 1 else sums_of(splits, y.shape[0], y.shape[1], a)
    if config["tma"]:
        triton.set_allocator(scratch)
    with torch.cuda.device_of(a):
        gemm_kernel[grid_of(shape, config, splits)](
            a, b, target, *operands,
            shape.m, shape.n, shape.k, a.stride(0), b.stride(0), residual_m, split_k,
            **flags, **constants_of(a.dtype, shape.k, config), SPLITS=splits,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        if splits > 1:
            add_parts_kernel[(triton.cdiv(shape.m, ADD_M), triton.cdiv(shape.n, ADD_N))](
                target, y, *operands, shape.m, shape.n, residual_m,
                **flags, SPLITS=splits, BLOCK_M=ADD_M, BLOCK_N=ADD_N,
            )  # fmt: skip
    return y


def shape_of(a: Tensor, b: Tensor, y: Tensor) -> Shape:
    """Of a launch on the device of a; ValueError where it cannot multiply what a is made of."""
    sm, multiprocessors = 90, 132
    if a.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(a.device)
        sm = 10 * major + minor
        multiprocessors = torch.cuda.get_device_properties(a.device).multi_processor_count
    if a.dtype == torch.float8_e4m3fn and sm < 89:
        raise ValueError(
            f"FP8 products need compute capability 8.9, this GPU has {sm // 10}.{sm % 10}"
        )
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in (a, b, y))
    (m, k), n = a.shape, y.shape[1]
    return Shape(m, n, k, a.dtype, aligned, b.shape[0] != n, sm, multiprocessors)


def scale_flags(
    scale_a: Tensor | None, scale_b: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """SCALE_A, SCALE_B and BIAS of the kernels."""
    scale_a_kind, scale_b_kind = (0 if s is None else 1 + s.ndim for s in (scale_a, scale_b))
    return {"SCALE_A": scale_a_kind, "SCALE_B": scale_b_kind, "BIAS": bias is not None}


def constants_of(operand: torch.dtype, k: int, config: Config) -> dict[str, Any]:
    """What the kernels are compiled for, of a configuration."""
    return {
        "SUM": tl.int32 if operand == torch.int8 else tl.float32,
        "IMPRECISE": config["max_num_imprecise_acc"] if operand == torch.float8_e4m3fn else None,
        "TMA": config["tma"],
        "PERSISTENT": config["persistent"] > 0,
        "STRIPS": config["strips"],
        "EVEN_K": k % config["block_k"] == 0,
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "BLOCK_K": config["block_k"],
        "GROUP_M": config["group_m"],
    }


def key_of(shape: Shape, dtype: torch.dtype) -> str:
    """A shape in a table: 8192x5120x640-int8-bf16, and whether its rows are not aligned."""
    sizes = (shape.m, shape.n, shape.k)
    return shape_key(sizes, shape.operand, dtype, *([] if shape.aligned else ["unaligned"]))


def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of one launch for its descriptors, from torch's allocator: CUDA graphs may hold it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def parts_of(k: int, config: Config) -> tuple[int, int]:
    """Parts of K that are not empty, and the length of one: whole steps."""
    split_k = triton.cdiv(triton.cdiv(k, config["splits"]), config["block_k"]) * config["block_k"]
    return triton.cdiv(k, split_k), split_k


def sums_of(splits: int, rows: int, columns: int, a: Tensor) -> Tensor:
    """Memory for the sums of the parts of K."""
    dtype = torch.int32 if a.dtype == torch.int8 else torch.float32
    return a.new_empty(splits, rows, columns, dtype=dtype)


def grid_of(shape: Shape, config: Config, splits: int) -> tuple[int]:
    """Programs: one an item, or as many as the GPU holds at once."""
    tiles = triton.cdiv(shape.m, config["block_m"]) * triton.cdiv(shape.n, config["block_n"])
    items = tiles * splits
    held = config["persistent"] * shape.multiprocessors
    return (min(items, held) if held else items,)


TRITON_TYPES = {torch.int8: "*i8", torch.float8_e4m3fn: "*fp8e4nv", torch.bfloat16: "*bf16",
                torch.float32: "*fp32"}  # fmt: skip
MATRIX = {torch.int8: {80: "IMMA", 90: "IGMMA"}, torch.float8_e4m3fn: {90: "QGMMA"},
          torch.bfloat16: {80: "HMMA", 90: "HGMMA"}}  # fmt: skip
# (M, N, K): many tiles, few with a long K, rows that are not aligned
FORMS = {"wide": (8192, 5120, 640), "deep": (128, 1280, 5120), "odd": (8192, 5120, 641)}
FLAGS = {"SCALE_A": 2, "SCALE_B": 2, "BIAS": True, "RESIDUAL": True, "ACTIVATION": 2}
POINTERS = {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "bias_ptr": "*bf16",
            "residual_ptr": "*bf16"}  # fmt: skip


def _variant(name: str, shape: Shape, config: Config) -> Variant:
    splits, _ = parts_of(shape.k, config)
    kind = TRITON_TYPES[shape.operand]
    sums = "*i32" if shape.operand == torch.int8 else "*fp32"
    sizes = {n: "i32" for n in ("M", "N", "K", "a_m", "b_n", "residual_m", "split_k")}
    constants = {**FLAGS, **constants_of(shape.operand, shape.k, config), "SPLITS": splits}
    signature = {"a_ptr": kind, "b_ptr": kind, "y_ptr": "*bf16" if splits == 1 else sums}
    signature |= POINTERS | sizes
    instruction = MATRIX.get(shape.operand, {}).get(shape.sm)
    return Variant(
        f"gemm.{name}_sm{shape.sm}", gemm_kernel,
        signature | {n: "constexpr" for n in constants}, constants,
        tuple(signature) if shape.aligned else (), config["num_warps"], config["num_stages"],
        expect={shape.sm: (instruction,)} if instruction else {}, architectures=(shape.sm,),
    )  # fmt: skip


def _variants() -> list[Variant]:
    found = []
    for operand in (*MATRIX, torch.float32):
        for sm in MATRIX.get(operand, {80: "", 90: ""}):
            for form, sizes in FORMS.items():
                shape = Shape(*sizes, operand, form != "odd", sm=sm)
                name = f"{shape_key(operand)}_{form}"
                found.append(_variant(name, shape, default_config(shape)))
    fp8 = Shape(*FORMS["wide"], torch.float8_e4m3fn)
    found.append(_variant("float8_e4m3fn_exact", fp8, candidates(fp8)[-1]))
    numbers = {n: "i32" for n in ("M", "N", "residual_m")}
    constants = {**FLAGS, "SPLITS": 8, "BLOCK_M": ADD_M, "BLOCK_N": ADD_N}
    for sums in ("*i32", "*fp32"):
        signature = {"sums_ptr": sums, "y_ptr": "*bf16"} | POINTERS | numbers
        found.append(
            Variant(
                f"gemm.add_parts_{sums.lstrip('*')}", add_parts_kernel,
                signature | {n: "constexpr" for n in constants}, constants, tuple(signature),
            )
        )  # fmt: skip
    return found


VARIANTS = _variants()
