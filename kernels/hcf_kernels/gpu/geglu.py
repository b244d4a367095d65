"""GEGLU in Triton: a matrix product with two tiles of sums, and the gate on its own.

    y = hidden * gelu(gate),    hidden | gate = scale_a * scale_b * (a b^T) + bias,    b (2N, K)

A program reads a tile of a once a step for two products: with rows of b that make hidden, and with
those N rows further that make its gate. Work items, parts of K and strips as in
`hcf_kernels.gpu.gemm`. a (M, K), y (M, N).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu import cuda_gemm
from hcf_kernels.gpu.gemm import (
    ADD_M,
    ADD_N,
    MATRIX,
    TRITON_TYPES,
    add_parts,
    constants_of,
    gelu,
    grid_of,
    halves,
    key_of,
    load_tile,
    parts_of,
    scale_flags,
    scaled,
    scratch,
    shape_of,
    store_tile,
    sums_of,
    tile_of,
)
from hcf_kernels.gpu.gemm_tiles import Shape, candidates, default_config, fitted
from hcf_kernels.tables import Config, find_config, shape_key

__all__ = ["Shape", "VARIANTS", "candidates", "default_config", "launch", "launch_gate"]


@triton.jit
def _gated(  # type: ignore[no-untyped-def]
    hidden, gate, scale_a_ptr, scale_b_ptr, bias_ptr, row_0, column_0, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of both sums -> of y in float32."""
    rows = row_0 + tl.arange(0, BLOCK_M)
    columns = column_0 + tl.arange(0, BLOCK_N)
    gate = scaled(gate, scale_a_ptr, scale_b_ptr, bias_ptr, rows, N + columns, M, 2 * N,
                  SCALE_A, SCALE_B, BIAS)  # fmt: skip
    hidden = scaled(hidden, scale_a_ptr, scale_b_ptr, bias_ptr, rows, columns, M, N,
                    SCALE_A, SCALE_B, BIAS)  # fmt: skip
    return hidden * gelu(gate)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    hidden, gate, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, row_0, column_0, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, STRIPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if STRIPS == 1:
        v = _gated(hidden, gate, scale_a_ptr, scale_b_ptr, bias_ptr, row_0, column_0, M, N,
                   SCALE_A, SCALE_B, BIAS, BLOCK_M, BLOCK_N)  # fmt: skip
        if TMA:
            y.store([row_0, column_0], v.to(y_ptr.dtype.element_ty))
        else:
            store_tile(y_ptr, v, row_0, column_0, M, N, N, BLOCK_M, BLOCK_N)
    else:
        hidden_l, hidden_r = halves(hidden, BLOCK_M, BLOCK_N)
        gate_l, gate_r = halves(gate, BLOCK_M, BLOCK_N)
        _finish(hidden_l, gate_l, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr,
                row_0, column_0, M, N, SCALE_A, SCALE_B, BIAS, TMA, STRIPS // 2,
                BLOCK_M, BLOCK_N // 2)  # fmt: skip
        _finish(hidden_r, gate_r, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr,
                row_0, column_0 + BLOCK_N // 2, M, N, SCALE_A, SCALE_B, BIAS, TMA, STRIPS // 2,
                BLOCK_M, BLOCK_N // 2)  # fmt: skip


@triton.jit
def _item(  # type: ignore[no-untyped-def]
    item, a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, K, a_m, b_n, split_k,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr, STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    part = item // tiles
    row_0, column_0 = tile_of(item % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    hidden = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    gate = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    k_first, k_last = 0, K  # the same for all items: loops over them and over K become one
    if SPLITS > 1:
        k_first, k_last = part * split_k, tl.minimum((part + 1) * split_k, K)
    for k_0 in range(k_first, k_last, BLOCK_K):
        rows = load_tile(a, row_0, k_0, M, K, a_m, TMA, EVEN_K, BLOCK_M, BLOCK_K)
        of_hidden = load_tile(b, column_0, k_0, 2 * N, K, b_n, TMA, EVEN_K, BLOCK_N, BLOCK_K)
        of_gate = load_tile(b, N + column_0, k_0, 2 * N, K, b_n, TMA, EVEN_K, BLOCK_N, BLOCK_K)
        hidden = tl.dot(rows, of_hidden.T, hidden, input_precision="ieee", out_dtype=SUM)
        gate = tl.dot(rows, of_gate.T, gate, input_precision="ieee", out_dtype=SUM)
    if SPLITS == 1:
        _finish(hidden, gate, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, row_0, column_0, M, N,
                SCALE_A, SCALE_B, BIAS, TMA, STRIPS, BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        of_part = y_ptr + part.to(tl.int64) * M * (2 * N)
        store_tile(of_part, hidden, row_0, column_0, M, N, 2 * N, BLOCK_M, BLOCK_N)
        store_tile(of_part + N, gate, row_0, column_0, M, N, 2 * N, BLOCK_M, BLOCK_N)


@triton.jit
def geglu_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, K, a_m, b_n, split_k,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr, SUM: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, EVEN_K: tl.constexpr, SPLITS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """With SPLITS > 1 y is the sums (SPLITS, M, 2N) of the parts of K."""
    if TMA:
        a = tl.make_tensor_descriptor(a_ptr, [M, K], [a_m, 1], [BLOCK_M, BLOCK_K])
        b = tl.make_tensor_descriptor(b_ptr, [2 * N, K], [b_n, 1], [BLOCK_N, BLOCK_K])
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
            _item(item, a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, K, a_m, b_n,
                  split_k, SCALE_A, SCALE_B, BIAS, SUM, TMA, EVEN_K, SPLITS, STRIPS,
                  BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # fmt: skip
    else:
        _item(tl.program_id(0), a, b, y, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, M, N, K, a_m,
              b_n, split_k, SCALE_A, SCALE_B, BIAS, SUM, TMA, EVEN_K, SPLITS, STRIPS,
              BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M)  # fmt: skip


@triton.jit
def add_parts_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, y_ptr, scale_a_ptr, scale_b_ptr, bias_ptr, M, N,
    SCALE_A: tl.constexpr, SCALE_B: tl.constexpr, BIAS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums (SPLITS, M, 2N), added in order -> y (M, N)"""
    row_0 = tl.program_id(0) * BLOCK_M
    column_0 = tl.program_id(1) * BLOCK_N
    hidden = add_parts(sums_ptr, row_0, column_0, N, M, 2 * N, SPLITS, BLOCK_M, BLOCK_N)
    gate = add_parts(sums_ptr + N, row_0, column_0, N, M, 2 * N, SPLITS, BLOCK_M, BLOCK_N)
    v = _gated(hidden, gate, scale_a_ptr, scale_b_ptr, bias_ptr, row_0, column_0, M, N,
               SCALE_A, SCALE_B, BIAS, BLOCK_M, BLOCK_N)  # fmt: skip
    store_tile(y_ptr, v, row_0, column_0, M, N, N, BLOCK_M, BLOCK_N)


@triton.jit
def gate_kernel(x_ptr, y_ptr, M, N, x_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """x (M, 2N), its rows x_m apart -> y (M, N)"""
    row_0 = tl.program_id(0) * BLOCK_M
    r = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    there = (r < M - row_0) & (columns < N)
    pointers = x_ptr + row_0.to(tl.int64) * x_m + (r * x_m + columns)
    hidden = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(pointers + N, mask=there, other=0.0).to(tl.float32)
    store_tile(y_ptr, hidden * gelu(gate), row_0, tl.program_id(1) * BLOCK_N, M, N, N,
               BLOCK_M, BLOCK_N)  # fmt: skip


def launch(
    a: Tensor, weight: Tensor, bias: Tensor | None = None, scale_a: Tensor | None = None,
    scale_b: Tensor | None = None, dtype: torch.dtype | None = None, config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernels for `hcf::geglu` on a (M, K), and for `hcf::geglu_int8`.

    `dtype` is that of y, a's own where there is none. `out` (M, N), where given, is y.
    """
    a, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (a, weight))
    y = (
        a.new_empty(a.shape[0], weight.shape[0] // 2, dtype=dtype or a.dtype)
        if out is None
        else out
    )
    if y.numel() == 0:
        return y
    shape = shape_of(a, weight, y)
    key = key_of(shape, y.dtype)
    config = config or find_config("geglu", key, default_config(shape), a.device)
    if config.get("variant") == "cuda":
        return cuda_gemm.launch_geglu(a, weight, bias, scale_a, scale_b, y.dtype, config, y)
    config = fitted(config, shape)
    operands = tuple(y if t is None else t.contiguous() for t in (scale_a, scale_b, bias))
    flags = scale_flags(scale_a, scale_b, bias)
    splits, split_k = parts_of(shape.k, config)
    target = y if splits == 1 else sums_of(splits, shape.m, 2 * shape.n, a)
    constants = constants_of(a.dtype, shape.k, config)
    del constants["IMPRECISE"]
    if config["tma"]:
        triton.set_allocator(scratch)
    with torch.cuda.device_of(a):
        geglu_kernel[grid_of(shape, config, splits)](
            a, weight, target, *operands,
            shape.m, shape.n, shape.k, a.stride(0), weight.stride(0), split_k,
            **flags, **constants, SPLITS=splits,
            num_warps=config["num_warps"], num_stages=config["num_stages"],
        )  # fmt: skip
        if splits > 1:
            add_parts_kernel[(triton.cdiv(shape.m, ADD_M), triton.cdiv(shape.n, ADD_N))](
                target, y, *operands, shape.m, shape.n,
                **flags, SPLITS=splits, BLOCK_M=ADD_M, BLOCK_N=ADD_N,
            )  # fmt: skip
    return y


def gate_candidates() -> list[Config]:
    """Tiles of the gate on its own; the default is the first: 16 values a thread."""
    sizes = [(1, 1024), (1, 512), (2, 512), (4, 256), (4, 512), (8, 256), (2, 1024)]
    made = [{"block_m": m, "block_n": n} for m, n in sizes]
    return [{**tile, "num_warps": warps} for tile in made for warps in (4, 8)]


def gate_key(x: Tensor) -> str:
    """x (M, 2N) in a table."""
    return shape_key((x.shape[0], x.shape[1] // 2), x.dtype)


def launch_gate(x: Tensor, config: Config | None = None) -> Tensor:
    """Runs the kernel for `hcf::geglu_gate` on x (M, 2N)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    if y.numel() == 0:
        return y
    config = config or find_config("geglu_gate", gate_key(x), gate_candidates()[0], x.device)
    block_m, block_n = config["block_m"], config["block_n"]
    with torch.cuda.device_of(x):
        gate_kernel[(triton.cdiv(y.shape[0], block_m), triton.cdiv(y.shape[1], block_n))](
            x, y, *y.shape, x.stride(0), BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=config["num_warps"],
        )  # fmt: skip
    return y


def _variant(name: str, shape: Shape, config: Config) -> Variant:
    kind = TRITON_TYPES[shape.operand]
    int8 = shape.operand == torch.int8
    splits, _ = parts_of(shape.k, config)
    target = ("*i32" if int8 else "*fp32") if splits > 1 else "*bf16"
    signature = {"a_ptr": kind, "b_ptr": kind, "y_ptr": target, "scale_a_ptr": "*fp32",
                 "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"}  # fmt: skip
    signature |= {n: "i32" for n in ("M", "N", "K", "a_m", "b_n", "split_k")}
    constants = {"SCALE_A": 2 if int8 else 0, "SCALE_B": 2 if int8 else 0, "BIAS": True}
    constants |= constants_of(shape.operand, shape.k, config) | {"SPLITS": splits}
    del constants["IMPRECISE"]
    return Variant(
        f"geglu.{name}_sm{shape.sm}", geglu_kernel,
        signature | {n: "constexpr" for n in constants}, constants,
        tuple(signature) if shape.aligned else (), config["num_warps"], config["num_stages"],
        expect={shape.sm: (MATRIX[shape.operand][shape.sm],)}, architectures=(shape.sm,),
    )  # fmt: skip


def _variants() -> list[Variant]:
    forms = {"wide": (8192, 2560, 640), "deep": (128, 5120, 1280), "odd": (8192, 2560, 641)}
    found = []
    for operand in (torch.int8, torch.bfloat16):
        for sm in MATRIX[operand]:
            for form, sizes in forms.items():
                shape = Shape(*sizes, operand, form != "odd", geglu=True, sm=sm)
                name = f"{shape_key(operand)}_{form}"
                found.append(_variant(name, shape, default_config(shape)))
            deep = Shape(*forms["deep"], operand, geglu=True, sm=sm)
            parts = {**default_config(deep), "splits": 4}
            found.append(_variant(f"{shape_key(operand)}_parts", deep, parts))
    numbers = {n: "i32" for n in ("M", "N")}
    constants = {"SCALE_A": 2, "SCALE_B": 2, "BIAS": True, "SPLITS": 8, "BLOCK_M": ADD_M,
                 "BLOCK_N": ADD_N}  # fmt: skip
    signature = {"sums_ptr": "*i32", "y_ptr": "*bf16", "scale_a_ptr": "*fp32",
                 "scale_b_ptr": "*fp32", "bias_ptr": "*bf16"} | numbers  # fmt: skip
    tile = {"BLOCK_M": 1, "BLOCK_N": 1024}
    gate = {"x_ptr": "*bf16", "y_ptr": "*bf16", **numbers, "x_m": "i32"}
    return [
        *found,
        Variant("geglu.add_parts", add_parts_kernel,
                signature | {n: "constexpr" for n in constants}, constants, tuple(signature)),
        Variant("geglu.gate", gate_kernel, gate | {n: "constexpr" for n in tile}, tile,
                tuple(gate)),
    ]  # fmt: skip


VARIANTS = _variants()
