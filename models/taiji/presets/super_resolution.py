"""Latent super-resolution: diffusers' `UNet2DConditionModel` over the latents of a VQ-f4.

With a first stage of factor 4 and upscaling by 4 the latent has the grid of the low-resolution
image, which is concatenated to it without a resize: any height and width work. For upscaling by 2
the image is pixel-unshuffled by 2 first, 3 + 12 channels. `class_labels` is the noise level of the
low-resolution image. Self-attention only at the deepest level.
"""

from typing import Any

# 192,985,763 parameters. 256 is the latent of a 1024x1024 output.
SR_S_UNET: dict[str, Any] = {
    "sample_size": 256,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (160, 320, 320, 640),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    "only_cross_attention": (True, True, True, False),
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "class_embed_type": "timestep",
}
# 192,998,723 parameters: from half the size
SR_S_X2_UNET: dict[str, Any] = {**SR_S_UNET, "in_channels": 15}
# 473,682,179 parameters: the widths of the x4 upscaler of Stable Diffusion 2
SR_L_UNET: dict[str, Any] = {**SR_S_UNET, "block_out_channels": (256, 512, 512, 1024)}

# The anchor without text, 113.6M parameters: CompVis/latent-diffusion,
# models/ldm/bsr_sr/config.yaml, as a diffusers `UNet2DModel`.
LDM_SR_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 6,
    "out_channels": 3,
    "block_out_channels": (160, 320, 320, 640),
    "down_block_types": (*("DownBlock2D",) * 3, "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", *("UpBlock2D",) * 3),
    "layers_per_block": 2,
    "attention_head_dim": 32,
}

TINY_SR_UNET: dict[str, Any] = {
    **SR_S_UNET,
    "sample_size": 32,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "only_cross_attention": (True, False),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
TINY_SR_X2_UNET: dict[str, Any] = {**TINY_SR_UNET, "in_channels": 15}
