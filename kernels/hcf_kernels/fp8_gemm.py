"""FP8 (e4m3) matrix product with everything that follows it: scales, bias, activation, residual.

    y = activation(scale_a * scale_b * (a b^T) + bias) + residual

The sum over K is in float32, with one reservation. Hopper's tensor cores hold the running sum of
an FP8 product in about 14 bits of mantissa (DeepSeek-V3, arXiv 2412.19437, section 3.3.2: up to 2 %
off at K = 4096). `max_num_imprecise_acc` of the kernel's configuration is the number of products
after which that sum is added to one in float32: None, the default, is never; 128 costs a second
accumulator and so smaller tiles.

Needs compute capability 8.9. Bytes, scales and letters as in `hcf_kernels.int8_gemm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcf_kernels.int8_gemm import check_gemm, scaled_ref


def fp8_gemm_ref(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and b (N, K) e4m3, scale_a () or (M,), scale_b () or (N,) -> (M, N)"""
    product = a.to(scale_a.dtype) @ b.to(scale_a.dtype).T
    return scaled_ref(product, scale_a, scale_b, bias, residual, activation, dtype)


@torch.library.custom_op("hcf::fp8_gemm", mutates_args=())
def fp8_gemm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """a (M, K) and b (N, K) float8_e4m3fn, the rest as of `hcf::int8_gemm` -> (M, N) in `dtype`"""
    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.float8_e4m3fn)
    return fp8_gemm_ref(a, b, scale_a, scale_b, bias, residual, activation, dtype)


@fp8_gemm.register_fake
def _(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.float8_e4m3fn)
    return a.new_empty(a.shape[0], b.shape[0], dtype=dtype)


@fp8_gemm.register_kernel("cuda")
def _(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.gemm import launch

    check_gemm(a, b, scale_a, scale_b, bias, residual, activation, dtype, torch.float8_e4m3fn)
    return launch(a, b, scale_a, scale_b, bias, residual, activation, dtype)
