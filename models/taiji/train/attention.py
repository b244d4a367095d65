"""Attention of short sequences in training on a CPU: in float32 where autocast would take bfloat16.

torch's bfloat16 kernel for CPUs has a backward pass that costs several times the float32 one up to
a few hundred keys, whatever is computed: a third of a small U-Net's step. Measured with
`hcf bench training`; on longer sequences the two are alike.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

MOST_KEYS = 512


def short_attention(module: nn.Module) -> AbstractContextManager[Any]:
    """`ShortAttention` for a step of `module`; nothing where a part of it checkpoints gradients.

    torch computes such a part again inside of the backward pass, where no function mode reaches,
    and refuses other dtypes than those of the first time.
    """
    if any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        return nullcontext()
    return ShortAttention()


class ShortAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` with gradients, of at most `MOST_KEYS` keys, runs in
    float32 on a CPU. Results keep the dtype that they would have had; other calls are as they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is scaled_dot_product_attention and torch.is_grad_enabled():
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **rest: Any,
) -> Tensor:
    """query (..., L, D), key and value (..., S, D) -> (..., L, D)"""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if dtype != torch.bfloat16 or query.device.type != "cpu" or key.shape[-2] > MOST_KEYS:
        return scaled_dot_product_attention(query, key, value, attn_mask, *args, **rest)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        out = scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask, *args, **rest
        )
    return out.to(dtype)
