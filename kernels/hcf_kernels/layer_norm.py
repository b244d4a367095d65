"""LayerNorm over the last axis, with or without an affine, and rounded to 8 bits where a product
follows.

    y = (x - mean) * rsqrt(var + eps) * weight + bias

mean and variance over the D values of a token, in float32. Bytes that must move: x once, y once.
Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450; without an affine as in AdaLN, Peebles
and Xie, arXiv 2212.09748.

D width: 320, 640 and 1280 in the U-Nets of SD 1.5 and SDXL, 768 and 1024 in text encoders.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hcf_kernels.quantize import check_rows, empty_tokens, quantize_per_token_ref
from hcf_kernels.rounding import require_8_bit, round_to_codes


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight and bias (D,) or None -> (..., D)"""
    weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_quantized_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `layer_norm_ref`, divided by scale () and rounded to int8 or e4m3 -> codes (..., D)"""
    return round_to_codes(layer_norm_ref(x, weight, bias, eps), scale, dtype)


def layer_norm_per_token_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `layer_norm_ref`, rounded with a scale a token -> codes (..., D), scale (..., 1)"""
    return quantize_per_token_ref(layer_norm_ref(x, weight, bias, eps), dtype)


@torch.library.custom_op("hcf::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (..., D), weight and bias (D,) or None -> (..., D) in x's dtype, contiguous

    Raises ValueError for shapes that do not fit, with the shapes.
    """
    _check(x, weight, bias)
    return layer_norm_ref(x, weight, bias, eps).contiguous()


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty(x.shape)


@layer_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    from hcf_kernels.gpu.layer_norm import launch

    _check(x, weight, bias)
    return launch(x, weight, bias, eps)


@torch.library.custom_op("hcf::layer_norm_quantized", mutates_args=())
def layer_norm_quantized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`layer_norm`, divided by scale () and rounded to `dtype` -> codes (..., D), contiguous

    dtype int8 (to -127..127) or float8_e4m3fn (to -448..448), rounded once, to nearest even.
    """
    _check(x, weight, bias)
    _check_rounding(dtype, scale)
    return layer_norm_quantized_ref(x.float(), weight, bias, eps, scale, dtype).contiguous()


@layer_norm_quantized.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias)
    _check_rounding(dtype, scale)
    return x.new_empty(x.shape, dtype=dtype)


@layer_norm_quantized.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.layer_norm import launch

    _check(x, weight, bias)
    _check_rounding(dtype, scale)
    return launch(x, weight, bias, eps, scale, dtype)


@torch.library.custom_op("hcf::layer_norm_per_token", mutates_args=())
def layer_norm_per_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`layer_norm`, rounded with each token's own scale -> codes (..., D), scale (..., 1) float32

    scale = amax / 127 of int8, amax / 448 of e4m3, 1 for a token of zeros. Both contiguous.
    """
    _check(x, weight, bias)
    _check_rounding(dtype)
    codes, scale = layer_norm_per_token_ref(x.float(), weight, bias, eps, dtype)
    return codes.contiguous(), scale.contiguous()


@layer_norm_per_token.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    _check_rounding(dtype)
    return empty_tokens(x, dtype)


@layer_norm_per_token.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from hcf_kernels.gpu.layer_norm import launch_per_token

    _check(x, weight, bias)
    _check_rounding(dtype)
    return launch_per_token(x, weight, bias, eps, dtype)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_rows("layer_norm", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, x (..., D) is {tuple(x.shape)}: "
                f"use ({x.shape[-1]},) or None"
            )


def _check_rounding(dtype: torch.dtype, scale: Tensor | None = None) -> None:
    require_8_bit(dtype)
    if scale is not None and (scale.ndim or not scale.is_floating_point()):
        raise ValueError(
            f"scale is {scale.dtype} of {tuple(scale.shape)}: use floating point of ()"
        )
