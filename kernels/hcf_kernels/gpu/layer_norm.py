"""LayerNorm in Triton: a program holds several whole rows, so x is read once.

Mean first, then the squares of what differs from it, both in registers: no cancellation. M rows
(tokens), D width, padded to a power of two on chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcf_kernels.aot import Variant
from hcf_kernels.gpu.quantize import (
    LARGEST_WIDTH,
    as_rows,
    default_row_config,
    require_capability,
    row_candidates,
    token_codes,
)
from hcf_kernels.gpu.quantized import to_codes
from hcf_kernels.quantize import empty_tokens
from hcf_kernels.tables import Config, Plan, find_config, shape_key

default_config = default_row_config
candidates = row_candidates
PLAIN, ONE_SCALE, PER_TOKEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, weight_ptr, bias_ptr, scale_ptr, M, D, x_m, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OUTPUT: tl.constexpr, INT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK_M rows of x (M, D), x_m apart -> y (M, D)

    scale () is read for ONE_SCALE, scale (M,) written for PER_TOKEN.
    """
    row_0 = tl.program_id(0) * BLOCK_M
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    there = r < M - row_0
    inside = there[:, None] & (d < D)
    x_ptr += row_0.to(tl.int64) * x_m
    v = tl.load(x_ptr + r[:, None] * x_m + d, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=1) / D
    v = tl.where(inside, v - mean[:, None], 0.0)
    variance = tl.sum(v * v, axis=1) / D
    v = v * tl.rsqrt(variance + eps)[:, None]
    if WEIGHT:
        v = v * tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if BIAS:
        v = v + tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    y_ptr += row_0.to(tl.int64) * D
    offsets = r[:, None] * D + d
    if OUTPUT == PER_TOKEN:
        codes, scale = token_codes(tl.where(inside, v, 0.0), INT8)
        tl.store(y_ptr + offsets, codes, mask=inside)
        tl.store(scale_ptr + row_0 + r, scale, mask=there)
    elif OUTPUT == ONE_SCALE:
        codes = to_codes(v / tl.load(scale_ptr).to(tl.float32), INT8)
        tl.store(y_ptr + offsets, codes, mask=inside)
    else:
        tl.store(y_ptr + offsets, v.to(y_ptr.dtype.element_ty), mask=inside)


def launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None = None, dtype: torch.dtype | None = None, config: Config | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Runs the kernel for `hcf::layer_norm` and its quantised form; arguments as there.

    x whose rows do not lie at one distance, or whose values do not lie together, is copied first.
    `out`, where given, is written: contiguous.
    """
    y = x.new_empty(x.shape, dtype=dtype or x.dtype) if out is None else out
    output = PLAIN if scale is None else ONE_SCALE
    _run(x, y, weight, bias, eps, scale, output.value, config)
    return y


def launch_per_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs the kernel for `hcf::layer_norm_per_token`; arguments as there."""
    y, scale = empty_tokens(x, dtype)
    _run(x, y, weight, bias, eps, scale, PER_TOKEN.value, config)
    return y, scale


def _run(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    scale: Tensor | None, output: int, config: Config | None,
) -> None:  # fmt: skip
    require_capability(x, y.dtype)
    rows = as_rows(x)
    m, d = rows.shape
    if m == 0:
        return
    default = default_config(m, d)
    config = config or find_config("layer_norm", shape_key((m, d), x.dtype), default, x.device)
    pointers = [rows if t is None else t.contiguous() for t in (weight, bias, scale)]
    with torch.cuda.device_of(x):
        layer_norm_kernel[(triton.cdiv(m, config["block_m"]),)](
            rows, y, *pointers, m, d, rows.stride(0), eps,
            WEIGHT=weight is not None, BIAS=bias is not None, OUTPUT=output,
            INT8=y.dtype == torch.int8, BLOCK_M=config["block_m"],
            BLOCK_D=triton.next_power_of_2(d), num_warps=config["num_warps"],
        )  # fmt: skip


def plan(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Plan:
    """How `hcf::layer_norm` can run; arguments as there. Its quantised forms take the same."""
    m, d = as_rows(x).shape
    return Plan(
        shape_key((m, d), x.dtype),
        candidates(m, d),
        lambda config: launch(x, weight, bias, eps, config=config),
    )


PLANS = {"layer_norm": plan}


def _variants() -> list[Variant]:
    found = []
    for width in (320, 640, 1280, LARGEST_WIDTH):
        for name, output, out, archs in (
            ("", 0, "*bf16", (80, 90)),
            ("_int8", 1, "*i8", (80, 90)),
            ("_e4m3", 1, "*fp8e4nv", (90,)),
            ("_token_int8", 2, "*i8", (80, 90)),
            ("_token_e4m3", 2, "*fp8e4nv", (90,)),
        ):
            config = default_config(8192, width)
            pointers = {"x_ptr": "*bf16", "y_ptr": out, "weight_ptr": "*bf16",
                        "bias_ptr": "*bf16", "scale_ptr": "*fp32"}  # fmt: skip
            sizes = {n: "i32" for n in ("M", "D", "x_m")}
            constants = {"WEIGHT": True, "BIAS": True, "OUTPUT": output, "INT8": out == "*i8",
                         "BLOCK_M": config["block_m"],
                         "BLOCK_D": triton.next_power_of_2(width)}  # fmt: skip
            found.append(
                Variant(
                    f"layer_norm.{width}{name}", layer_norm_kernel,
                    pointers | sizes | {"eps": "fp32"} | {n: "constexpr" for n in constants},
                    constants, (*pointers, *sizes), num_warps=config["num_warps"],
                    architectures=archs,
                )
            )  # fmt: skip
    return found


VARIANTS = _variants()
