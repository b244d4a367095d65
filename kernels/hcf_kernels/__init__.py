"""Fused kernels for U-Nets and first stages, as torch operators `torch.ops.hcf.*`.

Each module holds an operator's reference, its registration and its CPU form. What runs on a GPU is
in `hcf_kernels.gpu`, which is imported when a CUDA tensor first comes.
"""

from hcf_kernels.attention import attention
from hcf_kernels.group_norm_silu import group_norm_silu, group_norm_silu_quantized

__all__ = ["MODULES", "attention", "group_norm_silu", "group_norm_silu_quantized"]

# operator -> module, here and in `hcf_kernels.gpu`
MODULES = {
    "attention": "attention",
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_quantized": "group_norm_silu",
}
