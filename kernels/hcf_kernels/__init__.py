"""Fused kernels for U-Nets and first stages, as torch operators `torch.ops.hcf.*`.

Each module holds an operator's reference, its registration and its CPU form. What runs on a GPU is
in `hcf_kernels.gpu`, which is imported when a CUDA tensor first comes.
"""

from hcf_kernels.group_norm_silu import group_norm_silu, group_norm_silu_quantized

__all__ = ["group_norm_silu", "group_norm_silu_quantized"]
