"""GEGLU, the first half of a U-Net transformer's feed-forward block, in one matrix product.

    hidden, gate = x W^T + b, halved        W (2N, K): rows of hidden, then rows of gate
    y = hidden * gelu(gate)                 exact gelu, gate/2 * (1 + erf(gate / sqrt 2))

A program computes a tile of hidden and the tile of gate that belongs to it, so the (M, 2N) product
never reaches memory. Bytes that must move: x and W once, y once. Shazeer, GLU Variants Improve
Transformer, arXiv 2002.05202.

M rows (tokens), N inner width, K width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hcf_kernels.int8_gemm import OUTPUTS, check_scales, int8_product, scaled_ref


def geglu_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (2N, K), bias (2N,) -> (..., N)"""
    return geglu_gate_ref(F.linear(x, weight, bias))


def geglu_gate_ref(x: Tensor) -> Tensor:
    """x (..., 2N) -> (..., N)"""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def geglu_int8_ref(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and weight (2N, K) int8, scale_a () or (M,), scale_b () or (2N,) -> (M, N)"""
    product = (a.double() @ weight.double().T).to(scale_a.dtype)
    v = scaled_ref(product, scale_a, scale_b, bias, None, "none", scale_a.dtype)
    return geglu_gate_ref(v).to(dtype)


@torch.library.custom_op("hcf::geglu", mutates_args=())
def geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (2N, K), bias (2N,) or None -> (..., N), contiguous

    All in one dtype: float16, bfloat16 or float32. Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, bias)
    return geglu_ref(x, weight, bias)


@geglu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


@geglu.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from hcf_kernels.gpu.geglu import launch

    _check(x, weight, bias)
    y = launch(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.reshape(*x.shape[:-1], y.shape[1])


@torch.library.custom_op("hcf::geglu_gate", mutates_args=())
def geglu_gate(x: Tensor) -> Tensor:
    """x (..., 2N), hidden and then gate -> hidden * gelu(gate) (..., N), contiguous"""
    _check_halves(x)
    return geglu_gate_ref(x).contiguous()


@geglu_gate.register_fake
def _(x: Tensor) -> Tensor:
    _check_halves(x)
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@geglu_gate.register_kernel("cuda")
def _(x: Tensor) -> Tensor:
    from hcf_kernels.gpu.geglu import launch_gate

    _check_halves(x)
    y = launch_gate(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[1])


@torch.library.custom_op("hcf::geglu_int8", mutates_args=())
def geglu_int8(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and weight (2N, K) int8, scales float32, bias (2N,) -> (M, N) in `dtype`

    scale_a () or (M,), scale_b () or (2N,). Sums in int32, exact; float32 from there.
    """
    _check_int8(a, weight, scale_a, scale_b, bias, dtype)
    product = int8_product(a, weight).float()
    v = scaled_ref(product, scale_a, scale_b, bias, None, "none", torch.float32)
    return geglu_gate_ref(v).to(dtype)


@geglu_int8.register_fake
def _(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    _check_int8(a, weight, scale_a, scale_b, bias, dtype)
    return a.new_empty(a.shape[0], weight.shape[0] // 2, dtype=dtype)


@geglu_int8.register_kernel("cuda")
def _(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.geglu import launch

    _check_int8(a, weight, scale_a, scale_b, bias, dtype)
    return launch(a, weight, bias, scale_a, scale_b, dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _check_weight(x, weight, bias)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in OUTPUTS or tensor.dtype != x.dtype):
            raise ValueError(
                f"geglu takes x, weight and bias all float32, float16 or bfloat16: x is {x.dtype}, "
                f"{name} {tensor.dtype}"
            )


def _check_int8(
    a: Tensor, weight: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if a.dtype != torch.int8 or weight.dtype != torch.int8 or a.ndim != 2:
        raise ValueError(
            f"a (M, K) and weight (2N, K) are int8, not {a.dtype} of {tuple(a.shape)} and "
            f"{weight.dtype} of {tuple(weight.shape)}"
        )
    _check_weight(a, weight, bias)
    check_scales(scale_a, scale_b, a.shape[0], weight.shape[0], bias)
    if dtype not in OUTPUTS:
        raise ValueError(f"the output dtype is float16, bfloat16 or float32, not {dtype}")


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if (
        weight.ndim != 2
        or weight.shape[0] % 2
        or x.ndim < 1
        or x.shape[-1] != weight.shape[1]
        or not weight.numel()
    ):
        raise ValueError(
            f"x (..., K) is {tuple(x.shape)}, weight (2N, K) {tuple(weight.shape)}: "
            "the same K > 0, and an even number of rows"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, weight has {weight.shape[0]} rows")


def _check_halves(x: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] % 2 or x.dtype not in OUTPUTS:
        raise ValueError(
            "geglu_gate takes float32, float16 or bfloat16 of (..., 2N), not "
            f"{x.dtype} of {tuple(x.shape)}"
        )
