"""Attention of U-Nets: among image tokens by the library's best kernel, to short texts by our own.

    o = softmax(scale * q k^T + key_bias) v

Self-attention is compute-bound and solved: `scaled_dot_product_attention` chooses between cuDNN and
FlashAttention. To 77 to 256 text tokens the keys and values of a head fit on chip, so a program
loads them once, goes over many image tokens, and needs no running softmax. Bytes: q and o once.

B batch, N heads, L image tokens, S keys, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 256  # keys that are held on chip


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """q (B, N, L, K), k and v (B, N, S, K), key_bias (B, S) -> (B, N, L, K)"""
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if key_bias is not None:
        scores = scores + key_bias[:, None, None, :]
    return scores.softmax(-1) @ v


@torch.library.custom_op("hcf::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """q (B, N, L, K), k and v (B, N, S, K), key_bias (B, S) or None -> (B, N, L, K)

    `key_bias` is added to the scores of each key: 0, or a large negative number for padding.
    `scale` defaults to K^-0.5. The output lies in memory as (B, L, N, K), so that putting heads
    side by side is free. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, v, key_bias)
    return _laid_out(_library(q, k, v, key_bias, scale))


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    _check(q, k, v, key_bias)
    return output_like(q)


@attention.register_kernel("cuda")
def _(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    from hcf_kernels.gpu.attention import launch, takes

    _check(q, k, v, key_bias)
    if takes(q, k):
        return launch(q, k, v, key_bias, scale)
    return _laid_out(_library(q, k, v, key_bias, scale))


def output_like(q: Tensor) -> Tensor:
    """Empty (B, N, L, K) in the memory order (B, L, N, K)."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _library(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float | None
) -> Tensor:
    mask = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _laid_out(o: Tensor) -> Tensor:
    out = output_like(o)
    return o if o.stride() == out.stride() else out.copy_(o)


def _check(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> None:
    batch, heads, _, width = q.shape if q.ndim == 4 else (0, 0, 0, 0)
    keys = k.shape[2] if k.ndim == 4 else 0
    if q.ndim != 4 or k.shape != (batch, heads, keys, width) or v.shape != k.shape:
        raise ValueError(
            "attention takes q (B, N, L, K), k and v (B, N, S, K), not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if key_bias is not None and key_bias.shape != (batch, keys):
        raise ValueError(f"key_bias is {tuple(key_bias.shape)}, (B, S) is {(batch, keys)}")
