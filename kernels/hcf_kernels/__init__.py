"""Fused kernels for U-Nets and first stages, as torch operators `torch.ops.hcf.*`.

Each module holds an operator's reference, its registration and its CPU form. What runs on a GPU is
in `hcf_kernels.gpu`, which is imported when a CUDA tensor first comes.
"""

from hcf_kernels.attention import attention
from hcf_kernels.conv3x3 import conv3x3, conv3x3_quantized, fold_upsample, upsample_conv3x3
from hcf_kernels.fp8_gemm import fp8_gemm
from hcf_kernels.geglu import geglu, geglu_gate, geglu_int8
from hcf_kernels.group_norm_silu import group_norm_silu, group_norm_silu_quantized
from hcf_kernels.guidance_step import guidance_multistep, guidance_step
from hcf_kernels.int8_gemm import int8_gemm
from hcf_kernels.layer_norm import layer_norm, layer_norm_per_token, layer_norm_quantized
from hcf_kernels.quantize import quantize, quantize_per_token
from hcf_kernels.tile_blend import tile_blend

__all__ = [
    "MODULES",
    "attention",
    "conv3x3",
    "conv3x3_quantized",
    "fold_upsample",
    "fp8_gemm",
    "geglu",
    "geglu_gate",
    "geglu_int8",
    "group_norm_silu",
    "group_norm_silu_quantized",
    "guidance_multistep",
    "guidance_step",
    "int8_gemm",
    "layer_norm",
    "layer_norm_per_token",
    "layer_norm_quantized",
    "quantize",
    "quantize_per_token",
    "tile_blend",
    "upsample_conv3x3",
]

# operator -> the module here that has it
MODULES = {
    "attention": "attention",
    "conv3x3": "conv3x3",
    "conv3x3_quantized": "conv3x3",
    "upsample_conv3x3": "conv3x3",
    "fp8_gemm": "fp8_gemm",
    "geglu": "geglu",
    "geglu_gate": "geglu",
    "geglu_int8": "geglu",
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_quantized": "group_norm_silu",
    "guidance_multistep": "guidance_step",
    "guidance_step": "guidance_step",
    "int8_gemm": "int8_gemm",
    "layer_norm": "layer_norm",
    "layer_norm_per_token": "layer_norm",
    "layer_norm_quantized": "layer_norm",
    "quantize": "quantize",
    "quantize_per_token": "quantize",
    "tile_blend": "tile_blend",
}
