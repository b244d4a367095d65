"""Taiji-Imagen in pixel space: the 64x64 base in two families, and pixel super-resolution.

Family A is diffusers' `UNet2DConditionModel` in the shape of DeepFloyd IF (deep-floyd/IF,
`deepfloyd_if/model/unet.py`), so exporters, LoRA and schedulers take it as it is. Family B is
`taiji.unet.ImagenUNet`, the U-Net of the Imagen paper (arXiv 2205.11487): image and text tokens are
attended in one softmax, at a context width of its own. `*_EFFICIENT_*` are for
`taiji.unet.EfficientUNet`.
"""

from typing import Any

# Every width must divide by 32 (group norm) and every attended width by 64 (head): 400 and 416
# fail, and 384 is the natural width at 1.3 billion parameters (`taiji.unet.check_unet`).
_FAMILY_A: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "attention_head_dim": 64,
    "act_fn": "gelu",
    "time_embedding_act_fn": "gelu",
    "norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.414,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 16,
}
# 312,817,667 parameters
A_300M_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "block_out_channels": (192, 384, 576, 768),
    "cross_attention_dim": 512,
}
# 1,292,364,803 parameters
A_1_3B_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "block_out_channels": (384, 768, 1152, 1536),
    "cross_attention_dim": 2048,
}
# 853,443 parameters: trains on a CPU
A_TINY_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
}

_FAMILY_B: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "attention_levels": (False, True, True, True),
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "encoder_hid_dim": 1024,
}
B_300M_UNET: dict[str, Any] = {
    **_FAMILY_B,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": (3, 3, 3, 3),
    "cross_attention_dim": 512,
}
B_1_3B_UNET: dict[str, Any] = {
    **_FAMILY_B,
    "block_out_channels": (384, 768, 1152, 1536),
    "layers_per_block": (3, 3, 4, 3),
    "cross_attention_dim": 1536,
}
B_1_3B_COND1024_UNET: dict[str, Any] = {**B_1_3B_UNET, "cross_attention_dim": 1024}
TINY_B_UNET: dict[str, Any] = {
    **_FAMILY_B,
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": (1, 1),
    "attention_levels": (False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
}

# Pixel super-resolution: the low-resolution image, resized, is channels 3 to 5 of the sample, and
# `class_labels` is its noise level. 437,504,387 parameters.
SR256_IF_UNET: dict[str, Any] = {
    **_FAMILY_A,
    "sample_size": 256,
    "in_channels": 6,
    "block_out_channels": (128, 256, 512, 768, 768),
    "layers_per_block": (2, 2, 3, 4, 3),
    "down_block_types": (
        *("ResnetDownsampleBlock2D",) * 2,
        *("SimpleCrossAttnDownBlock2D",) * 3,
    ),
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, *("ResnetUpsampleBlock2D",) * 2),
    "cross_attention_dim": 512,
    "class_embed_type": "timestep",
}
SR256_EFFICIENT_UNET: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 1024, 1024),
    "layers_per_block": (2, 4, 8, 8, 8),
    "attention_levels": (False, False, False, True, True),
    "self_attention": True,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "cross_attention_dim": 1024,
    "encoder_hid_dim": 1024,
    "class_embed_type": "timestep",
}
# Without self-attention, at whatever size: 1024x1024 is 4,096 tokens where it would be attended.
SR1024_EFFICIENT_UNET: dict[str, Any] = {
    **SR256_EFFICIENT_UNET,
    "sample_size": 1024,
    "self_attention": False,
}
TINY_EFFICIENT_UNET: dict[str, Any] = {
    **SR256_EFFICIENT_UNET,
    "sample_size": 64,
    "block_out_channels": (16, 32, 64),
    "layers_per_block": (1, 1, 2),
    "attention_levels": (False, False, True),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
}
TINY_SR_IF_UNET: dict[str, Any] = {
    **A_TINY_UNET,
    "sample_size": 64,
    "in_channels": 6,
    "class_embed_type": "timestep",
}
