"""Rounding to 8 bits before a product: with a known scale, or with one found for each token.

    codes = round(x / scale)        int8 of -127..127 or e4m3 of -448..448, to nearest even

A known scale is one number, or one a channel of an axis: the last one of tokens, axis 1 of images,
NCHW or channels_last. A token's own is amax / 127 or amax / 448 of its D values, 1 where all are 0.
Bytes that must move: x once, codes once, each half of x or less.

D width, n channels of the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hcf_kernels.rounding import LARGEST, require_8_bit, round_to_codes

INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def quantize_ref(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    """x (...), scale () or (n,) of x's `axis` -> codes (...)"""
    shape = [1] * x.ndim
    if scale.ndim:
        shape[axis] = -1
    return round_to_codes(x, scale.reshape(shape), dtype)


def quantize_per_token_ref(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) -> codes (..., D), scale (..., 1) float32"""
    amax = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(amax > 0, amax / LARGEST[dtype], 1.0)
    return round_to_codes(x, scale, dtype), scale


@torch.library.custom_op("hcf::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    """x (...), scale () or (n,) of x's `axis` -> codes (...) in `dtype`, in x's memory format

    Tokens (..., D) take a scale a channel on axis -1, images (B, C, H, W) in either memory format
    on axis 1. Raises ValueError for what does not fit, with the shapes.
    """
    _check(x, scale, dtype, axis)
    codes = quantize_ref(x, scale, dtype, axis)
    out = torch.empty_like(x, dtype=dtype)
    return codes if codes.stride() == out.stride() else out.copy_(codes)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    _check(x, scale, dtype, axis)
    return torch.empty_like(x, dtype=dtype)


@quantize.register_kernel("cuda")
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = -1) -> Tensor:
    from hcf_kernels.gpu.quantize import launch

    _check(x, scale, dtype, axis)
    return launch(x, scale, dtype, axis)


@torch.library.custom_op("hcf::quantize_per_token", mutates_args=())
def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) -> codes (..., D) in `dtype`, scale (..., 1) float32, both contiguous"""
    check_rows("quantize_per_token", x)
    require_8_bit(dtype)
    codes, scale = quantize_per_token_ref(x, dtype)
    return codes.contiguous(), scale.contiguous()


@quantize_per_token.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    check_rows("quantize_per_token", x)
    require_8_bit(dtype)
    return empty_tokens(x, dtype)


@quantize_per_token.register_kernel("cuda")
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from hcf_kernels.gpu.quantize import launch_per_token

    check_rows("quantize_per_token", x)
    require_8_bit(dtype)
    return launch_per_token(x, dtype)


def empty_tokens(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (..., D) -> empty codes (..., D) and scale (..., 1) float32, both contiguous"""
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def check_rows(op: str, x: Tensor) -> None:
    """ValueError unless x is (..., D) with D of 1 or more, in a dtype that kernels read."""
    if x.ndim < 1 or x.shape[-1] < 1 or x.dtype not in INPUTS:
        raise ValueError(
            f"{op} takes float32, float16 or bfloat16 of (..., D), D 1 or more, "
            f"not {x.dtype} of {tuple(x.shape)}"
        )


def _check(x: Tensor, scale: Tensor, dtype: torch.dtype, axis: int) -> None:
    require_8_bit(dtype)
    if x.dtype not in INPUTS:
        raise ValueError(f"quantize takes float32, float16 or bfloat16, not {x.dtype}")
    if scale.ndim and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} of x {tuple(x.shape)}: there is none")
    fits = [()] + ([(x.shape[axis],)] if scale.ndim else [])
    if tuple(scale.shape) not in fits or not scale.is_floating_point():
        raise ValueError(
            f"scale is {scale.dtype} of {tuple(scale.shape)}, x is {tuple(x.shape)}: use floating "
            f"point of {' or '.join(map(str, fits))}"
        )
