"""INT8 matrix product with everything that follows it: scales, bias, activation, residual.

    y = activation(scale_a * scale_b * (a b^T) + bias) + residual

The sum over K is exact in int32; what follows is float32, rounded once. scale_a is one number or
one a row (per token), scale_b one number or one a column (per output channel). Bytes that must
move: a, b and residual once, y once.

M rows (tokens), N output channels, K input channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda v: v, "silu": F.silu, "gelu": F.gelu}
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


def int8_gemm_ref(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and b (N, K) int8, scale_a () or (M,), scale_b () or (N,) -> (M, N)"""
    product = (a.double() @ b.double().T).to(scale_a.dtype)
    return scaled_ref(product, scale_a, scale_b, bias, residual, activation, dtype)


def scaled_ref(
    product: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What follows a product (M, N), in the dtype of the product -> (M, N) in `dtype`"""
    v = product * scale_a.reshape(-1, 1) * scale_b
    v = v if bias is None else v + bias
    v = ACTIVATIONS[activation](v)
    return (v if residual is None else v + residual).to(dtype)


@torch.library.custom_op("hcf::int8_gemm", mutates_args=())
def int8_gemm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and b (N, K) int8, scales float32, bias (N,), residual (M, N) -> (M, N) in `dtype`

    activation none, silu or gelu (exact); dtype float16, bfloat16 or float32. Raises ValueError for
    what does not fit, with the shapes.
    """
    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.int8)
    product = int8_product(a, b).float()
    return scaled_ref(product, scale_a, scale_b, bias, residual, activation, dtype)


@int8_gemm.register_fake
def _(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.int8)
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@int8_gemm.register_kernel("cuda")
def _(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.gemm import launch

    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.int8)
    return launch(a, b, scale_a, scale_b, bias, residual, activation, dtype)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) and b (N, K) int8 -> (M, N) int32 or float64, exact

    Without VNNI the library adds pairs of products in 16 bits, which saturate.
    """
    if torch.cpu._is_vnni_supported() and min(a.shape[0], *b.shape) > 0:
        return torch._int_mm(a.contiguous(), b.contiguous().T)
    return a.double() @ b.double().T


def check_gemm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None,
    residual: Tensor | None, activation: str, dtype: torch.dtype, operand: torch.dtype,
) -> None:  # fmt: skip
    """ValueError where arguments of a product of `operand`s do not fit each other."""
    if a.dtype != operand or b.dtype != operand or a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"a (M, K) and b (N, K) are {operand}, not {a.dtype} of {tuple(a.shape)} and "
            f"{b.dtype} of {tuple(b.shape)}"
        )
    if a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(f"a is {tuple(a.shape)}, b {tuple(b.shape)}: (M, K) and (N, K), K > 0")
    check_scales(scale_a, scale_b, a.shape[0], b.shape[0], bias)
    if residual is not None and tuple(residual.shape) != (a.shape[0], b.shape[0]):
        size = (a.shape[0], b.shape[0])
        raise ValueError(f"residual is {tuple(residual.shape)}, (M, N) is {size}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is none, silu or gelu, not {activation}")
    if dtype not in OUTPUTS:
        raise ValueError(f"the output dtype is float16, bfloat16 or float32, not {dtype}")


def check_scales(
    scale_a: Tensor, scale_b: Tensor, rows: int, columns: int, bias: Tensor | None
) -> None:
    """ValueError unless scale_a is () or (rows,), scale_b () or (columns,), bias (columns,)."""
    for name, scale, size in (("scale_a", scale_a, rows), ("scale_b", scale_b, columns)):
        if scale.dtype != torch.float32 or tuple(scale.shape) not in ((), (size,)):
            raise ValueError(
                f"{name} is {scale.dtype} of {tuple(scale.shape)}: float32 of () or ({size},)"
            )
    if bias is not None and tuple(bias.shape) != (columns,):
        raise ValueError(f"bias is {tuple(bias.shape)}, the output channels are ({columns},)")
