"""The two 8-bit grids: int8 and float8 e4m3, symmetric, rounded to nearest even, clamped."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def round_to_codes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x (...), scale that broadcasts to it -> codes (...) of x / scale in int8 or e4m3"""
    limit = LARGEST[dtype]
    v = (x.float() / scale.float()).clamp(-limit, limit)
    return (v.round() if dtype == torch.int8 else v).to(dtype)


def require_8_bit(dtype: torch.dtype) -> None:
    """ValueError for a dtype that is neither."""
    if dtype not in LARGEST:
        raise ValueError(f"the output dtype is int8 or float8_e4m3fn, not {dtype}")
