"""GroupNorm with SiLU, and what stands before and after it in a U-Net's residual block.

    v = x + add                                      the time embedding, (B, C)
    y = silu((v - mean_g) * rsqrt(var_g + eps) * weight + bias)

mean and variance over the H * W * C/G values of a group and image, in float32. `weight` and `bias`
are (C,), or (B, C) where a scale and shift from the time embedding are folded in:
weight * (1 + scale), bias * (1 + scale) + shift. The activation can be an exact GELU instead.

Bytes that must move: x once, y once. B batch, C channels, G groups, H W size (or one length L).
Wu and He, Group Normalization, arXiv 1803.08494; Elfwing et al., SiLU, arXiv 1702.03118.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hcf_kernels.rounding import require_8_bit, round_to_codes

ACTIVATIONS = {"none": lambda v: v, "silu": F.silu, "gelu": F.gelu}


def group_norm_silu_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str = "silu",
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (B, C, ...), weight and bias (C,) or (B, C), add (B, C) -> (B, C, ...)"""
    space = (1,) * (x.ndim - 2)
    v = x if add is None else x + add.reshape(*add.shape, *space)
    y = torch.group_norm(v, groups, eps=eps) * weight.reshape(-1, x.shape[1], *space)
    y = y + bias.reshape(-1, x.shape[1], *space)
    return ACTIVATIONS[activation](y)


@torch.library.custom_op("hcf::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str = "silu",
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x (B, C, H, W) or (B, C, L), weight, bias (C,) or (B, C), add (B, C) -> as x

    In x's dtype and memory format (NCHW or channels_last, with its own strides where x is dense).
    Raises ValueError for shapes that do not fit, with the shapes.
    """
    _check(x, weight, bias, groups, activation, add)
    return _like(x, _on_cpu(x, weight, bias, groups, eps, activation, add))


@group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str = "silu",
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, groups, activation, add)
    return torch.empty_like(x)


@group_norm_silu.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str = "silu",
    add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.group_norm_silu import launch

    _check(x, weight, bias, groups, activation, add)
    return launch(x, weight, bias, groups, eps, activation, add)


def group_norm_silu_quantized_ref(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    scale: Tensor, dtype: torch.dtype, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `group_norm_silu_ref`, divided by scale () and rounded to int8 or e4m3 -> (B, C, ...)"""
    y = group_norm_silu_ref(x, weight, bias, groups, eps, activation, add)
    return round_to_codes(y, scale, dtype)


@torch.library.custom_op("hcf::group_norm_silu_quantized", mutates_args=())
def group_norm_silu_quantized(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    scale: Tensor, dtype: torch.dtype, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`group_norm_silu`, its output divided by scale () float32 and rounded to `dtype` -> as x

    dtype int8 (to -127..127) or float8_e4m3fn (to -448..448), rounded to nearest even.
    """
    _check(x, weight, bias, groups, activation, add)
    require_8_bit(dtype)
    y = _on_cpu(x.float(), weight, bias, groups, eps, activation, add)
    return _like(x, round_to_codes(y, scale, dtype))


@group_norm_silu_quantized.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    scale: Tensor, dtype: torch.dtype, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, groups, activation, add)
    require_8_bit(dtype)
    return torch.empty_like(x, dtype=dtype)


@group_norm_silu_quantized.register_kernel("cuda")
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    scale: Tensor, dtype: torch.dtype, add: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from hcf_kernels.gpu.group_norm_silu import launch

    _check(x, weight, bias, groups, activation, add)
    require_8_bit(dtype)
    return launch(x, weight, bias, groups, eps, activation, add, scale, dtype)


def _on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: str,
    add: Tensor | None,
) -> Tensor:  # fmt: skip
    """torch's own kernel where the affine is the same for all images; it rounds once."""
    if weight.ndim == 2:
        return group_norm_silu_ref(
            x, weight.to(x.dtype), bias.to(x.dtype), groups, eps, activation, add
        )
    v = x if add is None else x + add.reshape(*add.shape, *(1,) * (x.ndim - 2)).to(x.dtype)
    y = torch.group_norm(v, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(y, inplace=True) if activation == "silu" else ACTIVATIONS[activation](y)


def _like(x: Tensor, y: Tensor) -> Tensor:
    """y with the strides that `torch.empty_like(x)` promises."""
    out = torch.empty_like(x, dtype=y.dtype)
    return y if y.stride() == out.stride() else out.copy_(y)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, activation: str, add: Tensor | None
) -> None:  # fmt: skip
    if x.ndim not in (3, 4) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"group_norm_silu takes float32, float16 or bfloat16 of (B, C, L) or (B, C, H, W), "
            f"not {x.dtype} of {tuple(x.shape)}"
        )
    batch, channels = x.shape[:2]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {', '.join(ACTIVATIONS)}, not {activation}")
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not make {groups} groups")
    for name, tensor in (("weight", weight), ("bias", bias), ("add", add)):
        if tensor is None:
            continue
        fits = [(batch, channels)] if name == "add" else [(channels,), (batch, channels)]
        if tuple(tensor.shape) not in fits:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, x (B, C, ...) is {tuple(x.shape)}: "
                f"use {' or '.join(map(str, fits))}"
            )
    if weight.ndim != bias.ndim:
        raise ValueError("weight and bias are both (C,) or both (B, C)")
